"""Names of modules in other tools' files → those of diffusers and transformers.

kohya's tools write `_` for `.`; of Stable Diffusion XL and FLUX they, and ComfyUI, have the names of the models' own repositories (SGM,
BFL), where FLUX has queries, keys and values in one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cond_pdiff.errors import AdapterError

COMPOUNDS = frozenset((
    "add_embedding", "add_k_proj", "add_q_proj", "add_v_proj", "adaln_single", "caption_projection", "class_embedding",
    "context_embedder", "conv_in", "conv_out", "conv_shortcut", "down_blocks", "encoder_hid_proj", "ff_context",
    "final_layer_norm", "guidance_embedder", "layer_norm1", "layer_norm2", "linear_1", "linear_2", "mid_block", "norm1_context",
    "norm_out", "out_proj", "patch_embed", "patch_embedding", "pos_embed", "position_embedding", "proj_in", "proj_mlp", "proj_out",
    "q_proj", "k_proj", "v_proj", "self_attn", "single_transformer_blocks", "text_embedder", "text_model", "text_projection",
    "time_emb_proj", "time_embedding", "time_text_embed", "timestep_embedder", "to_add_out", "to_k", "to_out", "to_q", "to_v",
    "token_embedding", "transformer_blocks", "up_blocks", "wi_0", "wi_1", "x_embedder",
))  # fmt: skip
"""The parts with an underscore in the names of the modules of diffusers' denoisers and of transformers' text encoders."""

WORDS = frozenset((
    "DenseReluDense", "EncDecAttention", "SelfAttention", "attentions", "attn", "attn1", "attn2", "block", "conv", "conv1", "conv2",
    "downsamplers", "emb", "embeddings", "encoder", "fc1", "fc2", "ff", "k", "layer", "layers", "linear", "mlp", "net", "norm",
    "norm1", "norm2", "o", "proj", "q", "resnets", "shared", "upsamplers", "v", "wi", "wo",
))  # fmt: skip
"""The other parts of these names, but for numbers."""

SGM_RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
SGM_SINGLES = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
SGM = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d)_(.+)|middle_block_(\d)_(.+)")

BFL = re.compile(r"(double_blocks|single_blocks)_(\d+)_(.+)")
BFL_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
BFL_LAYERS: dict[str, tuple[str, ...]] = {
    "img_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"), "txt_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "img_attn_proj": ("attn_to_out_0",), "txt_attn_proj": ("attn_to_add_out",), "img_mlp_0": ("ff_net_0_proj",),
    "img_mlp_2": ("ff_net_2",), "txt_mlp_0": ("ff_context_net_0_proj",), "txt_mlp_2": ("ff_context_net_2",),
    "img_mod_lin": ("norm1_linear",), "txt_mod_lin": ("norm1_context_linear",),
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm_linear",),
}  # fmt: skip
"""FLUX's layers → diffusers'; of several, the rows of one weight lie one below the other."""
BFL_SINGLE_BLOCK = ("linear1", "linear2", "modulation_lin")
"""Those of single blocks; the others are of double blocks."""
BFL_SINGLES = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1", "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1", "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
}  # fmt: skip


@dataclass(frozen=True)
class ModuleNames:
    """The names of a base model's modules, to tell which underscore was a dot.

    Args:
        known: the modules' full names, as diffusers and transformers have them; none: those of the models that these tools are used
            with are told by their parts (`COMPOUNDS`).
    """

    known: tuple[str, ...] = ()
    _flat: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_flat", {flat(name): name for name in self.known})

    @classmethod
    def of(cls, names: Iterable[str]) -> ModuleNames:
        """Make them of names in any order, each once."""
        return cls(tuple(sorted(set(names))))

    def resolve(self, name: str) -> tuple[str, ...]:
        """Return the dotted names of the modules that `name` stands for, which has underscores for dots; several for a fused layer.

        Raises:
            AdapterError: the base model has no such module.
        """
        return tuple(self._dotted(part, name) for part in native_to_diffusers(name))

    def _dotted(self, name: str, given: str) -> str:
        if not self.known or name != given:  # what a table gave needs no model
            parts = split_parts(name)
            if strange := [part for part in parts if not part.isdigit() and part not in COMPOUNDS | WORDS]:
                raise AdapterError(f"{strange[0]!r} in {given!r} is no part of a module's name that is known here; name the base model")
            return ".".join(parts)
        if name not in self._flat:
            raise AdapterError(f"{given!r} is no module of the base model, which has {', '.join(self.known[:3])}, …; is it another base?")
        return self._flat[name]


def flat(name: str) -> str:
    """Write a module's name with underscores for dots, as kohya's tools do."""
    return name.replace(".", "_")


def split_parts(name: str) -> list[str]:
    """Split a name with underscores for dots into parts: at each place the longest of `COMPOUNDS` that fits, or up to the next one."""
    words, parts = name.split("_"), []
    while words:
        count = next((count for count in (3, 2) if "_".join(words[:count]) in COMPOUNDS), 1)
        parts.append("_".join(words[:count]))
        words = words[count:]
    return parts


def native_to_diffusers(name: str) -> tuple[str, ...]:
    """Translate a module's name of SGM's U-Net (Stable Diffusion XL) or BFL's FLUX, with underscores, into diffusers'; others stay."""
    if name in SGM_SINGLES:
        return (SGM_SINGLES[name],)
    if name in BFL_SINGLES:
        return (BFL_SINGLES[name],)
    if found := SGM.fullmatch(name):
        return (_from_sgm(*found.groups()),)
    if (found := BFL.fullmatch(name)) and (layer := BFL_LAYERS.get(found[3])):
        return tuple(f"{BFL_BLOCKS[found[1]]}_{found[2]}_{part}" for part in layer)
    return (name,)


def _from_sgm(side: str | None, block: str, index: str, rest: str, middle: str, middle_rest: str) -> str:
    """Return diffusers' name of a layer in one of SGM's blocks; each of diffusers' has three of them, an upsampler counts to the last."""
    if side is None:
        where = ("resnets_0", "attentions_0", "resnets_1")[int(middle)]
        return f"mid_block_{where}_{SGM_RESNET.get(middle_rest, middle_rest)}"
    place = int(block) - (side == "input_blocks")
    number, layer = divmod(place, 3)
    if rest == "op":
        return f"down_blocks_{number}_downsamplers_0_conv"
    if rest == "conv":
        return f"up_blocks_{number}_upsamplers_0_conv"
    blocks = "down_blocks" if side == "input_blocks" else "up_blocks"
    return f"{blocks}_{number}_{('resnets', 'attentions')[int(index)]}_{layer}_{SGM_RESNET.get(rest, rest)}"
