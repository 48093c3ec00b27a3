"""Pushing to a Hub on the loopback device, and pulling from it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_bert, told
from loopback_hub import LoopbackHub
from peft import LoraConfig, PeftModel, get_peft_model

from cond_pdiff import CondPDiffPipeline, LoraAdapter
from cond_pdiff.adapter import ADAPTER_FILES
from cond_pdiff.errors import CondPDiffError, HubError, TaskDataError
from cond_pdiff.hub import bundled, fetch, push_folder
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.peft_files import WEIGHTS_FILE
from cond_pdiff.publish import push, push_generator
from cond_pdiff.training.zoo.push import push_zoo
from cond_pdiff.training.zoo.zoo import Zoo

TOKEN = "hf_plantedPLANTEDplantedPLANTED0123"
PROMPT = "Is the film good?"


def weights_sha256(pipe: CondPDiffPipeline, folder: Path) -> str:
    """Of the weights file that a fixed seed gives."""
    out = pipe(PROMPT, generator=[torch.Generator().manual_seed(5)])
    return hashlib.sha256((out.save_adapter(folder) / WEIGHTS_FILE).read_bytes()).hexdigest()


def header(card: bytes) -> dict[str, Any]:
    """The card's YAML."""
    return yaml.safe_load(card.decode().split("---\n")[1])


# --- generators --------------------------------------------------------------------------------------------------------------


