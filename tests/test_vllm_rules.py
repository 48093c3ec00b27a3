"""Adapters for language models keep the rules of vLLM's LoRA loader.

Its source states them (peft_helper.py, lora_model.py and utils.py in vllm/lora, and vllm/config/lora.py); vLLM itself is not run.

- `adapter_config.json` has `r`, `lora_alpha` and `target_modules`; `modules_to_save` is null, `bias` "none", and there is no DoRA.
- `r` is at most the server's `--max-lora-rank`, of which there are a few, 512 being the largest.
- `adapter_model.safetensors` holds matrices named `base_model.model.<module>.lora_A.weight` or `.lora_B.weight` and nothing else, and every
  module's last name is that of a linear layer of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_causal_lm import bases, collections, zoos
from tiny_language_models import LINEARS

from cond_pdiff import LoraAdapter
from cond_pdiff.training.zoo.zoo import Zoo

__all__ = ["bases", "collections", "zoos"]

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def broken_rules(folder: Path, linears: tuple[str, ...]) -> Iterator[str]:
    """What vLLM would refuse in an adapter folder for a model with these linear layers."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in {"r", "lora_alpha", "target_modules"} - config.keys():
        yield f"{name} is missing"
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        yield "whole modules, DoRA or biases"
    if config.get("r", 0) > MAX_RANKS[-1]:
        yield "rank too large"
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        *module, factor, last = key.removeprefix("base_model.model.").split(".")
        if not key.startswith("base_model.model.") or last != "weight" or factor not in ("lora_A", "lora_B"):
            yield f"{key} is no factor"
        elif module[-1] not in linears:
            yield f"{key} is of an unexpected module"
        elif tensor.ndim != 2 or config.get("r") != tensor.shape[factor == "lora_B"]:
            yield f"{key} is of another rank"


def test_vllm_would_read_them(zoos: dict[str, Zoo]) -> None:
    for name in ("opposites", "sides"):
        assert list(broken_rules(zoos["llama"].runs(name)[0].folder, LINEARS["llama"])) == []


@pytest.mark.parametrize(
    ("settings", "key", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, None, "whole modules"),
        ({"use_dora": True}, None, "whole modules, DoRA"),
        ({"r": 1024}, None, "rank too large"),
        ({"lora_alpha": ...}, None, "lora_alpha is missing"),
        ({}, "base_model.model.lm_head.weight", "is no factor"),
        ({}, "base_model.model.model.layers.0.mlp.router.lora_A.weight", "unexpected module"),
    ],
)
def test_the_rules_refuse(settings: dict[str, Any], key: str | None, told: str, zoos: dict[str, Zoo], tmp_path: Path) -> None:
    folder = LoraAdapter.load(zoos["llama"].runs("sides")[0].folder).save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) | settings
    (folder / "adapter_config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    if key:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({**tensors, key: torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    assert any(told in rule for rule in broken_rules(folder, LINEARS["llama"]))
