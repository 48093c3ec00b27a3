"""Keys of LoRA files: which part of a pipeline, which module, which factor."""

from __future__ import annotations

from dataclasses import dataclass

from cond_pdiff.errors import AdapterError
from cond_pdiff.formats.module_names import ModuleNames, flat, native_to_diffusers

Role = str
"""Which of a module's tensors a key names: "lora_A", "lora_B" or "alpha"."""

ENDINGS: dict[str, Role] = {
    f"{before}{factor}": role
    for before, factors in {
        ".": {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B",
              "lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"},
        ".lora.": {"down.weight": "lora_A", "up.weight": "lora_B", "alpha": "alpha"},
        ".lora_linear_layer.": {"down.weight": "lora_A", "up.weight": "lora_B", "alpha": "alpha"},
        "_lora.": {"down.weight": "lora_A", "up.weight": "lora_B", "alpha": "alpha"},
    }.items()
    for factor, role in factors.items()
}  # fmt: skip
"""The endings of keys: peft's and today's diffusers', kohya's, and three that diffusers had before."""

PARTS = {
    "base_model.model.": "", "unet.base_model.model.": "", "transformer.base_model.model.": "",
    "unet.": "", "transformer.": "", "diffusion_model.": "", "model.diffusion_model.": "",
    "lora_unet_": "", "lora_transformer_": "",
    "text_encoder.": "text_encoder.", "text_encoder_2.": "text_encoder_2.", "text_encoder_3.": "text_encoder_3.",
    "lora_te_": "text_encoder.", "lora_te1_": "text_encoder.", "lora_te2_": "text_encoder_2.", "lora_te3_": "text_encoder_3.",
}  # fmt: skip
"""The beginnings of keys → the prefix of the module's name in an adapter: the denoiser's have none, as in peft's folders."""

REFUSED = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "a Tucker decomposition",
    "oft_": "OFT", "lora_embedding_": "a LoRA of embeddings", ".diff.": "a difference of whole weights",
    ".diff_b.": "a difference of biases", "on_input": "(IA)³", "bundle_emb": "textual inversion", "lora_B.bias": "a LoRA with biases",
    "lora_up.bias": "a LoRA with biases",
}  # fmt: skip
"""What stands in the keys (with a dot behind them) of other kinds of adapters → their names."""

OLD_ATTENTION = {"to_out": "to_out.0"}
OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """One key of a LoRA file, understood.

    Args:
        modules: the modules that it belongs to, by diffusers' and transformers' names; several for a layer that these split.
        role: which of a module's tensors it is.
        stem: the key without its ending, which a module's tensors share.
    """

    modules: tuple[str, ...]
    role: Role
    stem: str


def parse_key(key: str, names: ModuleNames) -> Key:
    """Understand one key.

    Raises:
        AdapterError: another kind of adapter, by its name; or a key that is none of LoRA's; or a module that the base does not have.
    """
    for part, kind in REFUSED.items():
        if part in f"{key}.":
            raise AdapterError(f"{key!r} is of {kind}; only plain LoRA is read: lora_down (lora_A), lora_up (lora_B) and alpha")
    ending = max((ending for ending in ENDINGS if key.endswith(ending)), key=len, default=None)
    if ending is None:
        raise AdapterError(f"unexpected tensor {key!r}; expected keys that end in lora_down.weight, lora_A.weight or the like, or alpha")
    stem = key.removesuffix(ending)
    start = max((start for start in PARTS if stem.startswith(start)), key=len, default="")
    name, prefix = stem.removeprefix(start), PARTS.get(start, "")
    if not start and "_" in stem and "." not in stem:
        raise AdapterError(f"unexpected tensor {key!r}; expected a beginning such as lora_unet_, lora_te_, unet. or transformer.")
    if ".processor." in f".{name}." or (prefix and ending.startswith("_lora")):
        name = _modern(name, OLD_TEXT_ATTENTION if prefix else OLD_ATTENTION)
    if start.endswith("_"):
        resolved = ModuleNames(tuple(known.removeprefix(prefix) for known in names.known if known.startswith(prefix))) if prefix else names
        return Key(tuple(prefix + module for module in resolved.resolve(name)), ENDINGS[ending], stem)
    if "diffusion_model" in start and (native := native_to_diffusers(flat(name))) != (flat(name),):
        return Key(tuple(module for each in native for module in names.resolve(each)), ENDINGS[ending], stem)
    return Key((prefix + name,), ENDINGS[ending], stem)


def _modern(name: str, words: dict[str, str]) -> str:
    """Return the module's name today of an attention processor's layer: `attn1.processor.to_out` is `attn1.to_out.0`."""
    parent, _, last = name.replace(".processor.", ".").rpartition(".")
    return f"{parent}.{words.get(last, last)}"
