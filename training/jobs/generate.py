"""`generate --batch`: an adapter for each line of a file of requests, made many at a time. Run the same command again to go on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import check_output_folder, dump_json, write_text
from cond_pdiff.defaults import CHOOSE_FROM, DEFAULT_STEPS
from cond_pdiff.errors import ConditionError, CondPDiffError, OutputExistsError
from cond_pdiff.pipelines.many import Request, generate_many
from cond_pdiff.pipelines.pipeline_cond_pdiff import MAX_ADAPTERS, CondPDiffPipeline
from cond_pdiff.sampling import check_count
from cond_pdiff.training.jobs.run import Execution, Report, run_jobs
from cond_pdiff.training.jobs.work import FAILURES, RECEIPTS, Work, is_done, receipt_path

BATCH_FILE = "batch.json"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""The form of a request's name, which is that of its adapter's folder."""
OWN_ENTRIES = ("id", "seed", "num_adapters")
"""The entries of a request beside those of its condition."""
NUMBERS_AT_ONCE = 1 << 26
"""The number of params that a worker makes at a time, 256 MiB of them; not more than `MAX_AT_ONCE` requests."""
MAX_AT_ONCE = 64
WRITERS = 8
"""The number of adapters that are written at a time: a disk takes longer to say that it holds one than a processor to make it."""


@dataclass(frozen=True)
class BatchReport:
    """What came of a file of requests.

    Args:
        wrong: number of a line → why it is no request, or none of this generator.
        jobs: what became of the others.
    """

    wrong: dict[int, str]
    jobs: Report


def generate_batch(
    work: GenerateWork, execution: Execution | None = None, shard: tuple[int, int] = (0, 1), force: bool = False
) -> BatchReport:
    """Make the adapters that are not there yet.

    Args:
        force: replace adapters that an earlier run made of other requests of the same names.

    Raises:
        ConditionError: no line is a request.
        OutputExistsError: the folder holds something else, or a batch of another generator or other settings, or, without `force`, an
            adapter of another request.
    """
    if not work.requests:
        first = next(iter(work.wrong.values()), "it is empty")
        raise ConditionError(f"{work.file} holds no request for {work.generator}: {first}")
    work.open_folder()
    others = [job for job in work.jobs() if not force and receipt_path(work, job).exists() and (work.folder / job).exists()]
    if other := next((job for job in others if not is_done(work, job)), None):
        raise OutputExistsError(f"{work.folder / other} was made of another request; give this one another id, or --force to replace it")
    return BatchReport(work.wrong, run_jobs(work, execution, shard))


@dataclass
class GenerateWork(Work):
    """The requests of a file, each a job whose result is an adapter's folder.

    A line is a JSON object with a condition (`description`, and where there are some `examples` and `labels`; `image` or `vector`, a file
    beside the requests, or a list of image files of one style), and may have an `id` (default: the number of the line), a `seed`, and
    `num_adapters`.

    Args:
        generator: bundled name, folder, or Hub repository.
        file: of requests, JSON Lines.
        folder: gets a folder for each.
        num_adapters: candidates of a request that does not say; None: as many as `cond-pdiff generate` makes.
        seed: of candidate 0 of such a request.
    """

    label = "generate"
    unit = "request"

    generator: str
    file: Path
    folder: Path
    num_adapters: int | None = None
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float | None = None
    seed: int = 0

    @cached_property
    def pipe(self) -> CondPDiffPipeline:
        """The generator."""
        pipe: CondPDiffPipeline = CondPDiffPipeline.from_pretrained(self.generator)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def _read(self) -> tuple[dict[str, Request], dict[int, str]]:
        requests: dict[str, Request] = {}
        wrong: dict[int, str] = {}
        with self.file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    name, request = self._request(number, json.loads(line))
                    if name in requests:
                        raise ConditionError(f"another line has the id {name!r}")
                    requests[name] = request
                except ValueError as error:
                    wrong[number] = f"not JSON: {error}"
                except (CondPDiffError, OSError) as error:
                    wrong[number] = str(error)
        return requests, wrong

    def _request(self, number: int, record: Any) -> tuple[str, Request]:
        if not isinstance(record, dict):
            raise ConditionError(f"a request is a JSON object, got {record!r:.80}")
        name = str(record.get("id", number))
        if not NAME.fullmatch(name) or name in (RECEIPTS, FAILURES, BATCH_FILE):
            raise ConditionError(f"an id names a folder: letters, digits, '.', '-' and '_', got {name!r:.80}")
        shown = {key: value for key, value in record.items() if key not in OWN_ENTRIES}
        condition = self.pipe.condition_encoder.condition_kind.from_request(shown, self.file.parent)
        count = record.get("num_adapters", self.num_adapters or (CHOOSE_FROM if condition.examples else 1))
        check_count("num_adapters", count, MAX_ADAPTERS)
        seed = record.get("seed", self.seed)
        check_count("seed", seed, 2**63 - 1002, least=0)
        return name, Request(condition, tuple(range(seed, seed + count)))

    @property
    def requests(self) -> dict[str, Request]:
        """The requests by name."""
        return self._read[0]

    @property
    def wrong(self) -> dict[int, str]:
        """Number of a line → why it is no request."""
        return self._read[1]

    @cached_property
    def at_once(self) -> int:  # type: ignore[override]  # of other work it is a setting
        """The number of requests that are denoised together."""
        adapters = max(len(request.seeds) for request in self.requests.values())
        return min(MAX_AT_ONCE, max(1, NUMBERS_AT_ONCE // (adapters * self.pipe.template.layout.num_params)))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What all adapters of the folder have in common."""
        return {
            "generator": self.pipe._source["sha256"] if self.pipe._source else None,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }

    def open_folder(self) -> None:
        """Begin the folder, or check that it was begun with this generator and these settings."""
        path = self.folder / BATCH_FILE
        if not path.exists():
            check_output_folder(self.folder, (), overwrite=False)
            write_text(path, dump_json(self.settings))
        if (found := json.loads(path.read_text(encoding="utf-8"))) != self.settings:
            different = sorted(name for name in self.settings if found.get(name) != self.settings[name])
            raise OutputExistsError(f"{self.folder} is a batch of other settings ({', '.join(different)} differ); choose another folder")

    def jobs(self) -> list[str]:
        """Return the names of all requests."""
        return list(self.requests)

    def shared(self) -> Sequence[str]:
        """Return the file of settings."""
        return (BATCH_FILE,)

    def key(self, job: str) -> str:
        """Return a hash of the request."""
        request = self.requests[job]
        return hashlib.sha256(dump_json({"condition": request.condition.to_json(), "seeds": request.seeds}).encode()).hexdigest()

    def adopts(self, job: str) -> bool:
        """Return false: an adapter without a receipt may be of another request of that name; it is made again."""
        return False

    def run_job(self, job: str) -> None:
        """Make one adapter."""
        self.run_jobs([job])

    def run_jobs(self, jobs: Sequence[str]) -> None:
        """Make the adapters of several requests, denoised together, and write them."""
        asked = [self.requests[job] for job in jobs]
        outputs = generate_many(self.pipe, asked, self.num_inference_steps, self.guidance_scale)
        with ThreadPoolExecutor(WRITERS) as writers:
            list(writers.map(lambda job, output: output.save_adapter(self.folder / job, overwrite=True), jobs, outputs))