def test_pushed_pulled_and_reloaded_offline_it_makes_the_same_bytes(
    hub: LoopbackHub, tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = CondPDiffPipeline.from_pretrained(tiny_generator)
    url = pipe.push_to_hub("owner/mine", private=True, commit_message="The first")
    assert url == f"{hub.endpoint}/owner/mine/commit/{hub.repos['model', 'owner/mine'].branches['main']}"
    assert hub.repos["model", "owner/mine"].private
    saved = {path.relative_to(tiny_generator).as_posix() for path in tiny_generator.rglob("*") if path.is_file()}
    assert set(hub.files("owner/mine")) == {".gitattributes", "README.md", *saved}
    hashes = {weights_sha256(pipe, tmp_path / "0"), weights_sha256(CondPDiffPipeline.from_pretrained("owner/mine"), tmp_path / "1")}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = CondPDiffPipeline.from_pretrained("owner/mine")
    assert len(hashes | {weights_sha256(offline, tmp_path / "2")}) == 1
    made = LoraAdapter.load(tmp_path / "2").metadata["generator"]
    assert (made["name"], made["revision"]) == ("owner/mine", hub.repos["model", "owner/mine"].branches["main"])


def test_the_command_line_pushes_and_pulls_through_hf_endpoint(tiny_generator: Path, tmp_path: Path) -> None:
    """Processes of their own, which know the Hub from their environment only."""
    command = "import sys; from cond_pdiff.cli import main; sys.exit(main(sys.argv[1:]))"
    hub = LoopbackHub()
    hub.token = TOKEN
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def call(*arguments: object, **changes: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", command, *map(str, arguments)],
            env={**environment, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", **changes},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert TOKEN not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    weights = []
    with hub.running():
        assert f"at         {hub.endpoint}/owner/x/commit/" in call("push", tiny_generator, "--repo", "owner/x")
        call("generate", PROMPT, "--generator", "owner/x", "--seed", 5, "--out", tmp_path / "pulled")
        assert "owner/x at " in call("list")
    call("generate", PROMPT, "--generator", "owner/x", "--seed", 5, "--out", tmp_path / "offline", HF_HUB_OFFLINE="1")
    call("generate", PROMPT, "--generator", tiny_generator, "--seed", 5, "--out", tmp_path / "local", HF_HUB_OFFLINE="1")
    for name in ("pulled", "offline", "local"):
        weights.append(hashlib.sha256((tmp_path / name / WEIGHTS_FILE).read_bytes()).hexdigest())
    assert len(set(weights)) == 1
    assert LoraAdapter.load(tmp_path / "pulled").metadata["generator"]["name"] == "owner/x"


def test_save_pretrained_pushes_too(hub: LoopbackHub, tiny_generator: Path, tmp_path: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(tiny_generator)
    pipe.save_pretrained(tmp_path / "named", push_to_hub=True)
    pipe.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="someone/else", revision="try")
    assert set(hub.repos) == {("model", "owner/named"), ("model", "someone/else")}
    assert "model_index.json" in hub.files("someone/else", branch="try")
    assert "model_index.json" not in hub.files("someone/else")
    with pytest.raises(HubError, match="repo_id means something with push_to_hub=True only"):
        pipe.save_pretrained(tmp_path / "third", repo_id="someone/else")
    with pytest.raises(HubError, match="safetensors only"):
        pipe.save_pretrained(tmp_path / "third", safe_serialization=False)
    assert not (tmp_path / "third").exists()


def test_any_revision_is_pulled_and_without_a_network_only_what_was(
    hub: LoopbackHub, tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.add("owner/x", generator_files(tiny_generator, "first"))
    hub.add("owner/x", generator_files(tiny_generator, "second"))
    hub.add("owner/x", generator_files(tiny_generator, "third"), branch="other")
    for revision, mark in ((None, "second"), ("main", "second"), (first, "first"), ("other", "third")):
        CondPDiffPipeline.from_pretrained("owner/x", revision=revision, cache_dir=tmp_path)
        folder = fetch("owner/x", revision, cache_dir=tmp_path, local_files_only=True)
        assert (folder / "README.md").read_text() == mark
    with pytest.raises(HubError, match="cannot be fetched: RevisionNotFoundError"):
        CondPDiffPipeline.from_pretrained("owner/x", revision="nowhere", cache_dir=tmp_path)
    hub.requests.clear()
    CondPDiffPipeline.from_pretrained("owner/x", revision="other", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(HubError, match="is not in the cache"):
        CondPDiffPipeline.from_pretrained("owner/x", cache_dir=tmp_path / "none", local_files_only=True)
    assert hub.requests == []


def test_a_variant_is_pushed_and_asked_for_by_the_same_word(hub: LoopbackHub, tiny_generator: Path) -> None:
    CondPDiffPipeline.from_pretrained(tiny_generator, dtype=torch.float16).push_to_hub("owner/half", variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files("owner/half")
    pipe = CondPDiffPipeline.from_pretrained("owner/half", variant="fp16", dtype=torch.float16)
    assert pipe.unet.dtype == torch.float16
    with pytest.raises(HubError):
        CondPDiffPipeline.from_pretrained("owner/half")


def test_a_generator_without_a_card_gets_one_that_claims_nothing(hub: LoopbackHub, tiny_generator: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_generator, tmp_path / "bare"))
    (bare / "README.md").unlink(missing_ok=True)
    push_generator(bare, "owner/bare")
    card = hub.files("owner/bare")["README.md"].decode()
    assert header(card.encode())["library_name"] == "cond-pdiff"
    assert 'CondPDiffPipeline.from_pretrained("owner/bare")' in card
    assert "**Nothing has been measured yet.**" in card
    assert "moods" in card
    assert "$" not in card


def test_a_card_comes_along_with_its_pictures_and_loads_the_new_repository(hub: LoopbackHub, tiny_generator: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_generator, tmp_path / "carded"))
    text = '# A\n\nCondPDiffPipeline.from_pretrained("cond-pdiff/a")\n![one](pictures/one.png)\n![two](pictures/two.png)\n![far](https://x/y.png)\n'
    (folder / "README.md").write_text(text)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "one.png").write_bytes(b"PNG")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "evaluation.yaml").write_text("[]")
    (folder / "notes.py").write_text("1/0")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden.json").write_text("{}")
    CondPDiffPipeline.from_pretrained(folder).push_to_hub("owner/a")
    push_generator(folder, "owner/b")
    for name in "ab":
        files = hub.files(f"owner/{name}")
        assert files["README.md"].decode() == text.replace("cond-pdiff/a", f"owner/{name}").replace("![two](pictures/two.png)\n", "")
        assert files["pictures/one.png"] == b"PNG"
        assert files[".eval_results/evaluation.yaml"] == b"[]"
        assert not [file for file in files if file.endswith(".py") or "hidden" in file]
    assert (folder / "README.md").read_text() == text


def test_with_another_component_the_card_is_not_kept(tiny_generator: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_generator, tmp_path / "carded"))
    (folder / "README.md").write_text("# Measured with care\n")
    plain = CondPDiffPipeline.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "same")
    CondPDiffPipeline.from_pretrained(folder, unet=plain.unet).save_pretrained(tmp_path / "other")
    assert (tmp_path / "same" / "README.md").read_text() == "# Measured with care\n"
    assert "Nothing has been measured" in (tmp_path / "other" / "README.md").read_text()


