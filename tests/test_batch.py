"""Many conditions at once: `generate_many`, and `generate --batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHER, PROMPT, quiet, refused, same, seeds, told
from PIL import Image

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.conditions.style_image import STYLE_VIEWS, StyleImage
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.vector import Vector
from cond_pdiff.errors import ConditionError
from cond_pdiff.pipelines.many import ROWS_AT_ONCE, Request, denoise_many, generate_many
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.jobs.generate import GenerateWork, generate_batch
from cond_pdiff.training.jobs.run import Execution
from cond_pdiff.verify import verify

LABELS = ["positive", "negative"]


def prompts(count: int) -> list[TaskPrompt]:
    """Of several lengths, some of them on trained tasks."""
    return [TaskPrompt("Is the remark kind?" + " good" * (number % 4), (), LABELS) for number in range(count)]


def test_adapters_do_not_depend_on_their_company(pipe: CondPDiffPipeline) -> None:
    conditions: list[Any] = [*prompts(37), PROMPT, OTHER]
    requests = [Request(condition, (number, number + 1)) for number, condition in enumerate(conditions)]
    assert 2 * len(requests) > 2 * ROWS_AT_ONCE
    together = generate_many(pipe, requests, 4)
    for picked in ([0], [38], [5, 37, 2], list(reversed(range(39)))):
        for number, output in zip(picked, generate_many(pipe, [requests[number] for number in picked], 4), strict=True):
            assert torch.equal(output.latents, together[number].latents)
            assert all(same(*pair) for pair in zip(output.adapters, together[number].adapters, strict=True))
            assert output.adapter.metadata == together[number].adapter.metadata
            assert (output.chosen, output.report) == (together[number].chosen, together[number].report)


def test_they_are_those_of_single_calls_but_for_rounding(pipe: CondPDiffPipeline) -> None:
    requests = [Request(condition, (number, number + 1)) for number, condition in enumerate((*prompts(3), PROMPT))]
    for request, output in zip(requests, generate_many(pipe, requests, guidance_scale=2.0), strict=True):
        alone = pipe(request.condition, num_adapters=2, generator=seeds(*request.seeds), guidance_scale=2.0)
        assert (output.chosen, output.report.labels) == (alone.chosen, alone.report.labels)
        for one, other in zip(output.adapters, alone.adapters, strict=True):
            for key, tensor in one.tensors.items():
                torch.testing.assert_close(tensor, other.tensors[key], atol=1e-5, rtol=0)
            own = {key: value for key, value in one.metadata.items() if key not in ("rows_at_once", "nearest")}
            assert own == {key: value for key, value in other.metadata.items() if key != "nearest"}


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_schedulers_that_draw_noise_draw_each_adapters_own(pipe: CondPDiffPipeline, scheduler: str) -> None:
    import diffusers

    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    requests = [Request(condition, (7,)) for condition in prompts(35)]
    together = denoise_many(pipe, requests, 3, None)
    (alone,) = denoise_many(pipe, [requests[34]], 3, None)
    assert torch.equal(alone.latents, together[34].latents)
    assert not torch.equal(together[0].latents, together[1].latents)


def test_unseen_styles_are_shown_in_all_their_views(style_generator: Path, tmp_path: Path) -> None:
    pipe = quiet(CondPDiffPipeline.from_pretrained(style_generator))
    pipe.condition_index.threshold.fill_(2.0)  # all are unseen
    pictures = [StyleImage(Image.radial_gradient("L").resize((90, 70 + number)).convert("RGB")) for number in range(3)]
    requests = [Request(picture, (3,)) for picture in pictures]
    together = denoise_many(pipe, requests, 2, None)
    assert len(requests) * STYLE_VIEWS > ROWS_AT_ONCE
    (alone,) = denoise_many(pipe, requests[2:], 2, None)
    assert torch.equal(alone.latents, together[2].latents)
    torch.testing.assert_close(alone.latents, pipe(pictures[2], generator=seeds(3), num_inference_steps=2).latents, atol=1e-4, rtol=1e-4)


def test_wrong_conditions_and_numbers_are_refused(pipe: CondPDiffPipeline) -> None:
    assert generate_many(pipe, []) == []
    for condition in (["a", "b"], Image.new("RGB", (64, 64)), TaskPrompt("good " * 400)):
        with pytest.raises(ConditionError):
            generate_many(pipe, [Request("Is the remark kind?"), Request(condition)])


# --- requests in a file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    lines: list[Any] = [
        {"id": "kind", "description": "Is the remark kind?", "labels": LABELS},
        "",
        {"description": "Which animal is it about?", "examples": [["the kitten", "cat"], ["the leash", "dog"]], "num_adapters": 2},
        {"id": "kind", "description": "Again?"},
        {"id": "../out", "description": "Is it?"},
        {"id": "long", "description": "good " * 400},
        {"id": "picture", "image": "style.png"},
        {"id": "seeded", "description": "Is the remark kind?", "labels": LABELS, "seed": 5},
        {"id": "many", "description": "Is the remark kind?", "num_adapters": 0},
        [1],
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(line if line == "" else json.dumps(line) for line in lines) + "\n{not json\n")
    return path


def test_a_batch_makes_a_folder_for_each_good_line(run: Any, requests: Path, tiny_generator: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["generate", "--batch", requests, "--out", out, "--generator", tiny_generator, "--steps", 3, "--json"]
    done = run(*command)
    assert done.status == 1  # a line looked like a request, and was none that the encoder could read
    facts = json.loads("\n".join(done.out))
    assert (facts["adapters"], list(facts["failed"])) == (3, ["long"])
    assert "tokens; the condition encoder reads" in facts["failed"]["long"]
    wrong = {int(line): why for line, why in facts["skipped"].items()}
    assert list(wrong) == [4, 5, 7, 9, 10, 11]
    for line, part in {4: "another line has the id 'kind'", 5: "an id names a folder", 7: "has a description", 9: "num_adapters",
                       10: "a JSON object", 11: "not JSON"}.items():  # fmt: skip
        assert part in wrong[line]
        assert any(f"line {line} of {requests} was skipped" in note for note in done.err)
    assert sorted(path.name for path in out.iterdir()) == ["3", "batch.json", "failures", "kind", "receipts", "seeded"]
    first, second = (LoraAdapter.load(out / name) for name in ("kind", "seeded"))
    assert [first.metadata["seed"], second.metadata["seed"]] == [0, 5]
    assert not same(first, second)
    pipe = quiet(CondPDiffPipeline.from_pretrained(tiny_generator))
    (alone,) = generate_many(pipe, [Request(TaskPrompt("Is the remark kind?", (), LABELS), (5,))], 3)
    assert same(second, alone.adapter)
    assert verify(second, tiny_generator).same
    assert LoraAdapter.load(out / "3").metadata["num_adapters"] == 2

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run(*command).status == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    refused(run(*command[:-1], "--guidance-scale", 2), "is a batch of other settings (guidance_scale differ)")
    requests.write_text(json.dumps({"id": "kind", "description": "Which animal is it about?"}))
    refused(run(*command[:-1]), "kind was made of another request; give this one another id, or --force")
    assert told(run(*command, "--force")) == {"adapters": 1, "failed": {}, "folder": str(out), "skipped": {}}
    assert LoraAdapter.load(out / "kind").metadata["condition"]["description"] == "Which animal is it about?"


def test_processes_and_shards_make_the_same(requests: Path, tiny_generator: Path, tmp_path: Path) -> None:
    lines = [{"id": f"r{number}", "description": prompt.description, "labels": LABELS} for number, prompt in enumerate(prompts(7))]
    requests.write_text("\n".join(map(json.dumps, lines)))

    def made(name: str) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in (tmp_path / name).rglob("adapter_model.safetensors")}

    def work(name: str) -> GenerateWork:
        return GenerateWork(str(tiny_generator), requests, tmp_path / name, num_inference_steps=3)

    generate_batch(work("here")).jobs.check()
    generate_batch(work("there"), Execution(workers=1), (1, 2)).jobs.check()
    assert sorted(made("there")) == ["r1", "r3", "r5"]
    generate_batch(work("there")).jobs.check()
    assert made("there") == made("here")
    assert len(made("here")) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a description", "--batch", "FILE"], "a batch has its conditions"),
        (["--batch", "FILE", "--refine", "3"], "a batch has its conditions"),
        (["--batch", "GONE"], "there is no file of requests"),
        (["--batch", "EMPTY"], "holds no request for"),
        (["--batch", "FILE", "--steps", "0"], "num_inference_steps must be"),
        (["a description", "--workers", "2"], "are for a --batch"),
        (["--batch", "FILE", "--per-job", "gpus=1"], "are for the executor ray"),
    ],
)
def test_batches_that_make_no_sense_are_refused(
    run: Any, requests: Path, tiny_generator: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    places = {"FILE": requests, "GONE": tmp_path / "gone.jsonl", "EMPTY": tmp_path / "empty.jsonl"}
    done = run("generate", *(places.get(one, one) for one in arguments), "--out", tmp_path / "out", "--generator", tiny_generator)
    refused(done, message)
    assert not (tmp_path / "out" / "receipts").exists()


def test_every_kind_of_condition_reads_requests(tmp_path: Path) -> None:
    Image.radial_gradient("L").save(tmp_path / "style.png")
    assert StyleImage.from_request({"image": "style.png"}, tmp_path).image.mode == "RGB"
    assert Vector.from_request({"vector": [1, 2.5]}, tmp_path).numbers.tolist() == [1, 2.5]
    kind: type[Condition]
    for kind, record in ((StyleImage, {"vector": [1]}), (Vector, {"vector": [1], "text": "x"}), (TaskPrompt, {"text": "x"})):
        with pytest.raises(ConditionError, match="a request for this generator has"):
            kind.from_request(record, tmp_path)
    with pytest.raises(ConditionError, match="not a recorded task prompt"):
        TaskPrompt.from_request({"description": "Is it?", "examples": [1]}, tmp_path)
