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
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import TARGETS
from peft import PeftModel
from transformers import AutoModel

import cond_pdiff
from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier, TaskPrompt
from cond_pdiff.classifier import LOGIT_SCALE, held_out_logits
from cond_pdiff.errors import ConditionError, CondPDiffError, HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.condition_index import ConditionIndex
from cond_pdiff.models.sentence_backbone import SentenceBackbone

EXAMPLES = [("the good film", "positive"), ("the awful meal", "negative"), ("the lovely room", "positive"), ("the poor song", "negative")]
PROMPT = TaskPrompt("Is the remark kind?", EXAMPLES)
OTHER = TaskPrompt("Which animal is it about?", [("the kitten", "cat"), ("the leash", "dog"), ("a nest", "bird")])


@pytest.fixture
def pipe(tiny_generator: Path) -> CondPDiffPipeline:
    return quiet(CondPDiffPipeline.from_pretrained(tiny_generator))


def quiet(pipe: CondPDiffPipeline) -> CondPDiffPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def params(pipe: CondPDiffPipeline, condition: Any = PROMPT, **options: Any) -> torch.Tensor:
    """Params of candidates 0, 1, 2 unless told otherwise; each depends on its own seed only."""
    return pipe(condition, **{"num_adapters": 3, "generator": seeds(0, 1, 2), "output_type": "params", **options})


def same(first: LoraAdapter, second: LoraAdapter) -> bool:
    return first.layout == second.layout and all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


# --- what diffusers promises of a pipeline -----------------------------------------------------------------------------------


def test_saved_and_loaded_it_gives_the_same_bits(pipe: CondPDiffPipeline, tmp_path: Path) -> None:
    expected = params(pipe)
    pipe.save_pretrained(tmp_path / "copy")
    assert {path.suffix for path in (tmp_path / "copy").rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}
    for folder in (tmp_path / "copy", str(tmp_path / "copy")):
        assert torch.equal(params(quiet(CondPDiffPipeline.from_pretrained(folder))), expected)
    assert params(pipe).std() > 0