# --- adapters, zoos, the Space -------------------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_and_loads_from_its_pulled_folder(hub: LoopbackHub, tiny_generator: Path) -> None:
    out = CondPDiffPipeline.from_pretrained(tiny_generator)(PROMPT, generator=[torch.Generator().manual_seed(1)])
    push = out.adapter.push_to_hub("owner/adapter")
    assert set(push.files) == set(ADAPTER_FILES)
    loaded = LoraAdapter.load(fetch("owner/adapter"))
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in out.adapter.tensors.items())
    assert header(hub.files("owner/adapter")["README.md"])["library_name"] == "peft"
    with_picture = out.adapter.push_to_hub("owner/adapter", preview=b"a picture", dry_run=True)
    assert set(with_picture.files) == {*ADAPTER_FILES, "preview.png"}


def test_a_zoo_is_pushed_as_a_data_set_with_manifest_and_card(hub: LoopbackHub, tiny_zoo: Path, tmp_path: Path) -> None:
    zoo = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    push = push_zoo(zoo, "owner/zoo")
    files = hub.files("owner/zoo", "dataset")
    assert {name for name in files if name != ".gitattributes"} == set(push.files)
    assert len([name for name in files if name.endswith("run.json")]) == len(list(tiny_zoo.rglob("run.json")))
    assert (zoo.folder / "receipts").is_dir()
    assert not [name for name in files if name.startswith("receipts/")]  # they name machines
    card = files["README.md"].decode()
    rows = [line for line in card.splitlines() if line.startswith(("| moods", "| animals"))]
    assert len(rows) == 2
    assert "hf download owner/zoo --repo-type dataset" in card
    assert not re.search(r"\$\w", card)
    assert len(json.loads(files["manifest.json"])["runs"]) == sum(len(zoo.runs(name)) for name in (*zoo.task_names, *zoo.unseen_names))
    pulled = Zoo(fetch("owner/zoo", repo_type="dataset"))
    assert [run.adapter().layout for run in pulled.runs("moods")] == [run.adapter().layout for run in zoo.runs("moods")]


def test_an_unfinished_zoo_is_not_pushed(hub: LoopbackHub, tiny_zoo: Path, tmp_path: Path) -> None:
    zoo = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    shutil.rmtree(zoo.folder / "tasks" / "moods")
    with pytest.raises(TaskDataError, match="is not complete: 2 of 6 runs are missing"):
        push_zoo(zoo, "owner/zoo")
    assert hub.requests == []


def test_the_space_has_all_that_it_needs(hub: LoopbackHub, run: Any, tiny_generator: Path) -> None:
    app = Path(__file__).parents[1] / "app.py"
    assert run("push-space", "--app", app, "--repo", "owner/demo").status == 0
    files = hub.files("owner/demo", "space")
    assert files["app.py"] == app.read_bytes()
    facts = header(files["README.md"])
    assert (facts["sdk"], facts["app_file"]) == ("gradio", "app.py")
    assert re.fullmatch(r"cond-pdiff\[app\]==\d\S*\n", files["requirements.txt"].decode())
    assert "models" not in facts
    push_generator(tiny_generator, "owner/tiny")
    assert run("push-space", "--app", app, "--repo", "owner/mine", "--generator", "owner/tiny").status == 0
    facts = header(hub.files("owner/mine", "space")["README.md"])
    assert facts["models"] == facts["preload_from_hub"] == ["owner/tiny"]
    assert hub.variables == {("owner/mine", "COND_PDIFF_TEXT_GENERATOR"): "owner/tiny"}
    again = run("push-space", "--app", app, "--repo", "o/m", "--generator", "owner/tiny", "--generator", "owner/tiny")
    assert "owner/tiny and owner/tiny both make text adapters" in again.err[-1]
    for name in (str(tiny_generator), "cond-pdiff/minilm-text-tasks"):
        assert "is not a repository on the Hub" in run("push-space", "--app", app, "--repo", "o/m", "--generator", name).err[-1]
    assert "there is no" in run("push-space", "--app", "nowhere/app.py", "--repo", "o/m").err[-1]


