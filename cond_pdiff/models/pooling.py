"""Pooling: how a sentence encoder makes one embedding of a text's last hidden states, as sentence-transformers keeps it beside a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cond_pdiff.errors import HubError

MODULES_FILE = "modules.json"
DENSE_WEIGHTS = "model.safetensors"

FORMER_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What most published models say in the place of `pooling_mode`, in the order in which several are joined."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "torch.nn.modules.linear.Identity": nn.Identity,
    "torch.nn.modules.activation.Tanh": nn.Tanh,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.SiLU": nn.SiLU,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid,
}
"""The activations of dense layers, by the names that sentence-transformers gives them."""


def _last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = mask.sum(1).long().squeeze(-1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask * torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)[:, None]
    return (hidden * weights).sum(1) / weights.sum(1)


POOLINGS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, float("-inf")).amax(1),
    "mean": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1),
    "mean_sqrt_len_tokens": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1).sqrt(),
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
"""The ways to pool: last hidden states `(texts, tokens, hidden_size)` and mask `(texts, tokens, 1)` → `(texts, hidden_size)`.

Texts are padded on the right.
"""


class UnitLength(nn.Module):
    """The scaling of embeddings to length 1."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, each of length 1."""
        return nn.functional.normalize(embeddings, dim=-1)


class Pooling(nn.Module):
    """The way from last hidden states to embeddings of length 1: pooling, dense layers if there are any, normalisation.

    Args:
        modes: keys of `POOLINGS`; of several, the results are joined.
        layers: what is applied to the pooled states, one after another.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), layers: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.modes = tuple(modes)
        self.layers = nn.Sequential(*layers)

    @classmethod
    def load(cls, folder: Path) -> Pooling:
        """Read what sentence-transformers' `modules.json` in a model's folder says; without that file, it is the mean.

        Raises:
            HubError: there is something in it that would give other embeddings; it is named.
        """
        if not (folder / MODULES_FILE).is_file():
            return cls()
        try:
            modules = [(str(one["type"]), str(one["path"])) for one in _read(folder / MODULES_FILE)]
            _check_transformer(folder, modules)
            modes: Sequence[str] = ()
            layers: list[nn.Module] = []
            for kind, path in modules[1:]:
                name = kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind
                if name == "Pooling" and not modes:
                    modes = _modes(_read(folder / path / "config.json"), folder / path)
                elif name == "Dense" and modes:
                    layers += _dense(folder / path)
                elif name == "Normalize" and modes:
                    layers.append(UnitLength())
                elif name != "Dropout":
                    raise HubError(f"{folder / MODULES_FILE} has a module {kind!r} that is not known here; its embeddings would be others")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise HubError(f"what {folder / MODULES_FILE} names cannot be read: {type(error).__name__}: {error}") from error
        if not modes:
            raise HubError(f"{folder / MODULES_FILE} has no module Pooling; expected a transformer, then its pooling")
        if layers and isinstance(layers[-1], UnitLength):
            layers.pop()  # embeddings have length 1 anyway, and a second division would change their last bits
        return cls(modes, layers).requires_grad_(False).eval()

    def embedding_dim(self, hidden_size: int) -> int:
        """Return the length of an embedding."""
        widths = [layer.out_features for layer in self.layers if isinstance(layer, nn.Linear)]
        return widths[-1] if widths else hidden_size * len(self.modes)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Make embeddings, shape `(texts, embedding_dim)`, of states `(texts, tokens, hidden_size)` and a mask `(texts, tokens)`."""
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = torch.cat([POOLINGS[mode](hidden, mask) for mode in self.modes], dim=-1)
        return nn.functional.normalize(self.layers.to(pooled.device)(pooled), dim=-1)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _check_transformer(folder: Path, modules: Sequence[tuple[str, str]]) -> None:
    """Refuse what changes texts before the transformers model reads them, or is none."""
    kind, path = modules[0]
    if kind.rpartition(".")[2] != "Transformer" or not kind.startswith("sentence_transformers.") or path:
        raise HubError(f"{folder / MODULES_FILE} begins with {kind!r} in {path!r}; expected a Transformer in the folder itself")
    for name, key in (("sentence_bert_config.json", "do_lower_case"), ("config_sentence_transformers.json", "default_prompt_name")):
        settings = _read(folder / name) if (folder / name).is_file() else {}
        if settings.get(key):
            raise HubError(f"{folder / name} says {key} = {settings[key]!r}, which changes all texts; that is not supported")
    if any(".." in Path(other).parts or Path(other).is_absolute() for _, other in modules):
        raise HubError(f"{folder / MODULES_FILE} names a folder that is not in {folder}")


def _modes(settings: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    given = settings.get("pooling_mode") or [mode for key, mode in FORMER_MODES.items() if settings.get(key)] or "mean"
    modes = (given,) if isinstance(given, str) else tuple(given)
    wrong = [mode for mode in modes if mode not in POOLINGS]
    wrong += [key for key in settings if key.startswith("pooling_mode_") and key not in FORMER_MODES and settings[key]]
    if wrong:
        raise HubError(f"{folder}: the pooling {wrong[0]!r} is not known; known are {', '.join(POOLINGS)}")
    return modes


def _dense(folder: Path) -> list[nn.Module]:
    """Return a dense layer and its activation."""
    settings = _read(folder / "config.json")
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in ACTIVATIONS:
        raise HubError(f"{folder}: the activation {activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
    others = {"use_residual": (None, False), "module_input_name": (None, "sentence_embedding")}
    others["module_output_name"] = others["module_input_name"]
    for key, usual in others.items():
        if settings.get(key) not in usual:
            raise HubError(f"{folder}: {key} is {settings[key]!r}, which is not supported")
    if not (folder / DENSE_WEIGHTS).is_file():
        raise HubError(f"{folder} has no {DENSE_WEIGHTS}, the only format of weights that is read")
    layer = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    layer.load_state_dict({key.removeprefix("linear."): value for key, value in load_file(folder / DENSE_WEIGHTS).items()})
    return [layer, ACTIVATIONS[activation]()]
