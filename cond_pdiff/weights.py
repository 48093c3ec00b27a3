"""Weights on disk: one file, several shards, or a file of another name than the loader looks for."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cond_pdiff.errors import HubError

INDEX_SUFFIX = ".index.json"
OWN_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors")
"""The names that loaders look for: a file of such a name holds what that loader loads, and is not taken for another's."""


def weights_files(folder: Path, name: str) -> list[Path]:
    """Find the safetensors files that the weights are in, whatever their names.

    Args:
        name: of the file that the loaders of transformers and diffusers look for, below `folder`.

    Returns:
        That file; or the shards that its index names; or the only safetensors file beside where it would be.

    Raises:
        HubError: there is none of these, or the index is broken.
    """
    expected = folder / name
    if expected.is_file():
        return [expected]
    index = folder / (name + INDEX_SUFFIX)
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [index.parent / shard for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{index} is not an index of shards: {type(error).__name__}: {error}") from error
        missing = [path.name for path in files if path.parent != index.parent or path.suffix != ".safetensors" or not path.is_file()]
        if missing or not files:
            raise HubError(f"{index} names shards that are not there: {missing or 'none at all'}; fetch the base model again")
        return files
    found = sorted(path for path in expected.parent.glob("*.safetensors") if path.name not in OWN_NAMES)
    if len(found) != 1:
        several = f"several other files: {', '.join(path.name for path in found)}" if found else "no other safetensors file"
        raise HubError(f"{folder} has no {name}, and {several}; expected one file, or shards with {expected.name}{INDEX_SUFFIX}")
    return found


def component_patterns(index: Path) -> tuple[str, ...]:
    """Return the files of a diffusers pipeline that are loaded: its components' settings, tokenizers, and weights in one form.

    Beside these, repositories of pipelines hold the same weights in other precisions, and once more as one file.

    Args:
        index: the pipeline's `model_index.json`.

    Raises:
        HubError: it is none.
    """
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        parts = [name for name, value in entries.items() if isinstance(value, list) and value[0] is not None]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise HubError(f"{index} is not the index of a diffusers pipeline: {type(error).__name__}: {error}") from error
    forms = ("*.json", "*.txt", "spiece.model", "tokenizer.model")
    stems = ("model", "diffusion_pytorch_model")
    weights = [form for stem in stems for form in (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors")]
    return (index.name, *(f"{part}/{form}" for part in parts for form in (*forms, *weights)))


def weights_sha256(files: list[Path]) -> str:
    """Return the sha256 of the bytes of all files, one after the other."""
    return _sha256(tuple((path, path.stat().st_mtime_ns) for path in files))


def weights_megabytes(folder: Path) -> float:
    """Return the size of all weights below a folder, in units of 10⁶ bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


@functools.lru_cache
def _sha256(files: tuple[tuple[Path, int], ...]) -> str:
    if len(files) == 1:
        with files[0][0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for path, _ in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def loadable(folder: Path, name: str) -> Iterator[Path]:
    """Yield a folder that `from_pretrained` loads from: `folder`, or links to its files in which the weights have the expected name."""
    (first, *shards) = weights_files(folder, name)
    if shards or first == folder / name or (folder / (name + INDEX_SUFFIX)).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for path in folder.iterdir():
            (Path(links) / path.name).symlink_to(path.absolute())
        (Path(links) / name).symlink_to(first.absolute())
        yield Path(links)