# --- what goes wrong -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_hub(hub: LoopbackHub, run: Any, tiny_generator: Path, saved: Path) -> None:
    done = run("push", tiny_generator, "--repo", "owner/x", "--dry-run")
    assert done.status == 0
    assert "would be sent to the model repository owner/x" in done.out[-1]
    assert any(line.endswith("  unet/config.json") for line in done.out)
    assert run("push", saved, "--repo", "owner/x", "--dry-run").out[-1].startswith("dry run: 4 files")
    (saved / "README.md").unlink()  # it gets a new one
    assert run("push", saved, "--repo", "owner/x", "--dry-run").out[-1].startswith("dry run: 4 files")
    assert hub.requests == []


def litter(folder: Path) -> set[str]:
    """Lay into a folder what trainers and people leave there; return what is below it then."""
    before = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = (
        *("train_rows.txt", "credentials.json", "notes.md", "pictures/private.png", "optimizer.safetensors", "training_args.yaml"),
        *("wandb/run.json", "checkpoint-10/adapter_model.safetensors", "checkpoint-10/README.md", ".env", ".eval_results/.env"),
        *("unet/optimizer.safetensors", "unet/checkpoint-10/config.json", "unet/credentials.json", "logs/config.json"),
    )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('"private"')
    return before


def test_nothing_else_in_an_adapters_folder_is_pushed(hub: LoopbackHub, run: Any, saved: Path) -> None:
    card = saved / "README.md"
    pictures = ("one.png", "shown/two.jpg", "three.png")
    (saved / "shown").mkdir()
    for name in ("preview.png", *pictures):
        (saved / name).write_bytes(name.encode())
    (saved.parent / "outside.png").write_bytes(b"outside")
    shown = ("one.png", "shown/two.jpg", "../outside.png", str(saved / "three.png"), "https://x/y.png", "credentials.json", ".env")
    card.write_text(card.read_text() + "".join(f"![a picture]({name})\n" for name in shown))
    litter(saved)
    own = {*ADAPTER_FILES, "preview.png", "one.png", "shown/two.jpg"}
    done = told(run("push", saved, "--repo", "owner/adapter", "--dry-run", "--json"))
    assert set(done["files"]) == own
    assert run("push", saved, "--repo", "owner/adapter").status == 0
    files = hub.files("owner/adapter")
    assert set(files) == {".gitattributes", *own}
    assert files[WEIGHTS_FILE] == (saved / WEIGHTS_FILE).read_bytes()
    card.unlink()
    assert set(told(run("push", saved, "--repo", "owner/adapter", "--dry-run", "--json"))["files"]) == {*ADAPTER_FILES, "preview.png"}


def test_nothing_else_in_a_generators_folder_is_pushed(hub: LoopbackHub, tiny_generator: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_generator, tmp_path / "generator"))
    own = litter(folder)
    push_generator(folder, "owner/mine")
    assert set(hub.files("owner/mine")) == {".gitattributes", *own}
    assert set(push_generator("cond-pdiff/pixart-mini-styles", "owner/x", dry_run=True).files) == {
        path.relative_to(bundled("cond-pdiff/pixart-mini-styles")).as_posix()
        for path in bundled("cond-pdiff/pixart-mini-styles").rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("carded", [True, False])
def test_no_path_of_this_machine_is_pushed_with_an_adapter(
    hub: LoopbackHub, tiny_adapter: LoraAdapter, sentence_backbone: SentenceBackbone, saved: Path, carded: bool
) -> None:
    path = str(tiny_adapter.spec.base_model)
    if carded:
        card = (saved / "README.md").read_text()
        (saved / "README.md").write_text(card.replace("library_name", f"base_model: {path}\nlibrary_name") + f"Trained on {path}.\n")
    else:
        (saved / "README.md").unlink()
    push(saved, "owner/adapter")
    files = hub.files("owner/adapter")
    assert not [name for name, data in files.items() if path.encode() in data]
    assert "base_model" not in header(files["README.md"])
    assert Path(path).name in files["README.md"].decode()
    pulled = fetch("owner/adapter")
    loaded = LoraAdapter.load(pulled)
    assert (loaded.spec.base_model, loaded.spec.base_fingerprint) == (None, tiny_adapter.spec.base_fingerprint)
    model = sentence_backbone.model
    ids = torch.arange(5, 21).reshape(2, 8)
    with torch.no_grad(), loaded.attached(model):
        ours = model(ids)[0]
    with torch.no_grad():
        assert torch.allclose(PeftModel.from_pretrained(model, str(pulled)).eval()(ids)[0], ours, atol=1e-6)


def test_an_adapter_of_a_base_on_the_hub_is_pushed_as_it_stands(hub: LoopbackHub, tmp_path: Path) -> None:
    get_peft_model(make_bert(), LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "owner/base", "revision": "abc"}))
    (tmp_path / "README.md").write_text("---\nbase_model: owner/base\n---\n# Mine\n")
    push(tmp_path, "owner/adapter")
    files = hub.files("owner/adapter")
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", WEIGHTS_FILE}
    assert all(data == (tmp_path / name).read_bytes() for name, data in files.items() if name != ".gitattributes")


