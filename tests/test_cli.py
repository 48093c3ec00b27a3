from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import tiny_recipe
from PIL import Image
from safetensors.torch import load_file, save_file

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier
from cond_pdiff.adapter import ADAPTER_FILES
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import load_text_to_image, make_pictures
from cond_pdiff.training.cli import main
from cond_pdiff.training.tasks import Task
from cond_pdiff.training.zoo import Zoo

DESCRIPTION = "Is the remark kind?"
EXAMPLES = ["--example", "the good film=positive", "--example", "the awful meal=negative"]


class Done(NamedTuple):
    status: int
    out: list[str]
    err: list[str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command; anything that it prints, libraries included, is caught."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Done(status, out.splitlines(), err.splitlines())

    return run


@pytest.fixture
def adapter(tiny_adapter: LoraAdapter, tmp_path: Path) -> Path:
    return tiny_adapter.save(tmp_path / "adapter")


def refused(done: Done, message: str) -> None:
    assert (done.status, done.out) == (1, [])
    (line,) = done.err
    assert line.startswith("cond-pdiff: error: ")
    assert message in line


# --- generate ----------------------------------------------------------------------------------------------------------------


def test_generate_writes_an_adapter_and_says_what_to_expect(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    done = run("generate", DESCRIPTION, *EXAMPLES, "--out", tmp_path / "a", "--generator", tiny_generator, "--num-adapters", 4, "--seed", 5)
    assert (done.status, done.err) == (0, [])
    report = {line[:11].strip(): line[11:] for line in done.out}
    assert list(report) == ["request", "nearest", "chosen", "labels", "adapter"]
    assert report["request"].startswith("in distribution (similarity 0.")
    assert report["nearest"].startswith("moods 0.")
    assert " of 4, accuracy " in report["chosen"]
    assert report["labels"] == "positive, negative (from the prompt)"
    assert report["adapter"] == str(tmp_path / "a")
    adapter = LoraAdapter.load(tmp_path / "a")
    assert adapter.metadata["seed"] == 5 + int(report["chosen"].split()[0]) - 1
    assert adapter.metadata["condition"]["examples"] == [["the good film", "positive"], ["the awful meal", "negative"]]


def test_seed_steps_and_guidance_reach_the_pipeline(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    variants = [[], ["--seed", 1], ["--steps", 3], ["--guidance-scale", 2], []]
    for index, options in enumerate(variants):
        assert run("generate", DESCRIPTION, "--out", tmp_path / str(index), "--generator", tiny_generator, *options).status == 0
    found = [(tmp_path / str(index) / "adapter_model.safetensors").read_bytes() for index in range(5)]
    assert len(set(found)) == 4
    assert found[0] == found[4]
    metadata = [LoraAdapter.load(tmp_path / str(index)).metadata for index in range(4)]
    assert (metadata[1]["seed"], metadata[2]["num_inference_steps"], metadata[3]["guidance_scale"]) == (1, 3, 2.0)


@pytest.mark.parametrize(
    ("example", "text", "label"),
    [
        ("a=b=c", "a=b", "c"),
        ("the film ||| the meal=same", ["the film", "the meal"], "same"),
        ("  кот 🐈 = да ", "кот 🐈", "да"),
        ("x=не-то_же", "x", "не-то_же"),
    ],
)
def test_examples_as_people_write_them(run: Any, tiny_generator: Path, tmp_path: Path, example: str, text: Any, label: str) -> None:
    options = ["--example", example, "--label", label, "--label", "other", "--out", tmp_path / "a", "--generator", tiny_generator]
    assert run("generate", "这是什么? 🐈", *options, "--num-adapters", 2).status == 0
    metadata = LoraAdapter.load(tmp_path / "a").metadata
    assert metadata["condition"]["examples"] == [[text, label]]
    assert metadata["labels"] == [label, "other"]


def test_a_request_far_from_everything_is_called_so(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    threshold = tmp_path / "generator" / "condition_index" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_generator, tmp_path / "generator")
    tensors = load_file(threshold)
    tensors["threshold"].fill_(1.5)
    save_file(tensors, threshold, {"format": "pt"})
    done = run("generate", DESCRIPTION, "--out", tmp_path / "a", "--generator", tmp_path / "generator")
    assert done.out[0].startswith("request    OUT OF DISTRIBUTION")
    assert "labels     none known; name them when classifying" in done.out


def test_long_examples_are_mentioned(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    options = ["--example", "the " * 1000 + "=no", "--label", "no", "--label", "yes", "--num-adapters", 1]
    done = run("generate", DESCRIPTION, *options, "--out", tmp_path / "a", "--generator", tiny_generator)
    assert "note       0 examples dropped, 1 texts cut at 256 tokens" in done.out


def test_force_replaces_an_adapter_and_nothing_else(run: Any, adapter: Path, tiny_generator: Path) -> None:
    before = (adapter / "adapter_model.safetensors").read_bytes()
    options = ["generate", DESCRIPTION, "--out", adapter, "--generator", tiny_generator]
    refused(run(*options), "is not empty")
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    (adapter / "thesis.doc").write_text("mine")
    refused(run(*options, "--force"), "thesis.doc")
    (adapter / "thesis.doc").unlink()
    assert run(*options, "--force").status == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() != before
    assert sorted(path.name for path in adapter.iterdir()) == sorted(ADAPTER_FILES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the task description is empty"),
        ([" \n"], "the task description is empty"),
        (["the " * 300], "302 tokens; the condition encoder reads 256: shorten it"),
        ([DESCRIPTION, "--example", "the good film"], "an example is written TEXT=LABEL, got 'the good film'"),
        ([DESCRIPTION, "--example", "=positive"], "the text of example 1 is empty"),
        ([DESCRIPTION, "--example", "good="], "the label of example 1 is empty"),
        ([DESCRIPTION, "--example", "a ||| b ||| c=x"], "a pair has two parts, got 3"),
        ([DESCRIPTION, "--example", "a ||| =x"], "the text of example 1, part 2 is empty"),
        ([DESCRIPTION, "--example", "good=positive"], "all examples have the label 'positive'"),
        ([DESCRIPTION, *EXAMPLES, "--label", "yes", "--label", "no"], "example 1 has the label 'positive', which is not among the labels"),
        ([DESCRIPTION, "--label", "yes"], "at least two labels"),
        ([DESCRIPTION, "--label", "yes", "--label", "yes"], "'yes' is given twice"),
        ([DESCRIPTION, "--num-adapters", 0], "num_adapters must be a whole number from 1 to 1000"),
        ([DESCRIPTION, "--num-adapters", -3], "num_adapters must be a whole number from 1 to 1000"),
        ([DESCRIPTION, "--num-adapters", 10**12], "num_adapters must be a whole number from 1 to 1000"),
        ([DESCRIPTION, "--steps", 0], "num_inference_steps must be"),
        ([DESCRIPTION, "--guidance-scale", "nan"], "guidance_scale must be"),
        ([DESCRIPTION, "--seed", -1], "seed must be a non-negative 63-bit number"),
        ([DESCRIPTION, "--seed", 2**64], "seed must be a non-negative 63-bit number"),
        (["\udcff broken"], "lone surrogates"),
        ([DESCRIPTION, "--generator", "cond-pdiff/nope"], "no bundled generator is called 'cond-pdiff/nope'"),
        ([DESCRIPTION, "--generator", "nobody/gone"], "nobody/gone is not in the cache and the Hub cannot be reached"),
        ([DESCRIPTION, "--generator", "not a name"], "neither a folder nor a Hub repository name"),
    ],
)
def test_generate_refuses_on_one_line_and_writes_nothing(
    run: Any, tiny_generator: Path, tmp_path: Path, arguments: list[Any], message: str
) -> None:
    generator = [] if "--generator" in arguments else ["--generator", tiny_generator]
    refused(run("generate", *arguments, *generator, "--out", tmp_path / "new" / "a"), message)
    assert list(tmp_path.iterdir()) == []


def test_a_generator_that_is_something_else_is_refused_on_one_line(run: Any, adapter: Path, tiny_generator: Path, tmp_path: Path) -> None:
    refused(run("generate", DESCRIPTION, "--out", tmp_path / "a", "--generator", adapter), "it looks like a peft adapter")
    broken = Path(shutil.copytree(tiny_generator, tmp_path / "broken"))
    (broken / "unet" / "cond_pdiff.py").write_text("1/0")
    refused(run("generate", DESCRIPTION, "--out", tmp_path / "a", "--generator", broken), "cannot be loaded")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_in_the_way_is_named(run: Any, tiny_generator: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    refused(run("generate", DESCRIPTION, "--out", tmp_path / where, "--generator", tiny_generator), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


# --- classify ----------------------------------------------------------------------------------------------------------------

TEXTS = ["the good film", "the awful meal", "кот 🐈‍⬛", "the film ||| the meal", "两个猫", "the " * 25_000]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (90, 60), (230, 60, 30)).save(path)
    return path


def test_a_picture_gives_an_adapter_and_previews(
    run: Any, style_generator: Path, style_zoo: Zoo, picture: Path, tmp_path: Path
) -> None:
    done = run("generate", "--image", picture, "--generator", style_generator, "--out", tmp_path / "embers", "--seed", 3)
    assert done.status == 0, done.err
    assert done.out[-1] == f"adapter    {tmp_path / 'embers'}"
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    expected = pipe(picture, generator=[torch.Generator().manual_seed(3)]).adapter
    adapter = LoraAdapter.load(tmp_path / "embers")
    assert all(torch.equal(adapter.tensors[key], value) for key, value in expected.tensors.items())

    prompts = ["--prompt", "a red house", "--prompt", "a blue boat on the sea at night"]
    done = run("preview", tmp_path / "embers", *prompts, "--steps", 2)
    assert (done.status, done.out) == (0, [f"pictures   {tmp_path / 'embers-preview.png'}"]), done.err
    base = load_text_to_image(pipe.template.base)
    with Image.open(tmp_path / "embers-preview.png") as opened:
        sheet = opened.convert("RGB")
    for row, adapters in enumerate(([], [(adapter, 1.0)])):
        made = make_pictures(base, ["a red house", "a blue boat on the sea at night"], adapters, num_inference_steps=2)
        for column, image in enumerate(made):
            left, top = 8 + 200 * column, 28 + 220 * row
            cell = sheet.crop((left, top, left + 192, top + 192)).resize((64, 64), Image.Resampling.BOX)
            assert cell.tobytes() == image.tobytes()

    refused(run("preview", tmp_path / "embers", *prompts), "is already there")
    mixed = run("preview", tmp_path / "embers", *prompts, "--mix", tmp_path / "embers", "0.5", "--steps", 2, "--force")
    assert mixed.status == 0, mixed.err
    with Image.open(tmp_path / "embers-preview.png") as opened:
        assert opened.size == sheet.size
    way = ["--towards", style_zoo.runs("lagoon")[0].folder, "--steps", 2, "--out", tmp_path / "way.png"]
    done = run("preview", style_zoo.runs("embers")[0].folder, *prompts, *way)
    assert done.status == 0, done.err
    with Image.open(tmp_path / "way.png") as opened:
        assert opened.size == (8 + 6 * 200, 8 + 2 * 220 + 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "say what to decide, or show a style"),
        (["generate", DESCRIPTION, "--image", "picture.png"], "not both"),
        (["generate", "--image", "picture.png", *EXAMPLES], "not both"),
        (["generate", "--image", "gone.png"], "there is no image file"),
    ],
)
def test_a_picture_and_a_description_exclude_each_other(run: Any, tmp_path: Path, arguments: list[Any], message: str) -> None:
    refused(run(*arguments, "--out", tmp_path / "a"), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "none of them empty"),
        (["--prompt", "a house", "--steps", 1], "num_inference_steps must be a whole number from 2 to 1000"),
        (["--prompt", "a house", "--scale", "nan"], "must be finite"),
        (["--prompt", "a house", "--seed", -1], "seed must be a non-negative"),
        (["--prompt", "a house", "--mix", "other", "much"], "must be a number, got 'much'"),
        (["--prompt", "a house", "--mix", "other", "1"], "other"),
    ],
)
def test_preview_refuses_and_writes_nothing(
    run: Any, style_zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("preview", style_zoo.runs("embers")[0].folder, *options, "--out", tmp_path / "preview.png"), message)
    assert list(tmp_path.iterdir()) == []


