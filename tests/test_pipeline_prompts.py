from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import EXAMPLES, OTHER, PROMPT, TARGETS, same, seeds
from peft import PeftModel
from transformers import AutoModel

import cond_pdiff
from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier, TaskPrompt
from cond_pdiff.classifier import LOGIT_SCALE, held_out_logits
from cond_pdiff.errors import CondPDiffError, HubError
from cond_pdiff.few_shot import choose
from cond_pdiff.gain import GainModel
from cond_pdiff.hub import Backbone
from cond_pdiff.models.condition_index import ConditionIndex
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.refinement import refine

# --- conditions and labels ---------------------------------------------------------------------------------------------------


def test_a_plain_string_is_a_description(pipe: CondPDiffPipeline) -> None:
    asked = "Is the remark kind?"
    plain, prompt = (pipe(condition, generator=seeds(0), output_type="params") for condition in (asked, TaskPrompt(asked)))
    assert torch.equal(plain, prompt)


@pytest.mark.parametrize("condition", ["это про кошек? 🐈", "x", "e\u0301 ﬁ", TaskPrompt("这是什么动物?", labels=["🐈", "🐕"])])
def test_any_script_works(pipe: CondPDiffPipeline, condition: Any) -> None:
    output = pipe(condition, generator=seeds(0))
    json.dumps(output.report.to_json())
    assert {neighbour.task for neighbour in output.report.nearest} == {"moods", "animals"}


@pytest.mark.parametrize(
    ("condition", "threshold", "labels", "labels_from"),
    [
        (PROMPT, 2.0, ("positive", "negative"), "prompt"),
        (TaskPrompt("Is the remark kind?", labels=["no", "yes"]), -2.0, ("no", "yes"), "prompt"),
        ("Which animal is it about?", -2.0, ("cat", "dog", "bird"), "nearest trained task"),
        ("Which animal is it about?", 2.0, (), "nowhere"),
    ],
)
def test_where_labels_come_from(
    pipe: CondPDiffPipeline, condition: Any, threshold: float, labels: tuple[str, ...], labels_from: str, tmp_path: Path
) -> None:
    pipe.condition_index.threshold.fill_(threshold)
    output = pipe(condition, generator=seeds(0))
    assert (output.report.labels, output.report.labels_from) == (labels, labels_from)
    assert output.report.in_distribution == (threshold < 0)
    assert output.report.threshold == threshold
    assert LoraAdapter.load(output.save_adapter(tmp_path / "adapter")).metadata["labels"] == list(labels)


def test_the_report_names_the_nearest_trained_task(pipe: CondPDiffPipeline) -> None:
    for condition, task in ((PROMPT, "moods"), (OTHER, "animals")):
        report = pipe(condition).report
        assert report.nearest[0].task == task
        assert report.in_distribution
        assert report.threshold == pytest.approx(float(pipe.condition_index.threshold), abs=1e-4)
        assert report.condition.token_limit == 256


def test_an_index_without_tasks_is_no_reason_to_fail(pipe: CondPDiffPipeline) -> None:
    pipe.register_modules(condition_index=ConditionIndex({}, pipe.condition_encoder.condition_dim))
    report = pipe("x").report
    assert (report.nearest, report.in_distribution, report.labels_from) == ((), False, "nowhere")


# --- the best of several -----------------------------------------------------------------------------------------------------


def test_the_best_on_the_examples_is_chosen(pipe: CondPDiffPipeline, tmp_path: Path) -> None:
    output = pipe(PROMPT, num_adapters=8, generator=seeds(*range(8)))
    choice = output.report.choice
    assert len({score.loss for score in choice.scores}) == 8
    order = sorted(range(8), key=lambda index: -choice.scores[index].separation)
    assert output.chosen == choice.index == order[0]
    # The scores are those that a stranger measures on the saved folder.
    for index in (order[0], order[-1]):
        classifier = PrototypeClassifier.load(output.adapters[index].save(tmp_path / str(index)), examples=EXAMPLES)
        names, examples = classifier.example_embeddings()
        by_names, by_both = LOGIT_SCALE * examples @ names.T, held_out_logits(names, examples, classifier.targets)
        logits = by_both if choice.scores[index].with_examples else by_names
        assert choice.scores[index].accuracy == pytest.approx(right(logits, classifier.targets), abs=1e-4)
        assert choice.scores[index].loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, classifier.targets)), abs=1e-4)
    assert choice.strength == 1.0
    other = pipe(TaskPrompt(PROMPT.description, [(text, label + "!") for text, label in EXAMPLES]), num_adapters=2).report.choice
    assert {score.with_examples for score in other.scores} == {True}  # of an unknown one, always


