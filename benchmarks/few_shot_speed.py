"""Measure what a call with labelled examples and a step of refining cost, beside the plain way of release 0.2, in turn.

    python benchmarks/few_shot_speed.py --tasks tasks [--shots 8] [--repeats 3] [--candidates 1 8] [--task NAME …]

CPU seconds of one thread, medians, and the ratio of the two. The plain way embeds names and examples under one adapter after the other,
batches by length in characters; and again with the base model, which has read them for the condition. A plain step of refining embeds 32
examples and all names anew and trains all blocks; one of now is a step on both halves, of the upper blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier, TaskPrompt
from cond_pdiff.classifier import held_out_logits
from cond_pdiff.few_shot import ExampleScore
from cond_pdiff.refinement import LEARNING_RATE, HalfTraining, Refinement, refine
from cond_pdiff.sampling import seeded
from cond_pdiff.training.tasks.tasks import Task

TASKS = ("therapist_answer_fits_question", "emotional_support_strategy", "exam_subject")
STEPS = 4
PLAIN_STEPS, PLAIN_EXAMPLES = 12, 32


def paired(ways: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median CPU seconds of each way; they take turns."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, own in zip(ways, times, strict=True):
            started = time.process_time()
            way()
            own.append(time.process_time() - started)
    return [statistics.median(own) for own in times]


def plain_call(pipe: CondPDiffPipeline, prompt: TaskPrompt, count: int) -> None:
    """Generate, and score the base model and one candidate after the other."""
    params = pipe(prompt, count, generator=seeded(0, count), output_type="params")
    adapters = [pipe.codec.to_adapter(row) for row in params]
    classifier = PrototypeClassifier(pipe.base_model(), prompt.labels, adapters[0], pipe.template.config.max_length, prompt.examples)
    for adapter in (None, *adapters):
        ExampleScore.measure(classifier.with_adapter(adapter), with_examples=True)


def plain_refine(classifier: PrototypeClassifier, steps: int) -> LoraAdapter:
    """Refine with the whole model in every step."""
    adapter, backbone = classifier.adapter, classifier.backbone
    assert adapter is not None
    moving = {key: tensor.clone().requires_grad_() for key, tensor in adapter.tensors.items() if ".lora_B." in key}
    optimizer, rng = torch.optim.AdamW(moving.values(), lr=LEARNING_RATE, weight_decay=0.0), random.Random(0)
    for _ in range(steps):
        picks = sorted(rng.sample(range(len(classifier.targets)), min(PLAIN_EXAMPLES, len(classifier.targets))))
        with dataclasses.replace(adapter, tensors={**adapter.tensors, **moving}).attached(backbone.model, check=False):
            names = backbone.forward(classifier.name_texts, classifier.max_length)
            examples = backbone.forward([classifier.examples[index][0] for index in picks], classifier.max_length)
        optimizer.zero_grad()
        nn.functional.cross_entropy(held_out_logits(names, examples, classifier.targets[picks]), classifier.targets[picks]).backward()
        optimizer.step()
    return adapter


def compare(pipe: CondPDiffPipeline, task: Task, shots: int, candidates: Sequence[int], repeats: int) -> None:
    """Print what is measured on one task."""
    prompt = task.prompt("shots/0", shots * len(task.labels))
    adapter = pipe(prompt, generator=seeded(0, 1)).adapters[0]
    classifier = PrototypeClassifier(pipe.base_model(), task.labels, adapter, pipe.template.config.max_length, prompt.examples)
    own = Refinement(classifier, adapter)
    halves = [HalfTraining(own, half, LEARNING_RATE, 0) for half in range(2)]
    lengths = pipe.base_model().token_counts([text for text, _ in prompt.examples])
    print(f"{task.name}: {len(task.labels)} classes, {len(lengths)} examples of {statistics.median(lengths):.0f} tokens", flush=True)

    def steps() -> None:
        for _ in range(STEPS):
            for half in halves:
                half.step()

    def calls(count: int) -> tuple[Callable[[], object], Callable[[], object]]:
        return partial(plain_call, pipe, prompt, count), lambda: pipe(prompt, count, generator=seeded(0, count))

    ways = {f"call, {count} candidates": calls(count) for count in candidates}
    ways[f"{STEPS} steps of refining"] = (partial(plain_refine, classifier, STEPS), steps)
    ways["refining"] = (partial(plain_refine, classifier, PLAIN_STEPS), partial(refine, classifier))
    for what, pair in ways.items():
        before, after = paired(pair, repeats)
        print(f"  {what:<22}{before:7.2f} s → {after:6.2f} s   ratio {before / after:.2f}", flush=True)
    taken = refine(classifier).metadata["refined"]
    print(f"  refining took {taken['of']} steps and kept those of {taken['steps']}, instead of {PLAIN_STEPS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = CondPDiffPipeline.from_pretrained("cond-pdiff/minilm-text-tasks")
    pipe.set_progress_bar_config(disable=True)
    for name in arguments.task or TASKS:
        compare(pipe, Task.load(arguments.tasks / name), arguments.shots, arguments.candidates, arguments.repeats)


if __name__ == "__main__":
    main()