def test_make_styles_says_how_many(run: Any, picture: Path, tmp_path: Path) -> None:
    done = run("make-styles", "--images", picture.parent, "--out", tmp_path / "styles", "--train", 1, "--test", 1)
    assert (done.status, done.out) == (0, [f"1 styles in {tmp_path / 'styles'}"]), done.err
    refused(run("make-styles", "--images", tmp_path / "gone", "--out", tmp_path / "styles"), "no PNG, JPEG or WebP pictures")


def test_classify_gives_a_line_a_text(run: Any, adapter: Path) -> None:
    done = run("classify", adapter, *TEXTS)
    assert done.status == 0
    assert done.err == [f"note: 1 of {len(TEXTS)} texts longer than 128 tokens; the rest of them is not read"]
    classifier = PrototypeClassifier.load(adapter)
    pairs = [(a, b) for a, _, b in (text.partition(" ||| ") for text in TEXTS)]
    logits = classifier.logits([pair if pair[1] else pair[0] for pair in pairs]).softmax(1)
    for line, text, row in zip(done.out, TEXTS, logits, strict=True):
        best = int(row.argmax())
        assert line.split()[:2] == [classifier.labels[best], f"{row[best]:.0%}"]
        assert line.endswith(text[:100].rstrip() if len(text) < 100 else text[:100])


