"""`calibrate`: what to believe of a generator's adapters on tasks that it has not seen, measured and fitted. Run it again to go on.

For every task of a collection that the generator was not trained on: prompts with eight examples a class, eight candidates each; with 1, 2,
4 and 8 of these examples, what they say (`cond_pdiff.gain.Evidence`) of the first candidate alone, with all eight also of the best of all,
and what it really reaches on the test split, beside the base model. For trained tasks the same, with prototypes of names. Then
`cond_pdiff.training.evaluate.gain_fit` fits the numbers of a `GainModel` on each half of the sources, checks them on the other half, and
fits them on all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm.auto import tqdm

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.classifier import place_in_class, prototype_logits
from cond_pdiff.conditions.texts import Text, label_text
from cond_pdiff.defaults import CALIBRATION_DRAWS, CALIBRATION_ROWS
from cond_pdiff.errors import TaskDataError, TrainingError
from cond_pdiff.few_shot import ExampleScore, weigh
from cond_pdiff.gain import GainModel
from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS, CondPDiffPipeline
from cond_pdiff.training.config import STRICT, Count
from cond_pdiff.training.evaluate.gain_fit import GainRow, check, fit_gain_model
from cond_pdiff.training.evaluate.measure import weights_sha256
from cond_pdiff.training.precision import mixed_precision
from cond_pdiff.training.tasks.tasks import Task, load_tasks

SHOTS = (1, 2, 4, 8)
"""The numbers of examples a class, to which the prompt's are cut when they are asked."""
MAX_LABELS = 16
"""The most labels of a task: eight examples of each of more classes are more than people give."""


@dataclass(frozen=True, config=STRICT)
class CalibrateConfig:
    """The settings of `calibrate`: how much is measured."""

    draws: Count = Field(default=CALIBRATION_DRAWS, description="prompts a task, with other examples")
    candidates: Annotated[int, Field(ge=2, le=MAX_ADAPTERS)] = Field(default=8, description="adapters a prompt")
    rows: Count = Field(default=CALIBRATION_ROWS, description="rows of the test split")
    precision: Literal["no", "bf16"] = Field(default="no", description="'bf16': autocast while texts are embedded")


class Calibrator:
    """A generator, and what measures tasks with it.

    Args:
        generator: bundled name, folder, or Hub repository, of adapters for a sentence encoder.
    """

    def __init__(self, generator: str | Path, config: CalibrateConfig) -> None:
        self.config, self.pipe = config, CondPDiffPipeline.from_pretrained(generator)
        self.pipe.set_progress_bar_config(disable=True)
        if not self.pipe.family.has_prototypes:
            raise TrainingError(
                "gains are predicted of adapters under which texts are classified by prototypes; this generator makes adapters for a "
                f"{self.pipe.family.name}"
            )
        self.base, self.length = self.pipe.base_model(), self.pipe.template.config.max_length
        self.settings = {**asdict(config), "shots": list(SHOTS), "generator": weights_sha256(self.pipe)}

    def measure(self, task: Task) -> list[GainRow]:
        """Measure a task: a row for every draw and number of examples."""
        rows = task.test_rows(self.config.rows)
        texts, right = [text for text, _ in rows], torch.tensor([label for _, label in rows])
        of_base = self._embed(None, texts)
        return [row for draw in range(self.config.draws) for row in self._measure_draw(task, draw, texts, right, of_base)]

    def _measure_draw(self, task: Task, draw: int, texts: list[Text], right: torch.Tensor, of_base: torch.Tensor) -> Iterator[GainRow]:
        prompt = task.prompt(f"shots/{draw}", SHOTS[-1] * len(task.labels))
        nearest, _ = self.pipe.nearest(self.pipe.condition_encoder.encode([prompt])[0][0])
        similarity, known = nearest[0].similarity, self.pipe.knows(nearest, task.labels)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(self.config.candidates)]
        params = self.pipe(prompt, num_adapters=len(seeds), generator=seeds, output_type="params")
        adapters = [self.pipe.codec.to_adapter(row) for row in params]
        own = [*map(label_text, task.labels), *(text for text, _ in prompt.examples)]
        embedded = [self._embed(adapter, own).split([len(task.labels), len(prompt.examples)]) for adapter in (None, *adapters)]
        targets = torch.tensor([prompt.labels.index(label) for _, label in prompt.examples])
        place = place_in_class(targets, len(task.labels))
        asked = {0: of_base}

        def correct(index: int, kept: torch.Tensor, with_examples: bool) -> torch.Tensor:
            if index not in asked:
                asked[index] = self._embed(adapters[index - 1], texts)
            (names, examples), given = embedded[index], kept if with_examples else kept[:0]
            return prototype_logits(names, examples[given], targets[given], asked[index]).argmax(1) == right

        for shots in SHOTS:
            kept = (place < shots).nonzero()[:, 0]
            scores = [
                ExampleScore.of_embeddings(names, examples[kept], targets[kept], index == 0 or not known)
                for index, (names, examples) in enumerate(embedded)
            ]
            for candidates in (1, len(adapters)) if shots == SHOTS[-1] else (1,):
                index, evidence = weigh(scores[0], scores[1 : 1 + candidates], len(kept), len(task.labels), similarity, known)
                without, with_adapter = correct(0, kept, True).float(), correct(index + 1, kept, not known).float()
                yield GainRow(
                    task=task.name,
                    source=task.source or task.name,
                    draw=draw,
                    shots=shots,
                    candidates=candidates,
                    evidence=evidence,
                    rows=len(right),
                    base=round(float(without.mean()), 4),
                    gain=round(float((with_adapter - without).mean()), 4),
                    changed=round(float((with_adapter - without).abs().mean()), 4),
                )

    @torch.no_grad()
    def _embed(self, adapter: LoraAdapter | None, texts: Sequence[Text]) -> torch.Tensor:
        model = self.base.model
        attached = adapter.attached(model, check=False) if adapter else contextlib.nullcontext()
        with attached, mixed_precision(self.config.precision, next(model.parameters()).device):
            return self.base.embed(texts, self.length).float().cpu()


