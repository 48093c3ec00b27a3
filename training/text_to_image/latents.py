"""Rendered scenes as the transformer learns them: encoded once, kept on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cond_pdiff.atomic import dump_json, write_bytes, write_text
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.text_to_image.drawing import render
from cond_pdiff.training.text_to_image.pictures import to_input
from cond_pdiff.training.text_to_image.scenes import Scene, scene_stream

PART = 2048
FACTS_FILE = "latents.json"


@dataclass(frozen=True)
class SceneLatents:
    """Scenes and the latents of their pictures.

    Args:
        scenes: what the pictures show; captions are drawn from these.
        latents: scaled to unit variance, float32 of shape `(num_scenes, channels, side, side)`.
        sha256: of the latents.
    """

    scenes: list[Scene]
    latents: torch.Tensor
    sha256: str

    @classmethod
    def make(cls, autoencoder: AutoencoderKL, count: int, seed: int, folder: Path) -> SceneLatents:
        """Render and encode the first `count` scenes of a stream, part by part; parts that `folder` has already are read.

        Raises:
            TrainingError: `folder` holds latents of another autoencoder or stream, or damaged ones.
        """
        facts = json.loads(json.dumps({"autoencoder": weights_sha256(autoencoder), "count": count, "part": PART, "seed": seed}))
        path = folder / FACTS_FILE
        if path.exists() and path.read_text(encoding="utf-8") != dump_json(facts):
            raise TrainingError(f"{folder} holds the latents of another autoencoder or of other scenes; delete it to make them again")
        write_text(path, dump_json(facts))
        stream = scene_stream(seed)
        scenes: list[Scene] = []
        parts: list[torch.Tensor] = []
        for start in range(0, count, PART):
            found = list(islice(stream, min(PART, count - start)))
            scenes += [scene for scene, _ in found]
            parts.append(_part(folder / f"part-{start // PART:04d}.safetensors", autoencoder, found))
        latents = torch.cat(parts)
        return cls(scenes, latents.float(), hashlib.sha256(latents.numpy().tobytes()).hexdigest())


def weights_sha256(module: torch.nn.Module) -> str:
    """Return the sha256 of all tensors of a module, in order."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _part(path: Path, autoencoder: AutoencoderKL, found: list) -> torch.Tensor:
    """Return latents in half precision, from the file or made now."""
    if path.exists():
        try:
            return load_file(path)["latents"]
        except (SafetensorError, KeyError) as error:
            raise TrainingError(f"{path} is damaged ({error}); delete it to make it again") from error
    latents = []
    for start in range(0, len(found), 32):
        pictures = np.stack([render(scene, rng) for scene, rng in found[start : start + 32]])
        mean = autoencoder.encode(to_input(torch.from_numpy(pictures).permute(0, 3, 1, 2))).latent_dist.mean
        latents.append((mean * autoencoder.config["scaling_factor"]).half())
    part = torch.cat(latents).contiguous()  # a convolution may leave them in another memory order
    write_bytes(path, save({"latents": part}))
    return part
