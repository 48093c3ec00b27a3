"""From a folder of adapters in many forms to a generator, and from it back to a file that the tool reads."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import HIDDEN, refused, same, told
from PIL import Image
from safetensors.torch import save_file
from test_formats import ATTENTION, made

from cond_pdiff import CondPDiffPipeline, LoraAdapter
from cond_pdiff.canonical import canonical
from cond_pdiff.conditions.vector import Vector
from cond_pdiff.errors import AdapterError, ConditionError, CondPDiffError, OutputExistsError, TaskDataError
from cond_pdiff.formats.lora_file import read_adapter
from cond_pdiff.formats.lora_writer import save_lora_file
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.models.vector_encoder import VectorConditionEncoder
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.zoo.import_adapters import import_adapters, update_error
from cond_pdiff.training.zoo.push import write_zoo_card
from cond_pdiff.training.zoo.zoo import Zoo

FORMS = ("diffusers", "kohya", "peft", "comfyui")
COUNT = 6


def variant(seed: int, rank: int = 2) -> LoraAdapter:
    """A random adapter of the tiny U-Net, attention and convolutions."""
    adapter = made(tiny_pipelines.stable_diffusion(), ("attn2.to_k", "attn2.to_v", "conv2"), rank, alpha=3.0, skip="up_blocks")
    rng = torch.Generator().manual_seed(seed)
    return replace(adapter, tensors={key: 0.3 * torch.randn(tensor.shape, generator=rng) for key, tensor in adapter.tensors.items()})


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[LoraAdapter]]:
    """Six adapters of two ranks in four forms, and a vector for each."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "adapters").mkdir()
    adapters = [variant(seed, rank=2 + seed % 2) for seed in range(COUNT)]
    for place, adapter in enumerate(adapters):
        form = FORMS[place % len(FORMS)]
        name = folder / "adapters" / f"style-{place}"
        if form == "peft":
            adapter.save(name)
        else:
            save_lora_file(adapter, name.with_suffix(".safetensors"), form)
        np.save(folder / f"{place}.npy", np.random.default_rng(place).normal(size=4))
    write_table(folder / "vectors.csv", [{"name": f"style-{place}", "vector": f"{place}.npy"} for place in range(COUNT)])
    return folder, adapters


@pytest.fixture(scope="module")
def zoo(given: tuple[Path, list[LoraAdapter]]) -> Zoo:
    folder, _ = given
    return import_adapters(folder / "adapters", folder / "vectors.csv", folder / "zoo")


FIT = {"batch_size": 6, "warmup_steps": 5, "learning_rate": 3e-3}


