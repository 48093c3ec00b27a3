"""GGUF files: base models in llama.cpp's format, read by transformers and kept as safetensors, which load in a tenth of the time."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.atomic import atomic_folder
from cond_pdiff.errors import HubError, OutputExistsError
from cond_pdiff.locks import LOADING

GGUF_SUFFIX = ".gguf"


def converted(file: Path, folder: Path) -> Path:
    """Return `folder` with the model and tokenizer of a GGUF file as transformers keeps them; made on first use, complete or not at all.

    Quantised weights become float32 numbers, the very ones that the file stands for: four times as many bytes as in half precision, and
    nothing is rounded a second time.

    Args:
        folder: to create, in a cache; its name tells the file's bytes from others.

    Raises:
        HubError: transformers cannot read the file, or the package gguf, by which it does, is missing.
    """
    if not (folder / "config.json").is_file():
        with LOADING, contextlib.suppress(OutputExistsError), atomic_folder(folder, ()) as aside:  # another process may have been first
            _convert(file, aside)
    return folder


def _convert(file: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401  # transformers would only say so in the middle
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise HubError(f"{file.name} is read by the packages gguf and transformers (a newer one): pip install 'cond-pdiff[lm]'") from error
    named: Any = {"gguf_file": file.name, "local_files_only": True}
    dense: Any = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **named)
        model = AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=False, **named, **dense)
    except Exception as error:  # gguf's reader and transformers' converters raise whatever broken bytes lead them to
        raise HubError(f"{file} cannot be read as a language model: {type(error).__name__}: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
