"""AdapterTemplate: what all adapters of a generator share, so that params become an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.component import Component, register_component
from cond_pdiff.errors import AdapterError
from cond_pdiff.hub import Backbone
from cond_pdiff.layout import DecodedTensors, ParamLayout
from cond_pdiff.lora import LoraSpec


@register_component
class AdapterTemplate(Component):
    """The template of a generator's adapters: layout, LoRA settings, base model, and the tensors that are constant throughout a zoo.

    Args:
        layout: `ParamLayout.to_json()`.
        lora: `LoraSpec.to_json()`.
        base: `Backbone.to_json()` of the base model.
        max_length: tokens of a text in training and evaluation.
    """

    constant_bits: torch.Tensor

    @register_to_config
    def __init__(self, layout: Mapping[str, Any], lora: Mapping[str, Any], base: Mapping[str, Any], max_length: int = 128) -> None:
        super().__init__()
        self.layout = ParamLayout.from_json(layout)
        self.spec = LoraSpec.from_json(lora)
        self.base = Backbone.from_json(base)
        size = self.layout.num_adapter_params - self.layout.num_params
        # float32 numbers kept as bits: constants must stay exact when the pipeline is cast to half precision.
        self.register_buffer("constant_bits", torch.zeros(max(size, 1), dtype=torch.int32))

    @classmethod
    def from_adapters(cls, adapters: Iterable[LoraAdapter], base: Backbone, max_length: int) -> AdapterTemplate:
        """Make the template of a zoo: tensors that are equal in all `adapters`, which are gone through once, become constants.

        Raises:
            AdapterError: the adapters differ in layout, rank, alpha or base model, or do not differ at all.
        """
        adapters = iter(adapters)
        first, count = next(adapters), 1
        constants = list(first.tensors)
        for adapter in adapters:
            count += 1
            other, shapes = adapter.layout.shapes, first.layout.shapes
            for key in sorted(key for key in adapter.head.keys() & first.head.keys() if other[key] != shapes[key]):
                raise AdapterError(
                    f"the adapters of a zoo must have heads of one shape: {key!r} is {other[key]} in one and {shapes[key]} in another; "
                    "collect tasks with as many labels each"
                )
            if not first.is_like(adapter):
                raise AdapterError("the adapters of a zoo must share layout, rank, alpha and base model")
            constants = [key for key in constants if torch.equal(adapter.tensors[key], first.tensors[key])]
        if len(constants) == len(first.tensors):
            raise AdapterError(f"all tensors of the {count} adapters are equal: there is nothing to model")
        layout = ParamLayout.from_tensors(first.tensors, constants)
        template = cls(layout.to_json(), first.spec.to_json(), base.to_json(), max_length)
        if constants:
            flat = torch.cat([first.tensors[key].reshape(-1).float() for key in layout.constants])
            template.constant_bits.copy_(flat.view(torch.int32))
        return template

    def to_tensors(self, params: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn params, shape `(num_params,)`, into an adapter's tensors, of the params' type and on their device, with their gradients."""
        return self.layout.unflatten(params, self._constants(self.constant_bits.view(torch.float32).to(params)))

    def read_tensors(self, decode_part: Callable[[int, int], torch.Tensor]) -> DecodedTensors:
        """Return an adapter's tensors, float32, on the CPU, which are made when they are read.

        Args:
            decode_part: start and stop → these of the params, shape `(1, stop - start)`.
        """
        constants, places = self._constants(self.constant_bits.view(torch.float32).cpu()), self.layout.places()
        return DecodedTensors(
            self.layout.shapes,
            lambda key: constants[key].clone() if key in constants else decode_part(*places[key])[0].detach().to("cpu", torch.float32),
        )

    def _constants(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the constant tensors, which lie in `values` one after the other."""
        sizes = [torch.Size(self.layout.shapes[key]).numel() for key in self.layout.constants]
        parts = values[: sum(sizes)].split(sizes) if sizes else ()
        return {key: part.reshape(self.layout.shapes[key]) for key, part in zip(self.layout.constants, parts, strict=True)}

    def to_adapter(self, params: torch.Tensor, metadata: Mapping[str, Any] | None = None) -> LoraAdapter:
        """Turn params, shape `(num_params,)`, into a validated adapter, float32, on the CPU."""
        return self.adapter_of(self.to_tensors(params.detach().to("cpu", torch.float32)), metadata)

    def adapter_of(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> LoraAdapter:
        """Return the adapter that has these tensors."""
        facts = {"base": self.base.to_json(), "max_length": self.config.max_length, **(metadata or {})}
        return LoraAdapter(self.spec, tensors, facts)

    def to_params(self, adapter: LoraAdapter) -> torch.Tensor:
        """Flatten an adapter of the same layout into params, shape `(num_params,)`."""
        return self.layout.flatten(adapter.tensors)