def right(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return float((logits.argmax(1) == targets).float().mean())


def test_a_single_candidate_is_judged_too(pipe: CondPDiffPipeline, tmp_path: Path) -> None:
    output = pipe(PROMPT, generator=seeds(0))
    choice = output.report.choice
    similarity = output.report.nearest[0].similarity
    classifier = PrototypeClassifier(pipe.base_model(), PROMPT.labels, output.adapters[0], examples=PROMPT.examples)
    assert choice == choose(classifier, output.adapters, similarity, pipe.knows(output.report.nearest, PROMPT.labels))
    assert "chosen     1 of 1, accuracy" in str(output.report)
    loaded = LoraAdapter.load(output.save_adapter(tmp_path / "adapter"))
    assert loaded.metadata["strength"] == choice.strength
    assert ("prototype_examples" in loaded.metadata) == choice.score.with_examples


@pytest.mark.parametrize(
    ("condition", "count"),
    [(PROMPT.description, 1), (PROMPT.description, 3), (TaskPrompt("Is it?", labels=["no", "yes"]), 3)],
    ids=["one", "no examples", "labels only"],
)
def test_without_examples_the_first_is_taken_and_no_base_model_is_loaded(pipe: CondPDiffPipeline, condition: Any, count: int) -> None:
    output = pipe(condition, num_adapters=count)
    assert (output.chosen, output.report.choice, len(output.adapters)) == (0, None, count)
    assert not pipe._base


def test_the_base_model_is_as_it_was(pipe: CondPDiffPipeline) -> None:
    model = pipe.base_model().model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = pipe.base_model().embed(["the good film"])
    pipe(PROMPT, num_adapters=3)
    assert pipe.base_model().model is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(pipe.base_model().embed(["the good film"]), plain)


def test_a_base_model_that_is_gone_is_named_and_costs_no_adapter_without_examples(pipe: CondPDiffPipeline) -> None:
    pipe.template.base = Backbone("nobody/gone")
    with pytest.raises(HubError, match="nobody/gone"):
        pipe(PROMPT, num_adapters=2)
    assert len(pipe(PROMPT.description, num_adapters=2).adapters) == 2


# --- what is saved -----------------------------------------------------------------------------------------------------------


def test_stock_peft_reads_the_saved_adapter(pipe: CondPDiffPipeline, tiny_backbone: Backbone, tmp_path: Path) -> None:
    output = pipe(PROMPT, num_adapters=2, generator=seeds(0, 1))
    folder = output.save_adapter(tmp_path / "adapter")
    base = AutoModel.from_pretrained(tiny_backbone.repo_id)
    backbone = SentenceBackbone.load(tiny_backbone)
    texts = ["the good film", "the awful meal", ("the cat", "the dog")]
    plain = backbone.embed(texts)
    with output.adapter.attached(backbone.model):
        adapted = backbone.embed(texts)
    stock = SentenceBackbone(PeftModel.from_pretrained(base, folder), backbone.tokenizer).embed(texts)
    torch.testing.assert_close(stock, adapted, atol=1e-5, rtol=0)
    assert (adapted - plain).abs().max() > 0.01
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_backbone.repo_id
    assert config["target_modules"] == sorted(TARGETS)


def test_the_adapter_remembers_how_it_was_made(pipe: CondPDiffPipeline, tiny_backbone: Backbone, tmp_path: Path) -> None:
    output = pipe(OTHER, num_adapters=2, generator=seeds(7, 8), num_inference_steps=4, guidance_scale=1.5)
    loaded = LoraAdapter.load(output.adapters[1].save(tmp_path / "adapter"))
    assert same(loaded, output.adapters[1])
    assert loaded.metadata == {
        "base": tiny_backbone.to_json(),
        "max_length": 16,
        "labels": ["cat", "dog", "bird"],
        "condition": {
            "description": OTHER.description,
            "examples": [list(example) for example in OTHER.examples],
            "labels": ["cat", "dog", "bird"],
        },
        "nearest": [[neighbour.task, neighbour.similarity] for neighbour in output.report.nearest],
        "in_distribution": True,
        "num_inference_steps": 4,
        "guidance_scale": 1.5,
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_config": {"prediction_type": "v_prediction", "use_exponential_sigmas": True},
        "machine": {"device": "cpu", "threads": 1, "cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "dtype": "float32",
        "candidate": 1,
        "num_adapters": 2,
        "generators": "each",
        "seed": 8,
        "generator": {"name": "generator", "revision": None, "sha256": loaded.metadata["generator"]["sha256"]},
        "versions": {"cond_pdiff": cond_pdiff.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }


GENERATE = """
import sys
from cond_pdiff.cli import main
sys.exit(main(["generate", "Is the remark kind?", "--example", "the good film=positive", "--example", "the awful meal=negative",
               "--num-adapters", "3", "--seed", "11", "--generator", sys.argv[1], "--out", sys.argv[2]]))
"""


def test_fresh_processes_write_the_same_bytes(tiny_generator: Path, tmp_path: Path) -> None:
    found = set()
    for hash_seed in ("0", "1", "4294967295"):
        folder = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [sys.executable, "-c", GENERATE, str(tiny_generator), str(folder)], env=environment, check=True, stdout=subprocess.PIPE
        )
        files = sorted(folder.iterdir())
        assert {path.name for path in files} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "cond_pdiff.json"}
        found.add(hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest())
    assert len(found) == 1


def test_the_report_says_where_the_base_model_is_preferred(pipe: CondPDiffPipeline) -> None:
    pipe.condition_index.gain_model = GainModel(take=0.999)
    output = pipe(PROMPT, num_adapters=2, generator=seeds(0, 1))
    assert output.report.choice.strength == 0
    lines = str(output.report).splitlines()
    assert any(line.startswith("chosen     the base model, accuracy ") for line in lines)
    assert any("the adapter is the base model: a generated one would gain" in line for line in lines)
    assert all(not tensor.any() for key, tensor in output.adapter.tensors.items() if ".lora_B." in key)


def test_refining_in_the_call_is_refining_the_chosen_adapter(pipe: CondPDiffPipeline) -> None:
    prompt = TaskPrompt("Is the remark kind?", EXAMPLES)
    plain = pipe(prompt, num_adapters=2, generator=seeds(1, 2))
    output = pipe(prompt, num_adapters=2, generator=seeds(1, 2), refine_steps=3, refine_seed=4)
    start = output.adapters[output.chosen]
    assert same(start, plain.adapters[plain.chosen])
    classifier = PrototypeClassifier(pipe.base_model(), prompt.labels, start, examples=prompt.examples)
    assert same(output.adapter, refine(classifier, 3, seed=4))
    assert output.adapter is output.refined
    assert (plain.refined, len(plain.to_tuple())) == (None, 4)
    for condition, options, message in (
        ("Is the remark kind?", {"refine_steps": 3}, "steps are taken on labelled examples"),
        (TaskPrompt("Is it?", [EXAMPLES[0], EXAMPLES[1]]), {"refine_steps": 3}, "two examples of at least one class"),
        (prompt, {"refine_steps": -1}, "refine_steps must be a whole number from 0 to 1000"),
        (prompt, {"refine_steps": 3, "refine_seed": 0.5}, "refine_seed must be a whole number"),
        (prompt, {"refine_steps": 3, "output_type": "params"}, "leave one of the two out"),
    ):
        with pytest.raises(CondPDiffError, match=message):
            pipe(condition, **options)