def test_an_adapters_own_card_is_pushed(hub: LoopbackHub, run: Any, saved: Path) -> None:
    card = (saved / "README.md").read_text() + "\n## My notes\n"
    (saved / "README.md").write_text(card)
    assert run("push", saved, "--repo", "owner/adapter").status == 0
    assert hub.files("owner/adapter")["README.md"].decode() == card


@pytest.mark.parametrize("name", ["a b", "x/y/z", "-x", ""])
def test_impossible_names_are_refused(hub: LoopbackHub, saved: Path, name: str) -> None:
    with pytest.raises(HubError, match="is not a Hub repository name"):
        LoraAdapter.load(saved).push_to_hub(name)


def test_what_is_no_generator_is_not_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no model_index.json"):
        push_generator(tmp_path, "owner/x")
    with pytest.raises(HubError, match="holds nothing to push"):
        push_folder(tmp_path, "owner/x")
    assert hub.requests == []


def test_the_token_is_sent_and_told_to_nobody(
    hub: LoopbackHub, tiny_generator: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN + "wrong")
    done = run("push", tiny_generator, "--repo", "owner/x")
    assert (done.status, len(done.err)) == (1, 1)
    assert "owner/x cannot be pushed to" in done.err[0]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done_right = run("push", tiny_generator, "--repo", "owner/x")
    assert done_right.status == 0
    pipe = CondPDiffPipeline.from_pretrained("owner/x", token=TOKEN)
    folder = pipe(PROMPT).save_adapter(tmp_path / "adapter")
    with pytest.raises(HubError) as error:
        fetch("owner/none", token=TOKEN)
    told = [*done.err, *done.out, *done_right.err, *done_right.out, str(error.value), repr(error.value), caplog.text]
    told += [path.read_text(errors="replace") for path in folder.iterdir()]
    told += [data.decode(errors="replace") for data in hub.files("owner/x").values()]
    told += [path.read_text(errors="replace") for path in (tmp_path / "hub-cache").rglob("*") if path.is_file()]
    assert not [text for text in told if TOKEN in text]


