"""What the first stages for large adapters share: modules one at a time, and a file of what is as long as an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.codec import AdapterCodec
from cond_pdiff.errors import TrainingError
from cond_pdiff.models.module_code import MODULES_FILE, ModuleCode
from cond_pdiff.normalization import ParamNormalizer
from cond_pdiff.training.config import AutoencoderConfig, build_typed, recorded
from cond_pdiff.training.processes import processes
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.weights import weights_sha256

NUMBERS_AT_ONCE = 2**24
"""The numbers of a zoo's columns that are in memory together: 64 MB, of which a few copies are alive."""
FACTS_FILE = "modules.json"


class ModuleStage:
    """A stage (see `CodecStage`) that gives its `codec` a `ModuleCode`.

    Args:
        data: the zoo's params.
        config: normaliser and arguments.
        code: the class of the autoencoder.

    Raises:
        TrainingError: another normaliser than "none", or arguments that the class does not take.
    """

    def __init__(self, data: ZooParams, config: AutoencoderConfig, code: type[ModuleCode]) -> None:
        if config.normalizer != "none":
            raise TrainingError(f'autoencoder: a {code.__name__} has a mean and scales of its own: "normalizer": "none", please')
        self.data, self.config = data, config
        torch.manual_seed(config.fit.seed)
        spans = [(span.start, span.stop) for span in data.template.layout.module_spans()]
        settings = {"type": code.__name__, **config.model}
        self.module: Any = build_typed({code.__name__: code}, "autoencoder, model", settings, spans)
        normalizer = ParamNormalizer("none", data.template.layout.sizes)
        normalizer.fitted.fill_(1)
        self.codec = AdapterCodec(data.template, normalizer, self.module)
        self.identity: dict[str, Any] = {"config": recorded(config), "data": data.sha256}

    def write(self, folder: Path) -> None:
        """Write what belongs to the zoo into `folder`: the autoencoder's `MODULES_FILE`, and whatever else."""
        raise NotImplementedError

    def prepare(self, folder: Path) -> None:
        """Have `write` done once, by one process, and open the file; raise `TrainingError` if it is of other settings or data."""
        facts = dump_json({"identity": self.identity})
        with processes().main_process_first():
            if not (folder / FACTS_FILE).exists():
                self.write(folder)
                write_text(folder / FACTS_FILE, facts)
        if (folder / FACTS_FILE).read_text(encoding="utf-8") != facts:
            raise TrainingError(f"{folder} was made with other settings or data; choose another folder")
        self.module.open_file(folder / MODULES_FILE)
        self.module.register_to_config(file_sha256=weights_sha256([folder / MODULES_FILE]))

    def columns(self, span: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Yield the columns of a span of all adapters, a few megabytes at a time, shape `(num_adapters, columns)`.

        Raises:
            TrainingError: an adapter holds NaN or infinite values; the message names it.
        """
        start, stop = span
        step = max(1, NUMBERS_AT_ONCE // len(self.data))
        for first in range(start, stop, step):
            part = self.data.columns(first, min(first + step, stop))
            for name, finite in zip(self.data.names, part.sum(1).isfinite().tolist(), strict=True):
                if not finite:
                    raise TrainingError(f"{name} holds NaN or infinite values; delete its folder in the zoo, and collect it again")
            yield part
