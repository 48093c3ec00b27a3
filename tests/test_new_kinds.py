"""A third kind of condition (a vector) and a fourth family of base models (two linear layers that regress), written here alone.

They go the whole way, from tasks on disk to an adapter that is loaded again, and no file of the library knows them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from torch import nn

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier
from cond_pdiff.component import COMPONENTS, ExactComponent, register_component
from cond_pdiff.conditions.condition import CONDITIONS, Condition, register_condition
from cond_pdiff.convert import save_merged
from cond_pdiff.errors import AdapterError, ConditionError, CondPDiffError, HubError, TrainingError
from cond_pdiff.families.family import FAMILIES, Family, register_family
from cond_pdiff.families.sentence_encoder import SentenceEncoder
from cond_pdiff.formats.lora_writer import save_lora_file
from cond_pdiff.generator_info import GeneratorInfo
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec
from cond_pdiff.models.condition_encoder import ConditionEncoder, EncoderReport
from cond_pdiff.publish import push_generator, push_space
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.stages.tune import tune
from cond_pdiff.training.tasks.task import ZooTask
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.push import write_zoo_card
from cond_pdiff.training.zoo.zoo import Zoo
from cond_pdiff.verify import verify

INPUTS, HIDDEN, SIZE = 4, 6, 3


@dataclass(frozen=True, eq=False)
class Point(Condition):
    """Three numbers."""

    name: ClassVar[str] = "point"
    noun: ClassVar[str] = "place"
    adapters: ClassVar[str] = "regression"

    numbers: torch.Tensor

    @classmethod
    def of(cls, given: Any) -> Point:
        if isinstance(given, cls):
            return given
        if isinstance(given, torch.Tensor) and given.shape == (SIZE,):
            return cls(given)
        raise ConditionError(f"this generator reads {SIZE} numbers, got a {type(given).__name__}")

    def to_json(self) -> dict[str, Any]:
        return {"type": self.name, "numbers": self.numbers.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: str | Path | None = None) -> Point:
        return cls.of(torch.tensor(data["numbers"]))

    @classmethod
    def describe(cls, record: Mapping[str, Any]) -> str:
        return f"Generated from the point {record.get('numbers')}."


@dataclass(frozen=True)
class PointReport(EncoderReport):
    condition_kind: ClassVar[type[Point]] = Point


class PointConditionEncoder(ExactComponent, ConditionEncoder):
    """The point itself, at length one."""

    condition_kind = Point
    anchor: torch.Tensor

    @register_to_config
    def __init__(self, condition_dim: int = SIZE) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, list[EncoderReport]]:
        rows = torch.stack([Point.of(condition).numbers for condition in conditions])
        return nn.functional.normalize(rows, dim=1), [PointReport() for _ in conditions]


class Regressor(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, rows: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.last(torch.tanh(self.first(rows)))[:, 0]


@dataclass(frozen=True)
class Plane(ZooTask):
    """A linear function of the inputs, which a point names."""

    condition_kind: ClassVar[type[Point]] = Point
    name: str
    point: torch.Tensor
    group: str = ""
    licence: str = ""

    def conditions(self, count: int) -> list[Point]:
        rng = torch.Generator().manual_seed(len(self.name))
        return [Point(self.point + 0.02 * index * torch.randn(SIZE, generator=rng)) for index in range(count)]


@dataclass
class PlaneFineTuning:
    """Mean squared error."""

    config: CollectConfig
    model: nn.Module
    task_type: str | None = None

    def batches(self, task: Plane, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(rng.getrandbits(31))
        while True:
            rows = torch.randn(self.config.batch_size, INPUTS, generator=generator)
            yield rows, rows[:, :SIZE] @ task.point

    def losses(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], tasks: Sequence[Plane]) -> torch.Tensor:
        rows, right = (torch.cat(part) for part in zip(*batches, strict=True))
        return (self.model(rows) - right).square().view(len(batches), -1).mean(1)

    def metrics(self, adapter: LoraAdapter, task: Plane) -> dict[str, Any]:
        return {"test_error": round(error_of(self.model, adapter, task.point), 4)}


@torch.no_grad()
def error_of(model: nn.Module, adapter: LoraAdapter | None, point: torch.Tensor) -> float:
    rows = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(9))
    if adapter is None:
        return float((model(rows) - rows[:, :SIZE] @ point).square().mean())
    with adapter.attached(model):
        return float((model(rows) - rows[:, :SIZE] @ point).square().mean())


class RegressionFamily(Family):
    """Bases are a folder with `model.safetensors`."""

    name = "two-layer-regression"

    def load(self, base: Backbone, spec: LoraSpec, num_labels: int | None = None) -> Regressor:
        return self.load_adapted(base)

    def load_adapted(self, base: Backbone) -> Regressor:
        model = Regressor()
        model.load_state_dict(load_file(Path(base.repo_id) / self.weights_file))
        return model.requires_grad_(False)

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> list[Plane]:
        points = json.loads((Path(folder) / "points.json").read_text())
        return [Plane(name, torch.tensor(points[name])) for name in names or sorted(points)]

    def fine_tuning(self, config: CollectConfig, tasks: Sequence[Plane]) -> PlaneFineTuning:
        return PlaneFineTuning(config, self.load_adapted(Backbone.from_json(config.base)))


NUMBERS = {"along": [1.0, 0.0, 0.2], "across": [0.0, 1.0, -0.3], "upwards": [-0.8, 0.1, 1.0]}
POINTS = {name: torch.tensor(numbers) for name, numbers in NUMBERS.items()}


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    """The new kinds are registered as a stranger's package would, for this module alone."""
    register_condition(Point)
    register_component(PointConditionEncoder)
    register_family(RegressionFamily)
    yield
    del CONDITIONS[Point.name], COMPONENTS[PointConditionEncoder.__name__], FAMILIES[RegressionFamily.name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Zoo, Path, Path]:
    """A zoo, a trained generator, and the folder of the tasks."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    (folder / "base").mkdir()
    save_file(Regressor().state_dict(), folder / "base" / "model.safetensors")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "points.json").write_text(json.dumps(NUMBERS))
    section = {
        "tasks": ["across", "along"], "unseen": ["upwards"], "family": "two-layer-regression", "rank": 2, "alpha": 4,
        "base": Backbone(str(folder / "base")).to_json(), "target_modules": ["first", "last"], "train_lora_a": True,
        "runs": 2, "steps": 150, "learning_rates": [0.03], "multitask_steps": 5,
    }  # fmt: skip
    zoo = collect(parse(CollectConfig, section, "collect"), folder / "tasks", folder / "zoo")
    recipe = {
        "autoencoder": {
            "model": {"encoder_channels": [4], "decoder_channels": [4], "stride": 2, "latent_dim": 8}, "normalizer": "batch",
            "fit": {"steps": 300, "batch_size": 4, "warmup_steps": 5},
        },
        "unet": {
            "model": {"block_out_channels": [8, 8]}, "conditions_per_task": 4,
            "condition_encoder": {"type": "PointConditionEncoder"}, "fit": {"steps": 300, "batch_size": 8, "warmup_steps": 5},
        },
    }  # fmt: skip
    return zoo, train(recipe, zoo.folder, folder / "tasks", folder / "run"), folder / "tasks"


def test_the_zoo_names_its_kinds(made: tuple[Zoo, Path, Path]) -> None:
    zoo, _, _ = made
    assert (zoo.facts["condition"], zoo.family.name) == ("point", "two-layer-regression")
    run = zoo.runs("along")[0]
    model = zoo.family.load_adapted(zoo.base)
    assert run.facts["test_error"] < 0.2 * error_of(model, None, POINTS["along"])
    assert run.adapter().spec.family == "two-layer-regression"
    assert "two-layer-regression" in write_zoo_card(zoo, "nobody/zoo").read_text(encoding="utf-8")


def test_a_point_becomes_an_adapter_that_loads_and_works(made: tuple[Zoo, Path, Path], tmp_path: Path) -> None:
    _, generator, _ = made
    pipe = CondPDiffPipeline.from_pretrained(generator)
    assert type(pipe.condition_encoder) is PointConditionEncoder
    out = pipe(POINTS["along"], generator=torch.Generator().manual_seed(0))
    assert out.report.nearest[0].task == "along"
    assert "unlike every trained place" in str(replace(out.report, in_distribution=False))
    assert "labels" not in str(out.report)
    folder = out.save_adapter(tmp_path / "adapter")
    adapter = LoraAdapter.load(folder)
    assert adapter.family is FAMILIES["two-layer-regression"]
    assert f"Generated from the point {out.adapter.metadata['condition']['numbers']}." in (folder / "README.md").read_text(encoding="utf-8")
    base = pipe.base_model()
    errors = {name: error_of(base, adapter, point) for name, point in POINTS.items()}
    assert errors["along"] < 0.5 * error_of(base, None, POINTS["along"])
    assert min(errors, key=errors.__getitem__) == "along"
    assert verify(adapter, generator).same
    with pytest.raises(CondPDiffError, match="fingerprints differ"):
        adapter.attach(Regressor())


def test_what_a_generator_makes_is_told(made: tuple[Zoo, Path, Path]) -> None:
    told = str(GeneratorInfo.read(made[1]))
    assert "makes      regression adapters for" in told
    assert "places     2: across, along" in told


def test_what_its_kinds_cannot_do_is_refused(made: tuple[Zoo, Path, Path], tmp_path: Path) -> None:
    zoo, generator, tasks = made
    with pytest.raises(TrainingError, match="for a two-layer-regression; so far those for causal-lm, diffusion-transformer"):
        evaluate(generator, zoo.folder, tasks, tmp_path / "evaluation", EvaluateConfig())
    with pytest.raises(TrainingError, match="this generator makes adapters for a two-layer-regression"):
        tune({}, generator, tasks, tmp_path / "tune")
    pipe, adapter = CondPDiffPipeline.from_pretrained(generator), zoo.runs("along")[0].adapter()
    with pytest.raises(ConditionError, match="reads 3 numbers, got a str"):
        pipe("in words")
    with pytest.raises(ConditionError, match="reads no prompt; give its condition as condition="):
        pipe(prompt="in words")
    with pytest.raises(AdapterError, match="not classified by prototypes under adapters for a two-layer-regression"):
        PrototypeClassifier(pipe.base_model(), ["yes", "no"], adapter)
    with pytest.raises(AdapterError, match="is not an adapter for texts"):
        PrototypeClassifier.load(zoo.runs("along")[0].folder, ["yes", "no"])
    with pytest.raises(AdapterError, match="cannot be written as a file for comfyui: no tool's single files are known for it"):
        save_lora_file(adapter, tmp_path / "lora.safetensors", "comfyui")


def test_the_demo_has_no_place_for_it(made: tuple[Zoo, Path, Path], hub: LoopbackHub) -> None:
    push_generator(made[1], "owner/points")
    with pytest.raises(HubError, match=r"owner/points makes regression adapters, which .*app\.py has no place for"):
        push_space(Path(__file__).parents[1] / "app.py", "owner/demo", ("owner/points",), dry_run=True)


def test_a_new_kind_is_merged_into_its_base(made: tuple[Zoo, Path, Path], tmp_path: Path) -> None:
    zoo, _, _ = made
    adapter = zoo.runs("along")[0].adapter()
    merged = save_merged(adapter, tmp_path / "merged")
    model = zoo.family.load_adapted(Backbone(str(merged)))
    assert error_of(model, None, POINTS["along"]) == pytest.approx(error_of(zoo.family.load_adapted(zoo.base), adapter, POINTS["along"]))


def test_a_name_belongs_to_one_class(made: tuple[Zoo, Path, Path]) -> None:
    for register, kind in ((register_family, RegressionFamily), (register_condition, Point), (register_component, PointConditionEncoder)):
        assert register(kind) is kind
        with pytest.raises(CondPDiffError, match=r"there is a .*already"):
            register(type(kind.__name__, (kind,), {}))
    with pytest.raises(CondPDiffError, match="there is a family 'text-to-image' already"):
        register_family(type("Painter", (RegressionFamily,), {"name": "text-to-image"}))
    assert type(FAMILIES["two-layer-regression"]) is RegressionFamily
    assert CONDITIONS["point"] is Point


def test_a_family_that_looks_like_a_shipped_one_is_recorded(
    recipe: dict[str, Any], tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("OtherEncoder", (SentenceEncoder,), {"name": "other-encoder"})
    monkeypatch.setitem(FAMILIES, "other-encoder", kind())
    short = {"tasks": ["moods"], "unseen": [], "runs": 1, "steps": 2, "multitask_steps": 0}
    section = {**recipe["collect"], "family": "other-encoder", **short}
    zoo = collect(parse(CollectConfig, section, "collect"), tasks_folder, tmp_path / "zoo")
    assert zoo.runs("moods")[0].adapter().family is FAMILIES["other-encoder"]


def test_without_its_modules_nothing_is_loaded(made: tuple[Zoo, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, generator, _ = made
    adapter = zoo.runs("along")[0].adapter()
    monkeypatch.delitem(FAMILIES, "two-layer-regression")
    monkeypatch.delitem(COMPONENTS, "PointConditionEncoder")
    monkeypatch.delattr("cond_pdiff.PointConditionEncoder", raising=False)
    with pytest.raises(CondPDiffError, match="no family of base models 'two-layer-regression'; known are causal-lm, diffusion"):
        _ = adapter.family
    again = LoraAdapter.load(adapter.scaled(0.5).save(tmp_path / "half"))  # with a card that says less
    assert again.spec.family == "two-layer-regression"
    with pytest.raises(HubError, match="PointConditionEncoder"):
        CondPDiffPipeline.from_pretrained(generator)
    with pytest.raises(HubError, match="PointConditionEncoder"):
        GeneratorInfo.read(generator)
