"""Measure the time from a condition to a saved adapter, and the command line from a cold shell against its imports alone.

    python benchmarks/speed.py [--repeats 7]

Prints medians and their ratio; all of one run on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = "Decide whether a sentence from a review of an electronic product is negative or positive."
EXAMPLES = [("battery died after a week", "negative"), ("crisp, bright screen", "positive")]
IMPORTS = "import torch, diffusers, peft"


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def warm(repeats: int) -> None:
    from cond_pdiff import CondPDiffPipeline, TaskPrompt

    pipe = CondPDiffPipeline.from_pretrained("cond-pdiff/minilm-text-tasks")
    pipe.set_progress_bar_config(disable=True)
    prompt = TaskPrompt(DESCRIPTION, EXAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 20):

            def generate(count: int = count) -> None:
                pipe(prompt, num_adapters=count).save_adapter(Path(folder) / "adapter", overwrite=True)

            generate()
            print(f"condition → saved adapter, warm, {count:>2} candidates  {median_seconds(generate, repeats):.3f} s")


def cold(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("cond-pdiff")), "generate", DESCRIPTION, "--out", f"{folder}/a", "--force"]
        for text, label in EXAMPLES:
            command += ["--example", f"{text}={label}"]
        imports = [sys.executable, "-c", IMPORTS]
        times: dict[str, list[float]] = {"generate": [], "imports": []}
        for _ in range(repeats):  # in turn, so that a slow moment of the machine meets both
            for name, argv in (("imports", imports), ("generate", command)):
                times[name].append(median_seconds(lambda argv=argv: subprocess.run(argv, check=True, capture_output=True), 1))
        medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"python -c '{IMPORTS}'                {medians['imports']:.2f} s")
    print(f"cond-pdiff generate, cold shell, 20 candidates      {medians['generate']:.2f} s")
    print(f"ratio                                               {medians['generate'] / medians['imports']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    warm(arguments.repeats)
    cold(arguments.repeats)