def test_classify_takes_other_labels_and_another_base_folder(
    run: Any, tiny_adapter: LoraAdapter, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    moved = replace(tiny_adapter, spec=replace(tiny_adapter.spec, base_model="nobody/gone"), metadata={})
    folder = moved.save(tmp_path / "adapter")
    refused(run("classify", folder, "good"), "records no labels; name them (labels=[…], or --label on the command line)")
    labels = ["--label", "cat", "--label", "dog"]
    refused(run("classify", folder, "good", *labels), "nobody/gone is not in the cache")
    done = run("classify", folder, "cat", "dog", *labels, "--base", tiny_backbone.repo_id)
    assert [line.split()[0] for line in done.out] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good", ""], "text 2 is empty"),
        (["a ||| b ||| c"], "a pair has two parts, got 3"),
        (["x" * 200_001], "text 1 has 200001 characters; at most 200000 are accepted"),
        (["\udcff"], "lone surrogates"),
        (["good", "--label", "one"], "at least two labels"),
        (["good", "--base", "nobody/gone"], "nobody/gone"),
    ],
)
def test_classify_refuses(run: Any, adapter: Path, arguments: list[str], message: str) -> None:
    refused(run("classify", adapter, *arguments), message)


def test_classify_refuses_what_is_no_adapter(run: Any, adapter: Path, tiny_generator: Path, tmp_path: Path) -> None:
    refused(run("classify", tmp_path / "gone", "good"), "no adapter folder at")
    refused(run("classify", tiny_generator, "good"), "no adapter folder at")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(run("classify", adapter, "good"), "is not a complete safetensors file")