def calibrate(generator: str | Path, tasks_folder: str | Path, out: str | Path, config: CalibrateConfig) -> dict[str, Any]:
    """Measure every classification task of a collection into `<out>/tasks/*.json`, fit a `GainModel`, and write `<out>/gain_model.json`.

    A task that was measured with the same settings is not measured again.

    Args:
        generator: see `Calibrator`.
        tasks_folder: a task collection; tasks of regression, and of more than `MAX_LABELS` classes, are left out.

    Returns:
        `model` (`GainModel.to_json`), and `check`: what came of fitting on each half of the sources, on the other half.

    Raises:
        TaskDataError: there are too few tasks that the generator was not trained on.
    """
    calibrator, out = Calibrator(generator, config), Path(out)
    trained = set(calibrator.pipe.condition_index.names)
    rows: list[GainRow] = []
    for task in tqdm([task for task in load_tasks(tasks_folder) if len(task.labels) <= MAX_LABELS], desc="calibrate", unit="task"):
        path = out / "tasks" / f"{task.name}.json"
        settings = {**calibrator.settings, "task": _task_sha256(task)}
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if found is None or found["settings"] != settings:
            found = {"settings": settings, "rows": [row.to_json() for row in calibrator.measure(task)]}
            write_text(path, dump_json(found))
        # A trained task in words that the generator does not know it by tells nothing of unseen ones, nor the other way round.
        rows += [row for row in map(GainRow.from_json, found["rows"]) if row.evidence.known == (task.name in trained)]
    halves = [fit_gain_model([row for row in rows if row.half == half]) for half in (0, 1)]
    result = {"check": check(halves, rows), "model": fit_gain_model(rows).to_json()}
    write_text(out / "gain_model.json", dump_json(result))
    return result


def _task_sha256(task: Task) -> str:
    """Return the sha256 of all that a task's prompts and test rows are made of."""
    rows = [task.rows(split) for split in ("train", task.test_split)]
    return hashlib.sha256(json.dumps([task.description, task.labels, rows]).encode()).hexdigest()


def check_local(generator: str | Path) -> Path:
    """Return the file of a local generator that `write_gain_model` writes.

    Raises:
        TaskDataError: it is no local folder.
    """
    path = Path(generator) / "condition_index" / "config.json"
    if not path.is_file():
        raise TaskDataError(f"{generator} is not the folder of a generator, so its numbers cannot be written; save it somewhere first")
    return path


def write_gain_model(generator: str | Path, model: Mapping[str, float]) -> None:
    """Put fitted numbers into a local generator folder. For `verify`, adapters that it made before are then another generator's.

    Raises:
        TaskDataError: see `check_local`.
    """
    path = check_local(generator)
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, dump_json({**config, "gain_model": GainModel.from_json(model).to_json()}))
