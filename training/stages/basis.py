"""The first stage for large adapters, computed rather than trained: a basis for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from cond_pdiff.atomic import write_bytes
from cond_pdiff.errors import TrainingError
from cond_pdiff.models.module_basis import ModuleBasis, direction_key
from cond_pdiff.models.module_code import MEAN, MODULES_FILE
from cond_pdiff.tensor_file import Entry
from cond_pdiff.training.config import AutoencoderConfig, FitConfig
from cond_pdiff.training.stages.module_stage import ModuleStage
from cond_pdiff.training.zoo.params import ZooParams

NEGLIGIBLE = 1e-5
"""The share of a module's largest eigenvalue below which another is rounding."""
CODES_FILE = "codes.safetensors"


class BasisStage(ModuleStage):
    """The stage that gives its `codec` a `ModuleBasis` of a zoo.

    For each module, by itself: the mean of its n adapters, the n × n Gram matrix of what is left, its leading eigenvectors, and the
    directions that they make. Two passes over the columns of the zoo's matrix; memory grows neither with the zoo nor with the adapters.
    """

    def __init__(self, data: ZooParams, config: AutoencoderConfig) -> None:
        if config.fit != FitConfig():
            raise TrainingError('autoencoder: a ModuleBasis is computed, there is nothing to "fit"; leave that section out')
        super().__init__(data, config, ModuleBasis)
        self.module.eval()

    def train(self, folder: Path, tensorboard: bool = False) -> None:
        """Compute the basis, or read the one that is in `folder`."""
        self.prepare(folder)
        kept = load_file(folder / CODES_FILE)
        self.module.scales.copy_(kept["scales"])
        self.codes, self.energy = kept["codes"], float(kept["energy"])

    def latents(self) -> torch.Tensor:
        """Return the zoo's latents, which the eigenvectors give: what encoding every adapter would."""
        return self.codes * self.module.config.scaling_factor

    def lost(self) -> float:
        """Return the share of the zoo's energy, beside the mean, that the code loses."""
        return 1 - float((self.codes * self.module.scales).double().square().sum()) / self.energy

    def write(self, folder: Path) -> None:
        """See `ModuleStage`."""
        spans, width, adapters = self.module.spans, self.module.config.width, len(self.data)
        counts = [min(width, adapters - 1, stop - start) for start, stop in spans]
        entries: dict[str, Entry] = {MEAN: (torch.float32, (spans[-1][1],))}
        for index, ((start, stop), count) in enumerate(zip(spans, counts, strict=True)):
            entries[direction_key(index)] = (torch.float16, (count, stop - start))
        codes, energy = torch.zeros(adapters, width, len(spans)), torch.zeros(1, dtype=torch.float64)
        self.module.write_file(folder / MODULES_FILE, entries, self._pieces(counts, codes, energy))
        scales = codes.square().sum((0, 1)).div(adapters * torch.tensor(counts)).sqrt()
        scales[scales == 0] = 1
        write_bytes(folder / CODES_FILE, save({"codes": (codes / scales).contiguous(), "scales": scales, "energy": energy}))

    def _pieces(self, counts: list[int], codes: torch.Tensor, energy: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield what the file of the basis holds, in its order, and fill in the zoo's codes and its energy."""
        weights = []
        for index, (span, count) in enumerate(zip(self.module.spans, counts, strict=True)):
            gram = torch.zeros(len(self.data), len(self.data), dtype=torch.float64)
            for part in self.columns(span):
                mean = part.mean(0)
                yield mean
                part -= mean
                gram += (part @ part.T).double()
            values, vectors = (found.flip(-1)[..., :count] for found in torch.linalg.eigh(gram))
            sizes = values.clamp_min(0).sqrt()
            vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # signs are free: fixed, for equal bytes
            kept = values > NEGLIGIBLE * values.amax()
            codes[:, :count, index] = (vectors * sizes * kept).float()
            weights.append(torch.where(kept, vectors / sizes, 0).float().T)
            energy += gram.trace()
        for (start, stop), weight in zip(self.module.spans, weights, strict=True):
            made = torch.empty(len(weight), stop - start, dtype=torch.float16)
            done = 0
            for part in self.columns((start, stop)):
                made[:, done : done + part.shape[1]] = weight @ (part - part.mean(0)) * (stop - start) ** 0.5
                done += part.shape[1]
            yield made