def recipe(encoder: dict[str, Any], steps: int = 300) -> dict[str, Any]:
    return {
        "autoencoder": {
            "model": {"encoder_channels": [4], "decoder_channels": [4], "stride": 2, "latent_dim": 8}, "normalizer": "batch",
            "fit": {**FIT, "steps": steps},
        },
        "unet": {
            "denoiser": {"type": "ParamUNet1D", "block_out_channels": [16, 16]}, "conditions_per_task": 2, "condition_encoder": encoder,
            "fit": {**FIT, "steps": steps},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def generator(zoo: Zoo) -> Path:
    return train(recipe({"type": "VectorConditionEncoder", "condition_dim": 4}), zoo.folder, None, zoo.folder.parent / "run")


def test_every_form_gives_the_same_canonical_adapters(zoo: Zoo, given: tuple[Path, list[LoraAdapter]]) -> None:
    assert (zoo.family.name, zoo.facts["condition"], zoo.facts["lora"]["rank"]) == ("stable-diffusion", "vector", 3)
    assert zoo.base == Backbone("tiny")
    assert not zoo.missing
    for place, adapter in enumerate(given[1]):
        (run,) = zoo.runs(f"style-{place}")
        assert run.facts["delta_error"] < 1e-6
        assert update_error(adapter, run.adapter()) < 1e-6
        assert f"Imported from `style-{place}" in (run.folder / "README.md").read_text(encoding="utf-8")
        right = canonical(adapter, rank=3)
        for key, tensor in run.adapter().tensors.items():
            torch.testing.assert_close(tensor, right.tensors[key], atol=1e-5, rtol=1e-4)
    card = write_zoo_card(zoo, "nobody/zoo").read_text(encoding="utf-8")
    assert "trained elsewhere" in card
    assert "--tasks" not in card
    (zoo.folder / "README.md").unlink()


def test_from_a_vector_to_a_file_that_diffusers_loads(
    run: Any, generator: Path, given: tuple[Path, list[LoraAdapter]], tmp_path: Path
) -> None:
    folder, adapters = given
    out = tmp_path / "generated"
    assert run("generate", "--vector", folder / "2.npy", "--generator", generator, "--out", out).status == 0
    made_here = LoraAdapter.load(out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "from a vector of 4 numbers" in card
    assert "tokens, in training" not in card
    errors = [update_error(canonical(adapter, 3), made_here) for adapter in adapters]
    assert min(range(COUNT), key=errors.__getitem__) == 2
    pipe = tiny_pipelines.stable_diffusion()
    with made_here.attached(pipe):
        right = tiny_pipelines.denoised(pipe)
    for form in ("diffusers", "kohya"):
        assert run("convert", out, "--to", form, "--out", tmp_path / f"{form}.safetensors").status == 0
        loaded = tiny_pipelines.stable_diffusion()
        loaded.load_lora_weights(tmp_path / f"{form}.safetensors")
        torch.testing.assert_close(tiny_pipelines.denoised(loaded), right, atol=1e-5, rtol=1e-4)
    assert run("verify", out, "--generator", generator).status == 0


def test_an_encoder_that_does_not_fit_is_told_before_anything_is_trained(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(ConditionError, match="reads vectors of 9 numbers, got 4"):
        train(recipe({"type": "VectorConditionEncoder", "condition_dim": 9}), zoo.folder, None, tmp_path / "run")
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_updates_are_evaluated_without_the_base(run: Any, zoo: Zoo, generator: Path, tmp_path: Path) -> None:
    options = ["--zoo", zoo.folder, "--out", tmp_path, "--samples", 2, "--steps", 5]
    evaluation = told(run("evaluate", generator, *options, "--json"))
    means = evaluation["zoo"]
    assert means["routing"] == 1.0
    assert means["error"]["mean"] < means["error"]["base"] == 1.0  # random adapters: what a tiny generator makes is farther from its own
    assert {"generated", "decoded", "neighbour", "retrieval"} <= set(means["error"])
    report = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "What the adapters do with the base model is not measured." in report
    assert "routing 100.0% of 30 samples" in report
    refused(run("evaluate", generator, *options, "--card"), "no card tells how its adapters were trained")


def test_any_base_and_texts(tiny_backbone: Backbone, tmp_path: Path, run: Any) -> None:
    """A model that no family knows, its adapters without any metadata; conditions in words, two for one of them."""
    (tmp_path / "adapters").mkdir()
    rng = torch.Generator().manual_seed(0)
    texts = {"calm": ["a lake in the morning", "still water"], "wild": ["a storm at sea"], "dry": ["sand and stones"]}
    for name in texts:
        tensors = {f"blocks.{place}.mixer.weird_proj.lora_{factor}.weight": torch.randn(shape, generator=rng)
                   for place in range(2) for factor, shape in (("A", (2, 8)), ("B", (6, 2)))}  # fmt: skip
        save_file(tensors, tmp_path / "adapters" / f"{name}.safetensors")
    table = tmp_path / "texts.jsonl"
    table.write_text("\n".join(json.dumps({"file": f"{name}.safetensors", "text": shown}) for name, shown in texts.items()))
    refused(run("import-adapters", tmp_path / "adapters", "--conditions", table, "--zoo", tmp_path / "zoo"), "do not name their base model")
    options = ["--conditions", table, "--zoo", tmp_path / "zoo", "--base", "someone/strange", "--json"]
    facts = told(run("import-adapters", tmp_path / "adapters", *options))
    assert facts["largest_error"] < 1e-6
    assert {**facts, "largest_error": 0} == {
        "zoo": str(tmp_path / "zoo"), "adapters": 3, "condition": "task-prompt", "family": "other-base", "rank": 2, "largest_error": 0
    }  # fmt: skip
    encoder = {"type": "SentenceConditionEncoder", "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(encoder, steps=4)))
    train_options = ["--recipe", tmp_path / "recipe.json", "--zoo", tmp_path / "zoo", "--out", tmp_path / "run"]
    made_generator = told(run("train", *train_options, "--json"))["generator"]
    pipe = CondPDiffPipeline.from_pretrained(made_generator)
    adapter = pipe("still water").adapter
    assert adapter.family is not None
    assert adapter.family.name == "other-base"
    with pytest.raises(CondPDiffError, match="'someone/strange' is of no family of base models that is loaded here"):
        pipe.base_model()
    with pytest.raises(AdapterError, match="no tool's single files are known"):
        save_lora_file(adapter, tmp_path / "x.safetensors", "diffusers")
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for block in model.blocks:
        block.mixer = torch.nn.Module()
        block.mixer.weird_proj = torch.nn.Linear(8, 6)
    with adapter.attached(model):
        changed = model.blocks[0].mixer.weird_proj(torch.ones(1, 8))
    assert not torch.equal(changed, model.blocks[0].mixer.weird_proj(torch.ones(1, 8)))


def test_pictures_are_kept_in_the_zoo(given: tuple[Path, list[LoraAdapter]], tmp_path: Path) -> None:
    folder, _ = given
    rows = []
    for place in range(COUNT):
        for view in range(2):
            pixels = np.random.default_rng(10 * place + view).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{place}-{view}.png")
            rows.append({"file": f"style-{place}", "image": f"{place}-{view}.png", "licence": "CC0-1.0"})
    zoo = import_adapters(folder / "adapters", write_table(tmp_path / "pictures.csv", rows), tmp_path / "zoo", rank=4)
    for place in range(COUNT):
        for view in range(2):
            (tmp_path / f"{place}-{view}.png").unlink()
    tasks = zoo.load_tasks(None, zoo.task_names)
    assert zoo.facts["condition"] == "style-image"
    assert zoo.facts["tasks"]["style-0"]["licence"] == "CC0-1.0"
    shown = tasks[0].conditions(6)
    assert [condition.image.size for condition in shown[:2]] == [(50, 40), (50, 40)]
    assert len({condition.sha256 for condition in shown}) == 6  # two pictures, then crops of them
    encoder = {"type": "StyleCnnConditionEncoder", "channels": [4, 8], "condition_dim": 8, "image_side": 32}
    made_generator = train({**recipe(encoder, steps=3)}, zoo.folder, None, tmp_path / "run")
    config = EvaluateConfig(samples=1, num_inference_steps=2)
    assert evaluate(made_generator, zoo.folder, None, tmp_path / "evaluation", config)
    (zoo.folder / "conditions" / "style-0-0.png").unlink()
    with pytest.raises(TaskDataError, match=r"conditions\.json is malformed: ConditionError"):
        zoo.load_tasks(None, zoo.task_names)


def test_a_collected_zoo_needs_its_tasks(tiny_zoo: Path) -> None:
    with pytest.raises(TaskDataError, match=r"does not hold its conditions, as an imported zoo does; name the folder of its tasks"):
        Zoo(tiny_zoo).load_tasks(None, ["moods"])


def test_adapters_of_text_tasks_are_measured_by_their_tasks(tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    """Where a family has an evaluator, and there are tasks of the adapters' names, quality is measured as of a collected zoo."""
    (tmp_path / "adapters").mkdir()
    for name in ("moods", "animals"):
        Zoo(tiny_zoo).runs(name)[0].adapter().save(tmp_path / "adapters" / name)
    table = write_table(tmp_path / "t.csv", [{"name": name, "text": f"the {name}"} for name in ("moods", "animals")])
    zoo = import_adapters(tmp_path / "adapters", table, tmp_path / "zoo")
    assert zoo.family.name == "sentence-encoder"
    assert zoo.base.repo_id == Zoo(tiny_zoo).base.repo_id
    with zoo.runs("moods")[0].adapter().attached(zoo.family.load_adapted(zoo.base)):
        pass
    encoder = {"type": "SentenceConditionEncoder", "backbone": zoo.base.to_json(), "embedding_dim": HIDDEN}
    made_generator = train(recipe(encoder, steps=3), zoo.folder, tasks_folder, tmp_path / "run")
    config = EvaluateConfig(samples=1, max_rows=6, num_inference_steps=2)
    evaluation = evaluate(made_generator, zoo.folder, tasks_folder, tmp_path / "evaluation", config)
    assert evaluation is not None
    assert "trained" in evaluation["zoo"]["accuracy"]


def test_wrong_tables_and_adapters_are_refused(given: tuple[Path, list[LoraAdapter]], tmp_path: Path) -> None:
    folder, adapters = given
    (tmp_path / "adapters").mkdir()
    save_lora_file(adapters[0], tmp_path / "adapters" / "one.safetensors", "kohya")

    def refused_table(message: str, *rows: dict[str, Any], error: type[Exception] = TaskDataError) -> None:
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(error, match=message):
            import_adapters(tmp_path / "adapters", tmp_path / "t.jsonl", tmp_path / "zoo")
        assert not (tmp_path / "zoo").exists()

    refused_table("has no rows")
    refused_table("expected the adapter's name in a column name or file, got text", {"text": "x"})
    refused_table("there is no adapter 'two'", {"name": "two", "text": "x"})
    refused_table("is not in", {"name": "../one", "text": "x"})
    refused_table("row 1: expected one of image, text, vector, got none of them", {"name": "one"})
    refused_table("got text and vector", {"name": "one", "text": "x", "vector": [1, 2]})
    refused_table("row 1: there is no image file", {"name": "one", "image": "none.png"})
    refused_table("row 1: a vector is numbers in a row", {"name": "one", "vector": [["x"]]})
    two = {"name": "one", "text": "x"}, {"name": "one", "vector": [1]}
    refused_table("conditions are of one kind, these are a task-prompt and a vector", *two)
    refused_table("a vector of 1 numbers and a vector of 2 numbers", {"name": "one", "vector": [1]}, {"name": "one", "vector": [1, 2]})
    refused_table("there is no adapter", {"name": "x" * 300, "text": "x"})
    (tmp_path / "adapters" / "more").mkdir()
    save_lora_file(adapters[1], tmp_path / "adapters" / "more" / "one.safetensors", "kohya")
    refused_table("are two adapters of one name, 'one'; rename", {"name": "one", "text": "x"}, {"name": "more/one", "text": "y"})
    other = made(tiny_pipelines.stable_diffusion(), ATTENTION)
    save_lora_file(other, tmp_path / "adapters" / "other.safetensors", "kohya")
    refused_table("has no row for 1 of the adapters in .*: other", {"name": "one", "text": "x"})
    both = {"name": "one", "text": "x"}, {"name": "other", "text": "y"}
    refused_table("do not adapt the same modules of one base", *both, error=AdapterError)
    save_lora_file(replace(adapters[1], spec=replace(adapters[1].spec, base_model="another")), tmp_path / "adapters" / "other.safetensors",
                   "kohya", overwrite=True)  # fmt: skip
    refused_table(r"name several base models \(another, tiny\); say which it is", *both, error=AdapterError)
    (tmp_path / "t.csv").write_text("who,text\none,x\n")
    with pytest.raises(TaskDataError, match="got who, text"):
        import_adapters(tmp_path / "adapters", tmp_path / "t.csv", tmp_path / "zoo")
    with pytest.raises(AdapterError, match="an update of rank 2 does not fit into rank 1"):
        import_adapters(folder / "adapters", folder / "vectors.csv", tmp_path / "zoo", rank=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputExistsError, match="is not empty"):
        import_adapters(folder / "adapters", folder / "vectors.csv", tmp_path / "full")


def test_json_tables_and_the_base_s_revision(given: tuple[Path, list[LoraAdapter]], tmp_path: Path) -> None:
    rows = [{"name": f"style-{place}", "text": f"one\u2028{place}"} for place in range(COUNT)]
    for place, adapter in enumerate(given[1]):
        pinned = {"base": {"repo_id": "tiny", "revision": "abc"}}
        replace(adapter, metadata=pinned).save(tmp_path / "adapters" / f"style-{place}")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    for table in ("t.jsonl", "t.json"):
        zoo = import_adapters(tmp_path / "adapters", tmp_path / table, tmp_path / f"zoo-of-{table}")
        assert list(zoo.task_names) == [f"style-{place}" for place in range(COUNT)]
        assert zoo.base == Backbone("tiny", "abc")


def test_vectors(tmp_path: Path) -> None:
    one = Vector.of([1, 2, 3])
    assert torch.equal(Vector.from_json(json.loads(json.dumps(one.to_json()))).numbers, one.numbers)
    np.save(tmp_path / "v.npy", np.array([1, 2, 3]))
    save_file({"v": torch.tensor([1.0, 2, 3])}, tmp_path / "v.safetensors")
    for given in (one, np.array([1.0, 2, 3]), torch.tensor([1, 2, 3]), tmp_path / "v.npy", str(tmp_path / "v.safetensors")):
        assert torch.equal(Vector.of(given).numbers, one.numbers)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    save_file({"v": torch.zeros(1), "w": torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / "v.txt").write_text("1 2 3")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "complex.npy", np.array([1 + 2j]))
    np.savez(tmp_path / "many.npz", a=np.ones(2))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    for wrong, message in (
        ([float("nan")], "finite numbers"), ([], "finite numbers"), (["x"], "numbers in a row"), (3.0, "got a float"),
        ([10**400], "numbers in a row"), (tmp_path / "empty.npy", "cannot be read as a vector"),
        (tmp_path / "complex.npy", "no array of real numbers"), (tmp_path / "many.npy", "no array of real numbers"),
        (tmp_path / "objects.npy", "cannot be read as a vector"), (tmp_path / "none.npy", "is no file"),
        (tmp_path / "two.safetensors", "holds 2 tensors"), (tmp_path / "v.txt", r"from \.npy and \.safetensors files"),
    ):  # fmt: skip
        with pytest.raises(ConditionError, match=message):
            Vector.of(wrong)
    encoder = VectorConditionEncoder(3)
    encoder.fit_center([[1.0, 5.0, 100.0], [3.0, 5.0, -100.0]])
    rows, _ = encoder.encode([[1.0, 5.0, 100.0], [3.0, 5.0, -100.0]])
    torch.testing.assert_close(rows, torch.tensor([[-1.0, 0, 1], [1, 0, -1]]) / 2**0.5)
    with pytest.raises(ConditionError, match="reads vectors of 3 numbers, got 2"):
        encoder.encode([[1.0, 2.0]])


def test_a_zoo_of_the_same_adapters_has_the_same_bytes(given: tuple[Path, list[LoraAdapter]], zoo: Zoo, tmp_path: Path) -> None:
    again = import_adapters(given[0] / "adapters", given[0] / "vectors.csv", tmp_path / "zoo")
    for name in zoo.task_names:
        assert same(again.runs(name)[0].adapter(), zoo.runs(name)[0].adapter())
    assert isinstance(LoraSpec.from_json(again.facts["lora"]), LoraSpec)
    assert read_adapter(again.run_folder("style-0", 0)).spec.scaling == 1