def test_demo_compares_with_the_base_model(run: Any, tiny_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cond_pdiff.training.cli.DEFAULT_GENERATOR", str(tiny_generator))
    done = run("demo")
    assert (done.status, done.err) == (0, [])
    (header,) = (index for index, line in enumerate(done.out) if line.startswith("base model "))
    rows = done.out[header + 1 :]
    assert len(rows) == 6
    assert all(row[0] in "✓✗" and row[19] in "✓✗" for row in rows)


# --- collect, train, evaluate, import-task -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    """The tiny recipe, smaller still, as a file."""
    recipe = tiny_recipe(tiny_backbone)
    recipe["collect"].update(steps=2, runs=1)
    for stage in ("autoencoder", "unet"):
        recipe[stage]["fit"]["steps"] = 2
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def test_from_tasks_to_a_generator_with_a_card(run: Any, recipe: Path, tasks_folder: Path, tmp_path: Path) -> None:
    zoo, runs, results = tmp_path / "zoo", tmp_path / "run", tmp_path / "results"
    data = ["--tasks", tasks_folder, "--zoo", zoo]
    for shard, count in (("1/2", 1), ("0/2", 3)):  # 3 jobs: two tasks, one unseen; and the multi-task baseline
        done = run("collect", "--recipe", recipe, *data, "--shard", shard)
        assert done.status == 0
        assert done.out[-1].endswith(f" adapters in {zoo}")
        assert len(list(zoo.glob("tasks/*/run-0/run.json"))) >= count
    assert done.out[-1].startswith("3 adapters")
    assert (zoo / "multitask" / "run.json").is_file()

    done = run("train", "--recipe", recipe, *data, "--out", runs)
    assert (done.status, done.out[-1]) == (0, f"generator  {runs / 'generator'}")
    done = run("evaluate", runs / "generator", *data, "--out", results, "--samples", 2, "--max-rows", 5, "--steps", 2, "--card")
    assert done.status == 0
    assert done.out[0] == "# Evaluation"
    assert done.out[-1] == f"card       {runs / 'generator' / 'README.md'}"
    assert json.loads((results / "evaluation.json").read_text())["settings"]["samples"] == 2
    done = run("generate", DESCRIPTION, "--generator", runs / "generator", "--out", tmp_path / "a")
    assert done.status == 0


def test_a_part_of_the_evaluation_says_so(run: Any, tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    options = ["--zoo", tiny_zoo, "--tasks", tasks_folder, "--out", tmp_path, "--samples", 1, "--max-rows", 2, "--steps", 1]
    done = run("evaluate", tiny_generator, *options, "--shard", "2/3")
    assert (done.status, len(done.out)) == (0, 1)
    assert done.out[0].startswith("this shard is done; tasks of other shards are missing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--recipe", "nonsense", "--tasks", "TASKS", "--zoo", "NEW"], "no recipe 'nonsense'"),
        (["collect", "--tasks", "GONE", "--zoo", "NEW"], "is not a folder of tasks"),
        (["collect", "--tasks", "TASKS", "--zoo", "NEW"], "is not a task folder: meta.json is missing"),
        (["collect", "--recipe", "RECIPE", "--tasks", "TASKS", "--zoo", "TASKS"], "is not ours to replace"),
        (["train", "--recipe", "RECIPE", "--tasks", "TASKS", "--zoo", "GONE", "--out", "NEW"], "is not a zoo: zoo.json is missing"),
        (["train", "--recipe", "RECIPE", "--tasks", "GONE", "--zoo", "ZOO", "--out", "NEW"], "is not a folder of tasks"),
        (["evaluate", "nobody/gone", "--tasks", "TASKS", "--zoo", "ZOO", "--out", "NEW"], "nobody/gone is not in the cache"),
        (["evaluate", "GENERATOR", "--tasks", "TASKS", "--zoo", "GONE", "--out", "NEW"], "is not a zoo"),
        (["evaluate", "GENERATOR", "--tasks", "GONE", "--zoo", "ZOO", "--out", "NEW"], "is not a folder of tasks"),
        (["evaluate", "GENERATOR", "--tasks", "TASKS", "--zoo", "ZOO", "--out", "NEW", "--max-rows", "0"], "max_rows must be"),
        (["import-task", "GONE", "--description", "Is it?", "--text-column", "text", "--out", "NEW"], "gone"),
        (["import-task", "TASKS", "--description", "Is it?", "--text-column", "body", "--out", "NEW"], "TASKS"),
    ],
)
def test_other_commands_refuse_and_write_nothing(
    run: Any,
    recipe: Path,
    tiny_generator: Path,
    tiny_zoo: Path,
    tasks_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    new, gone = tmp_path / "new", tmp_path / "gone"
    places = {"RECIPE": recipe, "TASKS": tasks_folder, "ZOO": tiny_zoo, "GENERATOR": tiny_generator, "NEW": new, "GONE": gone}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert (done.status, done.out) == (1, [])
    assert [line for line in done.err if line.startswith("cond-pdiff: error: ")] == done.err[-1:]
    assert str(places.get(message, message)) in done.err[-1]
    assert not new.exists()
    assert not gone.exists()


def test_import_task_makes_a_task_folder(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.csv").write_text("text,other,mood\ngood,x,kind\nbad,y,unkind\n")
    (tmp_path / "source" / "test.csv").write_text("text,other,mood\nfine,x,kind\n")
    options = ["import-task", tmp_path / "source", "--description", "Is it kind?", "--text-column", "text", "--label-column", "mood"]
    done = run(*options, "--out", tmp_path / "tasks" / "films")
    assert (done.status, done.out) == (0, [f"task       {tmp_path / 'tasks' / 'films'} with the labels kind, unkind"])
    assert Task.load(tmp_path / "tasks" / "films").rows("test") == [("fine", 0)]
    refused(run(*options, "--out", tmp_path / "tasks" / "films"), "is not empty")
    pairs = run(*options, "--text-column", "other", "--out", tmp_path / "tasks" / "pairs")
    assert pairs.status == 0
    assert Task.load(tmp_path / "tasks" / "pairs").rows("train")[0] == (("good", "x"), 0)


# --- the command itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["generate", "x"],
        ["generate", "x", "--out", "a", "--steps", "many"],
        *(["collect", "--tasks", "t", "--zoo", "z", "--shard", shard] for shard in ("2/2", "-1/2", "1", "a/b", "0/0")),
    ],
)
def test_misuse_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: cond-pdiff")


def test_ctrl_c_is_no_traceback(run: Any, tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cond_pdiff.adapter.LoraAdapter.save", stop)
    done = run("generate", DESCRIPTION, "--generator", tiny_generator, "--out", tmp_path / "a")
    assert (done.status, done.out) == (130, [])
    assert done.err == ["cond-pdiff: interrupted; finished parts are kept, run the same command again to go on"]


HELP = """
import sys
from cond_pdiff.training.cli import main
for command in ([], ["generate"], ["collect"], ["train"], ["evaluate"], ["import-task"], ["classify"], ["demo"]):
    try:
        main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print(*sorted({"torch", "diffusers", "transformers", "peft", "accelerate", "open_clip", "datasets", "numpy"} & set(sys.modules)))
"""


def test_help_is_instant() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: cond-pdiff") == 8
    assert done.stdout.splitlines()[-1] == ""
