"""Generators, adapters and the demo as Hub repositories, each with a card that is right where it stands."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cond_pdiff.adapter import CONFIG_FILE, METADATA_FILE, PREVIEW_FILE, WEIGHTS_FILE, LoraAdapter
from cond_pdiff.adapter_card import CARD_FILE, base_fields, shareable_card
from cond_pdiff.atomic import write_text
from cond_pdiff.errors import HubError
from cond_pdiff.generator_info import GeneratorInfo
from cond_pdiff.hub import BUNDLED_NAMESPACE, EVAL_RESULTS, Push, check_generator, push_folder
from cond_pdiff.model_cards import fill_card

CARD_FILES = (CARD_FILE, "pictures", EVAL_RESULTS)
"""The card and what belongs to it."""

LOADS_GENERATOR = re.compile(r'CondPDiffPipeline\.from_pretrained\("[^"\n]*"\)')
PICTURE = re.compile(r"!\[[^\]\n]*\]\((?!https?:)([^)\n]+)\)\n?")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
COMPONENT_FILES = ("config.json", "scheduler_config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.json")
"""The files that diffusers saves of a component."""

SPACE_FILES = (CARD_FILE, "app.py", "requirements.txt")
VARIABLE = "COND_PDIFF_{}_GENERATOR"
"""The environment variable by which `app.py` is told a generator's name; in it, the word for what the generator makes."""


def add_card(generator: Path, source: Path | None = None, name: str | None = None) -> None:
    """Give a saved generator a card: the one of the folder it was loaded from, or one that says that nothing was measured.

    Args:
        source: folder with the card that describes these weights, with its pictures and evaluation results.
        name: what a new card calls it; default: the folder's name.
    """
    if source is not None and (source / CARD_FILE).is_file():
        for path in (source / CARD_FILE, *source.glob("pictures/*.png"), *source.glob(f"{EVAL_RESULTS}/*.yaml")):
            target = generator / path.relative_to(source)
            if target.absolute() != path.absolute():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        return
    info = GeneratorInfo.read(generator)
    fields = {
        "name": name or generator.absolute().name,
        "makes": info.makes,
        **base_fields(info.base.repo_id),
        "facts": "\n".join("    " + line for line in str(info).splitlines()[2:]),
    }
    write_text(generator / CARD_FILE, fill_card("generator.md", fields))


def _shown_pictures(folder: Path) -> list[str]:
    """Return the names of the pictures in a folder, and in folders in it, that its card shows."""
    card = (folder / CARD_FILE).read_text(encoding="utf-8") if (folder / CARD_FILE).is_file() else ""
    names = [name for name in PICTURE.findall(card) if name.lower().endswith(PICTURE_ENDINGS)]
    return [name for name in names if not {"..", ""} & set(name.split("/")) and (folder / name).is_file()]


