"""Ablations of the generator, for table 3: each is an entry of a recipe, trained on a zoo that is there."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic.dataclasses
import torch
from diffusers import schedulers
from pydantic import AliasChoices, Field

from cond_pdiff.codec import AdapterCodec
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.models.prompt_encoders import PromptReport
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.config import AS_GIVEN, STRICT, Amount, GuidanceScale, InferenceSteps, JsonObject
from cond_pdiff.training.evaluate.baselines import KernelRegression
from cond_pdiff.training.reproduce.cells import Step
from cond_pdiff.training.reproduce.experiment import Experiment, manifest_path, spread
from cond_pdiff.training.reproduce.principal_code import PrincipalCode
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.params import ZooParams

PARTS: tuple[Literal["description", "labels", "examples"], ...] = ("description", "labels", "examples")
"""The parts of a condition embedding, in the order of `SentenceConditionEncoder`."""

ONE_HOT = "one-hot"
DIFFUSION = "diffusion"
RIDGE = 0.1
"""The ridge of the conditional mean, which is asked for the tasks that it knows; leaving these out would say nothing about that."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Ablation:
    """One row of table 3."""

    group: str = Field(description="what is varied")
    name: str = Field(description="of the row")
    zoo: str = Field(
        default="runs", validation_alias=AliasChoices("zoo", "way"), description="of `reproduce`'s zoos: which it is trained on"
    )
    adapters: Amount = Field(default=0, description="of each task that are trained on (paper: N), evenly spread; 0: all")
    autoencoder: JsonObject = Field(default_factory=dict, description="changes of the stage")
    unet: JsonObject = Field(default_factory=dict, description="changes of the stage")
    pca: bool = Field(default=False, description="principal components instead of the autoencoder")
    condition: tuple[Literal["description", "labels", "examples", "one-hot"], ...] = Field(
        default=PARTS, description="parts of the prompt; or 'one-hot' alone: which task it is, and nothing else"
    )
    sampler: Literal["diffusion", "gaussian", "retrieval", "conditional mean"] = Field(
        default="diffusion", description="or what makes adapters without it"
    )
    blocks: Annotated[float, Field(gt=0, le=1), AS_GIVEN] = Field(
        default=1.0, description="share of the base model's first blocks that is generated, the rest is original"
    )
    num_inference_steps: InferenceSteps = Field(default=DEFAULT_STEPS, description="denoising steps")
    guidance_scale: GuidanceScale | None = Field(default=None, description="classifier-free guidance; none: the generator's own")
    scheduler: str = Field(default="", description="diffusers' name of another one than the generator's own")

    def __post_init__(self) -> None:
        if not self.condition or (ONE_HOT in self.condition and len(self.condition) > 1):
            raise ValueError(f"condition must be some of {PARTS}, or {ONE_HOT!r} alone, got {list(self.condition)}")
        if self.scheduler and not hasattr(schedulers, self.scheduler):
            raise ValueError(f"scheduler must be a class of diffusers.schedulers, got {self.scheduler!r}")

    def key(self, *entries: str) -> str:
        """Return a name for all that decides the result, or for these entries of it.

        An entry that came after the first results is left out where it says nothing, so that they need not be measured again.
        """
        facts = {name: value for name, value in asdict(self).items() if name in (entries or asdict(self)) and name not in ("group", "name")}
        if not self.scheduler:
            facts.pop("scheduler", None)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class GivenCondition:
    """A stand-in for a condition encoder: every prompt has this embedding, shape `(condition_dim,)`."""

    embedding: torch.Tensor
    condition_kind: ClassVar[type] = TaskPrompt
    text_model: ClassVar[None] = None

    def encode(self, conditions: list[Any]) -> tuple[torch.Tensor, list[PromptReport]]:
        """Return the embedding, once a condition."""
        return self.embedding.expand(len(conditions), -1), [PromptReport(0, 0)] * len(conditions)

    def encode_with_texts(self, conditions: list[Any]) -> tuple[torch.Tensor, list[PromptReport], dict[Any, torch.Tensor]]:
        """Return the same; no text was read."""
        return *self.encode(conditions), {}