@pytest.mark.parametrize("output_type", ["adapter", "params", "latent"])
def test_offloading_moves_every_network_and_ends_with_the_call(
    pipe: CondPDiffPipeline, monkeypatch: pytest.MonkeyPatch, output_type: str
) -> None:
    moved: list[str] = []

    class Recorder(ModelHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(self.name)
            return args, kwargs

    freed: list[bool] = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    for name in ("unet", "autoencoder"):
        add_hook_to_module(getattr(pipe, name), Recorder(name))
    pipe(PROMPT, output_type=output_type)
    assert set(moved) == ({"unet"} if output_type == "latent" else {"unet", "autoencoder"})
    assert freed == [True]


def test_saved_again_it_does_not_tell_where_it_was(tiny_generator: Path, tmp_path: Path) -> None:
    CondPDiffPipeline.from_pretrained(tiny_generator).save_pretrained(tmp_path)
    configs = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json")]
    assert len(configs) == 8
    assert not any(str(tiny_generator) in text or "_name_or_path" in text for text in configs)


def test_model_index_names_the_public_places(tiny_generator: Path) -> None:
    index = json.loads((tiny_generator / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if not name.startswith("_")} == {
        "autoencoder": ["cond_pdiff", "ParamAutoencoder"],
        "condition_encoder": ["cond_pdiff", "SentenceConditionEncoder"],
        "condition_index": ["cond_pdiff", "ConditionIndex"],
        "normalizer": ["cond_pdiff", "ParamNormalizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "template": ["cond_pdiff", "AdapterTemplate"],
        "unet": ["cond_pdiff", "ParamUNet1D"],
    }
    assert index["_class_name"] == "CondPDiffPipeline"


def test_components_make_another_pipeline(pipe: CondPDiffPipeline) -> None:
    assert torch.equal(params(quiet(CondPDiffPipeline(**pipe.components))), params(pipe))


def test_a_component_can_be_replaced_while_loading(pipe: CondPDiffPipeline, tiny_generator: Path) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    other = CondPDiffPipeline.from_pretrained(tiny_generator, scheduler=scheduler, unet=pipe.unet)
    assert other.scheduler is scheduler
    assert other.unet is pipe.unet


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM", "EulerAncestralDiscrete", "LCM"])
def test_any_scheduler_and_each_candidate_depends_on_its_own_seed_only(pipe: CondPDiffPipeline, name: str) -> None:
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    together = params(pipe)
    assert torch.isfinite(together).all()
    assert torch.pdist(together).min() > 1e-4
    assert torch.equal(params(pipe), together)
    alone = torch.cat([params(pipe, num_adapters=1, generator=[rng]) for rng in seeds(0, 1, 2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_batch_is_as_single_calls(pipe: CondPDiffPipeline) -> None:
    together = pipe(PROMPT, num_adapters=5, generator=seeds(*range(5)), guidance_scale=2.0)
    for seed, adapter in enumerate(together.adapters):
        alone = pipe(PROMPT, generator=seeds(seed)[0], guidance_scale=2.0).adapter
        for key, tensor in alone.tensors.items():
            torch.testing.assert_close(adapter.tensors[key], tensor, atol=1e-5, rtol=0)
        assert adapter.metadata["seed"] == alone.metadata["seed"] == seed


@pytest.mark.parametrize("make", [list, tuple])
def test_generators_may_stand_in_any_sequence(pipe: CondPDiffPipeline, make: type) -> None:
    assert torch.equal(params(pipe, generator=make(seeds(0, 1, 2))), params(pipe))


def test_without_a_generator_the_global_seed_decides(pipe: CondPDiffPipeline) -> None:
    torch.manual_seed(3)
    first, second = params(pipe, generator=None), params(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(params(pipe, generator=None), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    adapter = pipe(PROMPT).adapter
    again = pipe(PROMPT, generator=seeds(adapter.metadata["seed"])[0]).adapter
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert len(repr(adapter)) < 300
    assert f"seed={adapter.metadata['seed']}" in repr(adapter)


def test_one_generator_serves_all_candidates(pipe: CondPDiffPipeline) -> None:
    first = params(pipe, generator=seeds(5)[0])
    assert torch.equal(params(pipe, generator=seeds(5)[0]), first)
    assert torch.pdist(first).min() > 1e-4


@pytest.mark.parametrize("change", [{"num_inference_steps": 3}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}, {"condition": OTHER}])
def test_settings_change_the_output(pipe: CondPDiffPipeline, change: dict[str, Any]) -> None:
    assert (params(pipe, **change) - params(pipe)).norm() > 1e-3 * params(pipe).norm()


def test_guidance_of_zero_ignores_the_condition(pipe: CondPDiffPipeline) -> None:
    torch.testing.assert_close(params(pipe, guidance_scale=0), params(pipe, OTHER, guidance_scale=0))


def test_guidance_extrapolates_from_without_to_with_condition(pipe: CondPDiffPipeline) -> None:
    """One step of a first-order solver is linear in the prediction."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    without, with_condition, doubled = (
        pipe(PROMPT, generator=seeds(0), guidance_scale=scale, num_inference_steps=1, output_type="latent") for scale in (0, 1, 2)
    )
    torch.testing.assert_close(doubled, 2 * with_condition - without, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(without, with_condition, atol=1e-3)


def test_latents_replace_the_noise(pipe: CondPDiffPipeline) -> None:
    shape = pipe(PROMPT, output_type="latent").shape
    noise = torch.cat([torch.randn(shape, generator=rng) for rng in seeds(0, 1, 2)])
    before = noise.clone()
    assert torch.equal(params(pipe, generator=None, latents=noise), params(pipe))
    assert torch.equal(noise, before)
    assert torch.equal(params(pipe, generator=None, latents=noise.double()), params(pipe))


def test_output_types_fit_together(pipe: CondPDiffPipeline) -> None:
    options: dict[str, Any] = {"num_adapters": 2}
    output = pipe(PROMPT, generator=seeds(0, 1), **options)
    latents = pipe(PROMPT, generator=seeds(0, 1), output_type="latent", **options)
    flat = pipe(PROMPT, generator=seeds(0, 1), output_type="params", **options)
    assert torch.equal(output.latents, latents)
    assert torch.equal(pipe.decode(latents), flat)
    assert flat.shape == (2, pipe.template.layout.num_params)
    assert torch.equal(torch.stack([pipe.template.to_params(adapter) for adapter in output.adapters]), flat)
    fields = pipe(PROMPT, generator=seeds(0, 1), return_dict=False, **options)
    assert isinstance(fields, tuple)
    assert [same(*pair) for pair in zip(fields[0], output.adapters, strict=True)] == [True, True]
    assert fields[1:3] == (output.chosen, output.report)
    assert torch.equal(fields[3], latents)


def test_the_callback_sees_every_step_and_may_change_tensors(pipe: CondPDiffPipeline) -> None:
    calls = []

    def look(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        assert sender is pipe
        calls.append((step, int(timestep), sorted(tensors)))

    names = ("latents", "condition_embeddings")
    untouched = params(pipe, num_inference_steps=4, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [step for step, *_ in calls] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in calls] == pipe.scheduler.timesteps.tolist()
    assert {tuple(tensors) for *_, tensors in calls} == {tuple(sorted(names))}
    assert torch.equal(untouched, params(pipe, num_inference_steps=4))

    for name in names:

        def change(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor], name: str = name) -> dict[str, torch.Tensor]:
            return {name: torch.zeros_like(tensors[name])} if step == 1 else {}

        changed = params(pipe, num_inference_steps=4, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
        assert not torch.allclose(changed, untouched, atol=1e-5)


def test_the_callback_may_interrupt_and_the_next_call_runs_through(pipe: CondPDiffPipeline) -> None:
    seen = []

    def stop(sender: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        sender._interrupt = step == 1
        return tensors

    stopped = pipe(PROMPT, generator=seeds(0), callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 2
    assert torch.equal(stopped, seen[1])
    assert len(pipe(PROMPT, generator=seeds(0)).adapters) == 1
    assert not pipe.interrupt


def test_the_progress_bar_can_be_switched_off(pipe: CondPDiffPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    params(pipe)
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False)
    params(pipe, num_inference_steps=7)
    assert "7/7" in capfd.readouterr().err


# --- precision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.1), (torch.float64, 1e-5)])
@pytest.mark.parametrize("how", ["to", "load"])
def test_other_precisions_keep_constants_exact_and_give_float32(
    pipe: CondPDiffPipeline, tiny_generator: Path, dtype: torch.dtype, tolerance: float, how: str
) -> None:
    expected = pipe(PROMPT, num_adapters=2, generator=seeds(0, 1))
    other = pipe.to(dtype) if how == "to" else quiet(CondPDiffPipeline.from_pretrained(tiny_generator, dtype=dtype))
    assert other.unet.dtype == other.autoencoder.dtype == dtype
    noise = torch.cat([torch.randn(1, *expected.latents.shape[1:], generator=rng) for rng in seeds(0, 1)])  # what `expected` began with
    output = other(PROMPT, num_adapters=2, latents=noise)
    assert {adapter.tensors[key].dtype for adapter in output.adapters for key in adapter.tensors} == {torch.float32}
    constants = pipe.template.layout.constants
    assert constants == tuple(key for key in output.adapter.tensors if "lora_A" in key)
    for mine, theirs in zip(output.adapters, expected.adapters, strict=True):
        assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in constants)
        difference = pipe.template.to_params(mine) - pipe.template.to_params(theirs)
        assert difference.norm() < tolerance * pipe.template.to_params(theirs).norm()
    assert output.report.nearest[0].task == expected.report.nearest[0].task


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"num_adapters": value}, "num_adapters must be a whole number from 1 to 1000") for value in (0, -1, 1001, 1.0, True, "2", None)),
        *(({"num_inference_steps": value}, "num_inference_steps must be a whole number from 1 to 1000") for value in (0, 1001, 2.5, None)),
        *(({"guidance_scale": value}, "guidance_scale must be a number from 0 to 100") for value in (-0.1, 101, float("nan"), "2", None)),
        ({"generator": seeds(0, 1)}, "got 2 generators for 1 adapters; give one each"),
        ({"generator": []}, "got 0 generators for 1 adapters"),
        *(({"generator": value}, r"generator must be a torch\.Generator") for value in (5, "x", [5], [None])),
        ({"latents": torch.zeros(1, 1, 3)}, r"latents must be a tensor of shape \(1, 1, 10\), got"),
        ({"latents": torch.zeros(2, 1, 10)}, r"latents must be a tensor of shape \(1, 1, 10\), got"),
        ({"latents": [0.0] * 10}, r"latents must be a tensor of shape \(1, 1, 10\), got list"),
        ({"latents": torch.full((1, 1, 10), float("nan"))}, "lora_B.weight' holds NaN"),
        *(({"output_type": value}, "output_type must be") for value in ("pil", "np", None)),
        ({"callback_on_step_end_tensor_inputs": ["unet"]}, "callbacks can have"),
        ({"condition": ""}, "the task description is empty"),
        ({"condition": "the " * 300}, "302 tokens; the condition encoder reads 256"),
        *(({"condition": value}, "this generator reads a task description") for value in (None, 5, {"description": "x"})),
        *(({"condition": value}, "one condition a call, please") for value in (["x"], ("x", "y"), [PROMPT])),
    ],
)
def test_bad_arguments_are_refused(pipe: CondPDiffPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        pipe(**{"condition": PROMPT, **change})


def test_a_refusal_of_the_condition_is_a_condition_error(pipe: CondPDiffPipeline) -> None:
    for condition in ("", "the " * 300, None, [PROMPT]):
        with pytest.raises(ConditionError):
            pipe(condition)


# --- conditions and labels ---------------------------------------------------------------------------------------------------


def test_a_plain_string_is_a_description(pipe: CondPDiffPipeline) -> None:
    assert torch.equal(params(pipe, "Is the remark kind?"), params(pipe, TaskPrompt("Is the remark kind?")))


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
    order = sorted(range(8), key=lambda index: choice.scores[index].loss)
    assert output.chosen == choice.index == order[0]
    # The scores are those that a stranger measures on the saved folder.
    for index in (order[0], order[-1]):
        classifier = PrototypeClassifier.load(output.adapters[index].save(tmp_path / str(index)), examples=EXAMPLES)
        names, examples = classifier.example_embeddings()
        by_names, by_both = LOGIT_SCALE * examples @ names.T, held_out_logits(names, examples, classifier.targets)
        logits = by_both if choice.scores[index].with_examples else by_names
        assert choice.scores[index].accuracy == pytest.approx(right(logits, classifier.targets), abs=1e-4)
        assert choice.scores[index].loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, classifier.targets)), abs=1e-4)
    # It is a trained task, asked for with its labels.
    assert choice.strength == 1.0
    other = pipe(TaskPrompt(PROMPT.description, [(text, label + "!") for text, label in EXAMPLES]), num_adapters=2).report.choice
    assert {score.with_examples for score in other.scores} == {True}  # of an unknown one, unless names do better than examples


def right(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return float((logits.argmax(1) == targets).float().mean())


@pytest.mark.parametrize(
    ("condition", "count"),
    [(PROMPT, 1), (PROMPT.description, 3), (TaskPrompt("Is it?", labels=["no", "yes"]), 3)],
    ids=["one", "no examples", "labels only"],
)
def test_without_a_choice_the_first_is_taken_and_no_base_model_is_loaded(pipe: CondPDiffPipeline, condition: Any, count: int) -> None:
    output = pipe(condition, num_adapters=count)
    assert (output.chosen, output.report.choice, len(output.adapters)) == (0, None, count)
    assert pipe._base is None


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
from cond_pdiff.training.cli import main
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
