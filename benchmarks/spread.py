"""Measure whether few steps of a generator's solver vary as much as many: the spread of one task's latents, relative to 200 steps'.

    python benchmarks/spread.py [--generator cond-pdiff/minilm-text-tasks] [--samples 48]

For the four trained tasks or styles whose latents vary least, and four others: the standard deviation over samples (root mean square
over the latents' numbers), relative to that after 200 steps, and the distance of each sample from what 200 steps make of the same noise,
in units of that standard deviation; at the generator's own guidance.
"""

from __future__ import annotations

import argparse

import torch

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.sampling import denoise

STEPS = (2, 5, 10, 16, 20, 30)


@torch.no_grad()
def latents(pipe: CondPDiffPipeline, conditions: torch.Tensor, steps: int, samples: int) -> torch.Tensor:
    """Sample latents, shape `(conditions, samples, channels, length)`; the same noises for every condition."""
    noise = pipe.prepare_latents(samples, torch.Generator().manual_seed(0), None).repeat(len(conditions), 1, 1)
    made = denoise(pipe.unet, pipe.scheduler, noise, conditions.repeat_interleave(samples, 0), steps, pipe.unet.config.guidance_scale)
    return made.unflatten(0, (len(conditions), samples))


def spread(made: torch.Tensor) -> torch.Tensor:
    return made.var(1).mean((1, 2)).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="cond-pdiff/minilm-text-tasks")
    parser.add_argument("--samples", type=int, default=48)
    arguments = parser.parse_args()
    pipe = CondPDiffPipeline.from_pretrained(arguments.generator)
    index = pipe.condition_index
    parts = index.embeddings.float().unflatten(1, (index.config.num_parts, -1))
    conditions = torch.nn.functional.normalize(parts, dim=2).flatten(1)  # means over a task's prompts, as long as one prompt's
    order = spread(latents(pipe, conditions, 20, arguments.samples)).argsort().tolist()
    picked = [*order[:4], *order[len(order) // 3 :: len(order) // 5][:4]]
    print("tasks ", ", ".join(index.names[place] for place in picked))
    reference = latents(pipe, conditions[picked], 200, arguments.samples)
    print("200   ", *(f"{value:.2f}" for value in spread(reference).tolist()), "(standard deviation)")
    for steps in STEPS:
        made = latents(pipe, conditions[picked], steps, arguments.samples)
        apart = (made - reference).square().mean((1, 2, 3)).sqrt() / spread(reference)
        ratios = spread(made) / spread(reference)
        print(f"{steps:<6}", *(f"{r:.3f}" for r in ratios.tolist()), "  from 200 steps", *(f"{a:.2f}" for a in apart.tolist()), flush=True)


if __name__ == "__main__":
    main()