class AblationRunner:
    """A runner that trains ablations, each once, and makes adapters with them.

    Args:
        experiment: with the tasks; trained stages are kept in `out/ablations`.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.config = experiment, experiment.settings.ablation
        self._zoos: dict[str, ZooParams] = {}
        self._last: tuple[Path, CondPDiffPipeline] | None = None

    def zoo(self, ablation: Ablation) -> ZooParams:
        """Read the adapters that the ablation is trained on."""
        if ablation.zoo not in self._zoos:
            folder = self.experiment.out / self._params_folder(ablation)
            self._zoos[ablation.zoo] = ZooParams.load(self.experiment.zoo(ablation.zoo, self.config.rank), folder)
        data = self._zoos[ablation.zoo]
        if not ablation.adapters:
            return data
        kept = [index for task in data.tasks.unique() for index in spread((data.tasks == task).nonzero()[:, 0].tolist(), ablation.adapters)]
        return data.part(kept)

    def steps(self, ablation: Ablation, seed: int) -> dict[str, Step]:
        """Return what is made before the ablation is measured, by path below the reproduction's folder."""
        zoos = [manifest_path(name, self.config.rank) for name in dict.fromkeys((self.experiment.config.table_zoos[0], ablation.zoo))]
        params = self._params_folder(ablation)
        found = {params: Step(partial(self.zoo, ablation), tuple(zoos))}
        if ablation.sampler == DIFFUSION:  # its training ends with a file
            found[f"{self._folder(ablation, seed)}/unet/run.json"] = Step(partial(self.pipeline, ablation, seed), (params,))
        return found

    def _params_folder(self, ablation: Ablation) -> str:
        return f"params/{ablation.zoo}-{self.config.rank}"

    def _folder(self, ablation: Ablation, seed: int) -> str:
        return f"ablations/{ablation.key('zoo', 'adapters', 'autoencoder', 'unet', 'pca', 'condition')}-{seed}"

    @cached_property
    def tasks(self) -> list[Task]:
        """All tasks in the order in which zoos number them, which is not the recipe's."""
        zoo = self.experiment.zoo(self.experiment.config.table_zoos[0], self.config.rank)
        return [self.experiment.tasks[name] for name in zoo.task_names]

    @cached_property
    def bank(self) -> ConditionBank:
        """Conditions of all tasks; the same for all ablations, which read parts of them."""
        return ConditionBank.build(self.tasks, self.experiment.settings.unet(), self.experiment.out)

    def embedding(self, ablation: Ablation, inputs: torch.Tensor, task: int) -> torch.Tensor:
        """Return what the ablation reads of condition embeddings of the task of this index; same shape."""
        if ablation.condition == (ONE_HOT,):
            return torch.zeros_like(inputs).index_fill(-1, torch.tensor(task), 1.0)
        read = torch.tensor([float(part in ablation.condition) for part in PARTS])
        return inputs * read.repeat_interleave(inputs.shape[-1] // len(PARTS))

    def prompt_embedding(self, ablation: Ablation, task: Task) -> torch.Tensor:
        """Return the embedding of a prompt that was not trained on, shape `(condition_dim,)`."""
        prompt = task.prompt(f"reproduce/{self.experiment.config.seed}", self.experiment.config.selection_rows)
        encoded = self.bank.encoder.encode([prompt])[0][0].float()
        return self.embedding(ablation, encoded, self.bank.names.index(task.name))

    def pipeline(self, ablation: Ablation, seed: int) -> CondPDiffPipeline:
        """Return the ablation's generator, trained if need be."""
        folder = self.experiment.out / self._folder(ablation, seed)
        if self._last is None or self._last[0] != folder:
            self._last = folder, self._train(ablation, seed, folder)
        return self._last[1]

    def _train(self, ablation: Ablation, seed: int, folder: Path) -> CondPDiffPipeline:
        settings, seeded = self.experiment.settings, {"fit": {"seed": seed}}
        data = self.zoo(ablation)
        stage = AutoencoderStage(data, settings.autoencoder(self.config.autoencoder, seeded, ablation.autoencoder))
        codec, origin = stage.codec, stage.identity
        if ablation.pca:
            code = PrincipalCode.fit(codec.normalizer, data.chunks(), stage.module.config.latent_dim)
            codec, origin = AdapterCodec(codec.template, codec.normalizer, code), {**origin, "pca": True}
            latents = codec.encode(data.chunks())
        else:
            stage.train(folder / stage.name)
            latents = stage.latents()
        inputs = torch.stack([self.embedding(ablation, rows, index) for index, rows in enumerate(self.bank.embeddings())])
        config = settings.unet(self.config.unet, seeded, ablation.unet)
        denoiser = DenoiserStage(codec, data, replace(self.bank, inputs=inputs), config, origin, latents)
        fit(denoiser, config.fit, folder / denoiser.name)
        pipe = denoiser.pipeline()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def params(self, ablation: Ablation, task: Task, seed: int) -> torch.Tensor:
        """Make params for a task with the ablation, shape `(samples, num_params)`."""
        data, count = self.zoo(ablation), self.config.samples
        seeds = [torch.Generator().manual_seed(1_000_003 * seed + index) for index in range(count)]
        embedding = self.prompt_embedding(ablation, task)
        if ablation.sampler == DIFFUSION:
            pipe = copy.copy(self.pipeline(ablation, seed))
            pipe.register_modules(condition_encoder=GivenCondition(embedding))
            if ablation.scheduler:
                pipe.register_modules(scheduler=getattr(schedulers, ablation.scheduler).from_config(pipe.scheduler.config))
            steps, guidance = ablation.num_inference_steps, ablation.guidance_scale
            made: torch.Tensor = pipe(task.description, count, steps, guidance, seeds, output_type="params")
            return made
        conditions = self.bank.embeddings()
        if ablation.sampler == "conditional mean":
            soups = torch.stack([data[data.tasks == index].mean(0) for index in range(len(self.bank.names))])
            regression = KernelRegression(conditions.mean(1), soups, RIDGE)
            return regression.predict(embedding[None]).expand(count, -1)
        nearest = (conditions @ embedding).amax(1).argmax()  # the task with the condition that is most like the prompt
        own = data[data.tasks == nearest]
        if ablation.sampler == "retrieval":
            return own[[(seed + index) % len(own) for index in range(count)]]
        noise = torch.stack([torch.randn(own.shape[1], generator=rng) for rng in seeds])
        return own.mean(0) + own.std(0, correction=0) * noise
