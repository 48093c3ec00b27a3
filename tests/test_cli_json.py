"""With --json, a command prints one JSON value and nothing else on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, told
from PIL import Image

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier, TaskPrompt
from cond_pdiff.cli import command
from cond_pdiff.demo import SENTENCES
from cond_pdiff.sampling import seeded

EXAMPLES = [("the good film", "positive"), ("the awful meal", "negative")]
GENERATE = ["generate", "Is the remark kind?", *(part for text, label in EXAMPLES for part in ("--example", f"{text}={label}"))]


def leaves(group: Any) -> Iterator[Any]:
    for one in group.commands.values():
        if hasattr(one, "commands"):
            yield from leaves(one)
        else:
            yield one


def test_every_command_can_tell_json() -> None:
    assert [one.name for one in leaves(command) if not any("--json" in param.opts for param in one.params)] == []


def test_generate_tells_its_report(run: Any, tiny_generator: Path, tmp_path: Path) -> None:
    options = ["--generator", tiny_generator, "--num-adapters", 3, "--seed", 5, "--json"]
    done = run(*GENERATE, *options, "--out", tmp_path / "a")
    facts = told(done)
    assert done.err == []
    pipe = CondPDiffPipeline.from_pretrained(tiny_generator)
    output = pipe(TaskPrompt("Is the remark kind?", EXAMPLES), 3, generator=seeded(5, 3))
    expected = {"adapter": str(tmp_path / "a"), "num_adapters": 3, "refined": None, "report": output.report.to_json()}
    assert facts == json.loads(json.dumps({**expected, "chosen": output.chosen}))
    refused(run(*GENERATE, *options, "--out", tmp_path / "a"), "is not empty")


def test_classify_tells_all_probabilities(run: Any, tiny_adapter: LoraAdapter, tmp_path: Path) -> None:
    folder, texts = tiny_adapter.save(tmp_path / "adapter"), ["the good film", "the " * 25_000]
    done = run("classify", folder, *texts, "--json")
    facts = told(done)
    assert done.err == ["note: 1 of 2 texts longer than 128 tokens; the rest of them is not read"]
    classifier = PrototypeClassifier.load(folder)
    assert [one["text"] for one in facts] == texts
    assert [one["label"] for one in facts] == classifier.predict(texts)
    assert [list(one["probabilities"].values()) for one in facts] == [
        pytest.approx(row[::-1], abs=1e-6) for row in classifier.logits(texts).softmax(1).tolist()
    ]  # keys are sorted: negative, positive


def test_preview_and_convert_tell_what_they_wrote(run: Any, style_generator: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (230, 60, 30)).save(tmp_path / "picture.png")
    adapter = tmp_path / "embers"
    made = told(run("generate", "--image", tmp_path / "picture.png", "--generator", style_generator, "--out", adapter, "--json"))
    assert made["report"]["labels"] == []
    done = run("preview", adapter, "--prompt", "a red dragon", "--steps", 2, "--card", "--json")
    assert told(done) == {"pictures": f"{adapter}-preview.png", "card": str(adapter / "README.md")}
    assert done.err == ["note: words that the base model does not know: dragon"]
    done = run("convert", adapter, "--to", "comfyui", "--out", tmp_path / "embers.safetensors", "--json")
    assert told(done) == {"to": "comfyui", "written": str(tmp_path / "embers.safetensors")}


def test_generators_tell_what_they_are(run: Any, tiny_generator: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known = {one["name"]: one for one in told(run("list", "--json"))}
    bundled = told(run("info", "cond-pdiff/minilm-text-tasks", "--json"))
    assert known["cond-pdiff/minilm-text-tasks"] == bundled
    assert (bundled["makes"], len(bundled["tasks"]), bundled["lora"]["rank"]) == ("text", 58, 4)
    assert "| 16 unseen tasks |" in bundled["measured"]
    assert told(run("info", tiny_generator, "--json"))["adapter"] == {"parameters": 1024, "modelled": 512, "tensors": 16}


def test_a_push_tells_what_it_would_send(run: Any, tiny_generator: Path) -> None:
    facts = told(run("push", tiny_generator, "--repo", "owner/x", "--dry-run", "--json"))
    assert (facts["repo_id"], facts["repo_type"], facts["url"]) == ("owner/x", "model", None)
    assert facts["files"]["unet/config.json"] == (tiny_generator / "unet" / "config.json").stat().st_size


def test_the_demo_tells_both_answers(run: Any, tiny_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cond_pdiff.cli.generate.TEXT_GENERATOR", str(tiny_generator))
    facts = told(run("demo", "--json"))
    assert [(one["text"], one["label"]) for one in facts["sentences"]] == list(SENTENCES)
    assert all(one[who]["right"] == (one[who]["label"] == one["label"]) for one in facts["sentences"] for who in ("base", "adapted"))


def test_recipes_tell_every_key(run: Any) -> None:
    facts = told(run("recipe", "show", "paper-language-half+rank2", "--section", "collect", "--json"))
    (section,) = facts["sections"]
    (rank,) = (entry for entry in section["entries"] if entry["key"] == "rank")
    assert (rank["value"], rank["default"], rank["given"]) == (2, 4, True)
    assert rank["schema"] == {"type": "integer", "minimum": 1, "maximum": 1024}
    names = [one["name"] for one in told(run("recipe", "list", "--json"))]
    assert "minilm-text-tasks" in names
    assert names == [line.split()[0] for line in run("recipe", "list").out if not line.startswith(" ")]
    refused(run("recipe", "show", "nonsense", "--json"), "no recipe 'nonsense'")