def _generator_files(folder: Path) -> list[str]:
    """Return the names of a generator's own files: its components', and the card with what belongs to it."""
    components = [name for name, value in check_generator(folder).items() if isinstance(value, list) and value != [None, None]]
    own = [f"{component}/{pattern}" for component in components for pattern in COMPONENT_FILES]
    found = [path.relative_to(folder).as_posix() for pattern in (*own, f"{EVAL_RESULTS}/*.yaml") for path in folder.glob(pattern)]
    return ["model_index.json", CARD_FILE, *found, *_shown_pictures(folder)]


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy those of the named files that there are."""
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def push_generator(generator: str | Path, repo_id: str, **options: Any) -> Push:
    """Push a local or bundled generator with its card to a Hub repository: its own files, whatever else lies in its folder.

    Where its base model or its condition encoder's is a local folder, the components' settings go on naming that: they are looked for
    there. The card's snippet then loads the repository, and pictures that did not come along (a pull brings none) are left out of it.

    Args:
        generator: a folder, or the name of a bundled or cached one.
        options: as for `cond_pdiff.hub.push_folder`.

    Raises:
        HubError: not a complete generator; or see `push_folder`.
    """
    info = GeneratorInfo.read(generator)
    source = info.folder
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / source.absolute().name
        _copy(_generator_files(source), source, folder)
        if not (folder / CARD_FILE).is_file():
            add_card(folder)
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        card = LOADS_GENERATOR.sub(f'CondPDiffPipeline.from_pretrained("{repo_id}")', card)
        card = PICTURE.sub(lambda found: found[0] if (folder / found[1]).is_file() else "", card)
        write_text(folder / CARD_FILE, shareable_card(card, info.base.repo_id))
        return push_folder(folder, repo_id, patterns=("*",), **{"commit_message": "Push a generator of LoRA adapters", **options})


def push(folder: str | Path, repo_id: str, **options: Any) -> Push:
    """Push an adapter folder's own files, with a new card if it has none; or a generator (see `push_generator`).

    These are the adapter's files, the preview, and pictures that its card shows, as they stand. Only if the base model is a path of this
    machine, the adapter is sent as `LoraAdapter.shareable` makes it, and the card without the path.

    Args:
        folder: of an adapter; else a generator: a folder, or the name of a bundled or cached one.
        options: as for `cond_pdiff.hub.push_folder`.

    Raises:
        AdapterError: the folder holds an adapter that is malformed.
        HubError: see `push_generator`.
    """
    place = Path(folder)
    if not (place / CONFIG_FILE).is_file():
        return push_generator(folder, repo_id, **options)
    adapter = LoraAdapter.load(place)
    preview = (place / PREVIEW_FILE).read_bytes() if (place / PREVIEW_FILE).is_file() else None
    if not (place / CARD_FILE).is_file():
        return adapter.push_to_hub(repo_id, preview, **options)
    with tempfile.TemporaryDirectory() as parent:
        copy, shareable = Path(parent) / "adapter", adapter.shareable()
        if shareable is adapter:
            _copy((CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, PREVIEW_FILE), place, copy)
        else:
            shareable.save(copy, preview=preview)
        _copy(_shown_pictures(place), place, copy)
        write_text(copy / CARD_FILE, shareable_card((place / CARD_FILE).read_text(encoding="utf-8"), adapter.spec.base_model))
        return push_folder(copy, repo_id, patterns=("*",), **{"commit_message": "Push a LoRA adapter", **options})


def push_space(app: str | Path, repo_id: str, generators: tuple[str, ...] = (), **options: Any) -> Push:
    """Push the demo as a Gradio Space.

    Args:
        app: the project's `app.py`.
        generators: Hub repositories of generators to show instead of the bundled ones, at most one of a kind; the Space fetches them when
            it is built.
        options: as for `cond_pdiff.hub.push_folder`.

    Raises:
        HubError: `app` or gradio is missing, a generator cannot be read or is of a kind that `app` does not show, or see `push_folder`.
    """
    if not Path(app).is_file():
        raise HubError(f"there is no {app}; give the demo's app.py, which lies at the top of the project's repository")
    try:
        gradio = version("gradio")
    except PackageNotFoundError as error:
        raise HubError("a Space names the gradio that the demo was tried with: pip install 'cond-pdiff[app]'") from error
    shown: dict[str, str] = {}
    for name in generators:
        if Path(name).is_dir() or name.startswith(BUNDLED_NAMESPACE):
            raise HubError(
                f"{name} is not a repository on the Hub, where a Space could find it; push it first (bundled ones are there anyway)"
            )
        makes = GeneratorInfo.read(name).makes
        variable = VARIABLE.format(makes.upper())
        if variable not in Path(app).read_text(encoding="utf-8"):
            raise HubError(f"{name} makes {makes} adapters, which {app} has no place for: it does not read {variable}")
        if makes in shown:
            raise HubError(f"{shown[makes]} and {name} both make {makes} adapters; the demo shows one generator of a kind")
        shown[makes] = name
    names = "".join(f"- {name}\n" for name in shown.values())
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        shutil.copyfile(app, folder / "app.py")
        (folder / "requirements.txt").write_text(f"cond-pdiff[app]=={version('cond-pdiff')}\n", encoding="utf-8")
        generators_yaml = f"models:\n{names}preload_from_hub:\n{names}" if names else ""
        card = fill_card("space.md", {"gradio": gradio, "generators": generators_yaml})
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        settings = {"repo_type": "space", "space_sdk": "gradio", "commit_message": "Push the demo"}
        variables = {VARIABLE.format(makes.upper()): name for makes, name in shown.items()}
        return push_folder(folder, repo_id, patterns=SPACE_FILES, space_variables=variables, **{**settings, **options})