def test_a_push_that_broke_off_is_taken_up_again(hub: LoopbackHub, tiny_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    state = {"left": 3}

    def refuse(line: str) -> None:
        if line.startswith("PUT"):
            state["left"] -= 1
            if state["left"] < 0:
                raise ConnectionResetError

    hub.before = refuse
    with pytest.raises(HubError, match="run the same command again"):
        push_generator(tiny_generator, "owner/x")
    assert "model_index.json" not in hub.files("owner/x")  # a commit is whole or not at all
    uploaded = set(hub.objects)
    hub.before, hub.requests[:] = lambda line: None, []
    push_generator(tiny_generator, "owner/x")
    assert "model_index.json" in hub.files("owner/x")
    assert not {line.rpartition("/")[2] for line in hub.requests if line.startswith("PUT")} & uploaded


# --- pulling under difficulties --------------------------------------------------------------------------------------------------


def generator_files(folder: Path, mark: str) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {**files, "mark.json": json.dumps({"mark": mark}).encode(), "README.md": mark.encode()}


def test_a_branch_that_moves_is_never_pulled_as_a_mixture(hub: LoopbackHub, tiny_generator: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(10):
        name = f"owner/moving-{trial}"
        first = hub.add(name, generator_files(tiny_generator, "first"))
        at, seen = rng.randrange(30), {"requests": 0, "moved": False}

        def move(line: str, at: int = at, seen: dict[str, Any] = seen, name: str = name) -> None:
            seen["requests"] += 1
            if seen["requests"] > at and not seen["moved"]:
                seen["moved"] = True
                hub.add(name, generator_files(tiny_generator, "second"))

        hub.before = move
        folder = fetch(name, cache_dir=tmp_path)
        mark = json.loads((folder / "mark.json").read_text())["mark"]
        assert (folder / "README.md").read_text() == mark
        assert (folder.name == first) == (mark == "first")


def test_a_connection_cut_anywhere_never_gives_a_wrong_load(
    hub: LoopbackHub, tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    hub.add("owner/cut", generator_files(tiny_generator, "x"))
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in hub.files("owner/cut").items()}
    rng = random.Random(1)
    for trial in range(6):
        victim, share = rng.choice(sorted(expected)), rng.random()
        hub.cut = lambda name, data, victim=victim, share=share: int(share * len(data)) if name == victim else None
        cache = tmp_path / str(trial)
        with contextlib.suppress(CondPDiffError):
            fetch("owner/cut", cache_dir=cache)
        hub.cut = lambda name, data: None
        folder = fetch("owner/cut", cache_dir=cache)
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == expected


HOSTILE: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "code instead of a generator": lambda files: {"pipeline.py": b"raise SystemExit", "README.md": b"# x"},
    "a pickle for weights": lambda files: {
        **{name: data for name, data in files.items() if name != "unet/diffusion_pytorch_model.safetensors"},
        "unet/diffusion_pytorch_model.bin": b"\x80\x04.",
    },
    "a component from a file": lambda files: {
        **files, "unet/evil.py": b"raise SystemExit", "model_index.json": index(files, unet=["evil", "ParamUNet1D"]),
    },
    "a list for a class": lambda files: {**files, "model_index.json": index(files, _class_name=["pipeline", "CondPDiffPipeline"])},
    "auto_map": lambda files: {
        **files, "unet/config.json": b'{"auto_map": {"AutoModel": "modeling.Evil"}}', "unet/modeling.py": b"raise SystemExit",
    },
    "another library": lambda files: {**files, "model_index.json": index(files, unet=["os", "system"])},
    "another pipeline": lambda files: {**files, "model_index.json": index(files, _class_name="StableDiffusionPipeline")},
    "a peft adapter": lambda files: {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
    "a huge header": lambda files: {**files, "unet/diffusion_pytorch_model.safetensors": (2**62).to_bytes(8, "little") + b"{}"},
    "wrong sizes": lambda files: {**files, "unet/diffusion_pytorch_model.safetensors": wrong_sizes()},
    "endless JSON": lambda files: {**files, "unet/config.json": b" " * 5_000_000},
    "deep JSON": lambda files: {**files, "unet/config.json": b"[" * 3_000_000},
    "deep index": lambda files: {**files, "model_index.json": b"[" * 3_000_000},
    "JSON of a wrong kind": lambda files: {**files, "template/config.json": b'{"layout": 5, "lora": [], "base": "x"}'},
}  # fmt: skip


def index(files: dict[str, bytes], **entries: Any) -> bytes:
    return json.dumps({**json.loads(files["model_index.json"]), **entries}).encode()


def wrong_sizes() -> bytes:
    head = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return len(head).to_bytes(8, "little") + head


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_repository_is_refused_and_its_code_never_asked_for(hub: LoopbackHub, tiny_generator: Path, kind: str) -> None:
    hub.add("owner/evil", HOSTILE[kind](generator_files(tiny_generator, "x")))
    before = set(sys.modules)
    with pytest.raises(CondPDiffError):
        CondPDiffPipeline.from_pretrained("owner/evil")
    assert not [name for name in hub.asked_for() if not name.endswith((".json", ".safetensors", ".txt", ".md"))]
    assert not {"evil", "modeling", "pipeline"} & (set(sys.modules) - before)


@pytest.mark.parametrize("name", ["../escape.json", "/escape.json", "unet/../../escape.json", "..\\escape.json"])
def test_names_that_lead_out_of_the_folder_are_refused(hub: LoopbackHub, tiny_generator: Path, tmp_path: Path, name: str) -> None:
    hub.add("owner/evil", {**generator_files(tiny_generator, "x"), name: b'{"escaped": true}'})
    with pytest.raises(HubError):
        CondPDiffPipeline.from_pretrained("owner/evil")
    assert not [path for path in tmp_path.rglob("escape.json") if "snapshots" not in path.parts]
    assert not Path("/escape.json").exists()
