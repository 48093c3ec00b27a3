"""Generators, adapters and the demo as Hub repositories, each with a card that is right where it stands."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cond_pdiff.adapter import CONFIG_FILE, PREVIEW_FILE, LoraAdapter
from cond_pdiff.adapter_card import CARD_FILE
from cond_pdiff.atomic import write_text
from cond_pdiff.errors import HubError
from cond_pdiff.generator_info import GeneratorInfo
from cond_pdiff.hub import BUNDLED_NAMESPACE, EVAL_RESULTS, Push, push_folder
from cond_pdiff.model_cards import fill_card

CARD_FILES = (CARD_FILE, "pictures", EVAL_RESULTS)
"""The card and what belongs to it."""

LOADS_GENERATOR = re.compile(r'CondPDiffPipeline\.from_pretrained\("[^"\n]*"\)')
PICTURE = re.compile(r"!\[[^\]\n]*\]\((?!https?:)([^)\n]+)\)\n?")
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
        "makes": info.condition.adapters,
        "base_model": info.base.repo_id,
        "base_string": json.dumps(info.base.repo_id),
        "facts": "\n".join("    " + line for line in str(info).splitlines()[2:]),
    }
    write_text(generator / CARD_FILE, fill_card("generator.md", fields))


def push_generator(generator: str | Path, repo_id: str, **options: Any) -> Push:
    """Push a local or bundled generator with its card to a Hub repository.

    The card's snippet then loads the repository, and pictures that did not come along (a pull brings none) are left out of it.

    Args:
        generator: a folder, or the name of a bundled or cached one.
        options: as for `cond_pdiff.hub.push_folder`.

    Raises:
        HubError: not a complete generator; or see `push_folder`.
    """
    source = GeneratorInfo.read(generator).folder
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / source.absolute().name
        shutil.copytree(source, folder)
        if not (folder / CARD_FILE).is_file():
            add_card(folder)
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        card = LOADS_GENERATOR.sub(f'CondPDiffPipeline.from_pretrained("{repo_id}")', card)
        card = PICTURE.sub(lambda found: found[0] if (folder / found[1]).is_file() else "", card)
        write_text(folder / CARD_FILE, card)
        return push_folder(folder, repo_id, **{"commit_message": "Push a generator of LoRA adapters", **options})


def push(folder: str | Path, repo_id: str, **options: Any) -> Push:
    """Push an adapter folder as it stands, with a new card if it has none; or a generator (see `push_generator`).

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
    if (place / CARD_FILE).is_file():
        return push_folder(place, repo_id, **{"commit_message": "Push a LoRA adapter", **options})
    preview = (place / PREVIEW_FILE).read_bytes() if (place / PREVIEW_FILE).is_file() else None
    return adapter.push_to_hub(repo_id, preview, **options)


def push_space(app: str | Path, repo_id: str, generators: tuple[str, ...] = (), **options: Any) -> Push:
    """Push the demo as a Gradio Space.

    Args:
        app: the project's `app.py`.
        generators: Hub repositories of generators to show instead of the bundled ones, at most one for styles and one for tasks;
            the Space fetches them when it is built.
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
        makes = GeneratorInfo.read(name).condition.adapters
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
