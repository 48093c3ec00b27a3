"""CondPDiffPipeline: condition → condition encoder → denoiser and scheduler → codec → adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import adapted_names
from cond_pdiff.codec import AdapterCodec, Autoencoder
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text
from cond_pdiff.defaults import DEFAULT_STEPS, REFINE_STEPS
from cond_pdiff.errors import ConditionError, CondPDiffError
from cond_pdiff.families.family import Family, family_of
from cond_pdiff.few_shot import KNOWN_SIMILARITY, Choice, FewShotRequest
from cond_pdiff.locks import load_once, lock_of
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.models.condition_encoder import ConditionEncoder, EncoderReport
from cond_pdiff.models.condition_index import ConditionIndex, Neighbour
from cond_pdiff.models.denoisers import Denoiser
from cond_pdiff.normalization import ParamNormalizer
from cond_pdiff.pipelines.generator_pipeline import GeneratorPipeline
from cond_pdiff.pipelines.inputs import (
    MAX_STEPS,
    check_generators,
    check_guided,
    check_output,
    check_refinement,
    check_schedule,
    only_condition,
)
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput, GenerationReport
from cond_pdiff.pipelines.provenance import generation_settings, recorded_seeds
from cond_pdiff.sampling import OnStep, check_count, denoise, is_guided

Callback = Callable[[Any, int, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]
MAX_ADAPTERS = 1000


class CondPDiffPipeline(GeneratorPipeline):
    """A diffusers pipeline that generates LoRA adapters from a condition (paper, sections 3.3 and 4.1 "inference procedures").

    Args:
        autoencoder: decodes latents to normalised params; a `ParamAutoencoder` or any other `Autoencoder`.
        unet: denoises latents; a `ParamUNet1D` or any other `Denoiser`.
        scheduler: any diffusers scheduler; a few-step solver by default.
        condition_encoder: turns a task prompt or a style image into a condition embedding.
        normalizer: normalised params ↔ params.
        template: layout, LoRA settings, base model and constant tensors.
        condition_index: the trained tasks.
    """

    model_cpu_offload_seq: Any = "unet->autoencoder"
    # These are small, and read in other ways than by `forward`, or have no parameters at all.
    _exclude_from_cpu_offload: Any = ("condition_encoder", "normalizer", "template", "condition_index")
    _callback_tensor_inputs = ("latents", "condition_embeddings")

    autoencoder: Autoencoder
    unet: Denoiser
    scheduler: Any
    condition_encoder: ConditionEncoder
    normalizer: ParamNormalizer
    template: AdapterTemplate
    condition_index: ConditionIndex

    def __init__(
        self,
        autoencoder: Autoencoder,
        unet: Denoiser,
        scheduler: Any,
        condition_encoder: ConditionEncoder,
        normalizer: ParamNormalizer,
        template: AdapterTemplate,
        condition_index: ConditionIndex,
    ) -> None:
        super().__init__()
        self.register_modules(
            autoencoder=autoencoder,
            unet=unet,
            scheduler=scheduler,
            condition_encoder=condition_encoder,
            normalizer=normalizer,
            template=template,
            condition_index=condition_index,
        )
        self._base: list[Any] = []
        self._guidance_scale = 1.0
        self._interrupt = False

    # --- steps --------------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """The classifier-free guidance of the call in progress; 1 is none."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress asks the denoiser twice a step, with the condition and without it."""
        return is_guided(self._guidance_scale)

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress is to stop: `pipe.interrupt = True` in a callback or another thread ends denoising after that step.

        The call goes on from the latents as they are then; its adapters record no seed, which would not make them again. Each call begins
        with False.
        """
        return self._interrupt

    @interrupt.setter
    def interrupt(self, stop: bool) -> None:
        self._interrupt = stop

    @property
    def codec(self) -> AdapterCodec:
        """The template, normaliser and autoencoder as one: params ↔ latents ↔ adapters."""
        return AdapterCodec(self.template, self.normalizer, self.autoencoder)

    def encode_condition(self, condition: Condition, num_adapters: int) -> tuple[torch.Tensor, EncoderReport]:
        """Return condition embeddings, shape `(num_adapters * views, condition_dim)`, each adapter's together, and the encoder's report."""
        return self._encode_condition(condition, num_adapters)[:2]

    def _encode_condition(
        self, condition: Condition, num_adapters: int
    ) -> tuple[torch.Tensor, EncoderReport, Mapping[Text, torch.Tensor]]:
        """Return also the embeddings of texts that the base model would make again, where it is the model that reads conditions."""
        embeddings, reports, texts = self.condition_encoder.encode_with_texts([condition])
        views = () if self.nearest(embeddings[0])[1] else condition.views()
        if views:
            embeddings = torch.cat([embeddings, self.condition_encoder.encode(views)[0]])
        return embeddings.to(self._execution_device, self.unet.dtype).repeat(num_adapters, 1), reports[0], (
            texts if self.condition_encoder.text_model == self.template.base else {}
        )

    def prepare_latents(
        self, num_adapters: int, generator: torch.Generator | Sequence[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Return initial noise of unit variance, shape `(num_adapters, channels, length)`; drawn in float32 whatever the precision."""
        shape = (num_adapters, *self.codec.latent_shape)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            rng = list(generator) if isinstance(generator, Sequence) else generator
            latents = randn_tensor(shape, rng, device=device, dtype=torch.float32).to(dtype)
        elif not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
            raise CondPDiffError(f"latents must be a tensor of shape {shape}, got {getattr(latents, 'shape', type(latents).__name__)}")
        else:
            latents = latents.to(device, dtype)
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents, shape `(batch, channels, length)`, into params, shape `(batch, num_params)`, float32 (`AdapterCodec.decode`)."""
        return self.codec.decode(latents)

    @torch.no_grad()
    def __call__(
        self,
        condition: Any = None,
        num_adapters: int = 1,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["adapter", "params", "pt", "latent"] = "adapter",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        *,
        prompt: str | TaskPrompt | None = None,
        image: Any = None,
        refine_steps: int = 0,
        refine_seed: int = 0,
        refine_seconds: float | None = None,
    ) -> Any:
        """Generate adapters for one condition. Threads that share a pipeline take turns.

        Args:
            condition: for a text generator a `TaskPrompt`, or a plain task description; for a style generator a `StyleImage`,
                a Pillow image, or the path or bytes of an image file, or a list of these: pictures of one style, in any order.
            num_adapters: how many candidates. With examples in the prompt, the one that does best on them is chosen (the paper
                generates 20 and chooses on training data), or the base model if it is expected to do better; of adapters with
                heads, one alone is not judged, nor compared with the base model.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 switches it off. Default: the generator's own. Another than 1 needs a generator that
                was trained without a condition too.
            generator: a `torch.Generator`, or one for each adapter: then each adapter depends on its own only. Default: a new one
                from a seed that is drawn; adapters record it.
            latents: initial noise, shape `(num_adapters, channels, length)`, instead of drawing it.
            output_type: "adapter"; or "params" (also "pt", as in diffusers) / "latent" for the tensor, without adapters.
            return_dict: False gives the output as a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; may return changed
                tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets: "latents", "condition_embeddings"; for an
                out-of-distribution style picture, `cond_pdiff.conditions.style_image.STYLE_VIEWS` of each for every adapter.
            timesteps: the scheduler's steps, falling, where it takes them, in the place of `num_inference_steps`.
            sigmas: its noise levels, falling, in the same way; Euler's end with 0.
            prompt, image: diffusers' words for `condition`, of a text or a style generator; give one of the three.
            refine_steps: go on from the chosen candidate with so many training steps on the prompt's labelled examples (say 12), or on the
                pictures (say 20; with `StyleImage(…, caption=…)` for each, on pictures and captions); the output's
                `adapter` is what they end in. They need the base model, which is loaded, and no thread that uses it meanwhile. 0: none.
            refine_seed: of all that these steps draw.
            refine_seconds: steps on labelled examples begin for so many seconds at most; twelve of them, unless `refine_steps` says it.

        Returns:
            `CondPDiffPipelineOutput`; a tuple of its fields with `return_dict=False`; params, shape `(num_adapters,
            num_params)`, or latents for those output types.

        Raises:
            ConditionError: the condition cannot be used.
            CondPDiffError: another argument is out of its range, or not for this generator's scheduler.
        """
        condition = only_condition(self.condition_encoder.condition_kind.keyword, condition, prompt, image)
        checked = self._check_inputs(condition, num_adapters, num_inference_steps, guidance_scale, generator, timesteps, sigmas)
        check_output(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_refinement(checked, refine_steps, refine_seed, refine_seconds, output_type)
        guidance_scale = self.unet.config.guidance_scale if guidance_scale is None else guidance_scale
        schedule = {name: list(steps) for name, steps in (("timesteps", timesteps), ("sigmas", sigmas)) if steps is not None}
        with lock_of(self.unet):  # guidance scale, interruption, offloading and the scheduler have state
            self._guidance_scale, self._interrupt = guidance_scale, False
            if generator is None:  # so that it is recorded which adapter this is
                generator = torch.Generator().manual_seed(int(torch.randint(2**32, ())))
            seeds = recorded_seeds(None if latents is not None else generator, num_adapters)
            condition_embeddings, condition_report, at_hand = self._encode_condition(checked, num_adapters)
            latents = self.prepare_latents(num_adapters, generator, latents)
            with self.progress_bar(total=num_inference_steps) as bar:
                on_step = self._step_hook(bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
                latents = self._denoise(latents, condition_embeddings, num_inference_steps, generator, on_step, schedule)
            if self._interrupt:  # no seed makes these again
                seeds = [None] * num_adapters
            if schedule:
                num_inference_steps = len(self.scheduler.timesteps.unique())
            if output_type == "adapter":
                tensors = self.codec.decode_tensors(latents)
            else:
                result = latents if output_type == "latent" else self.decode(latents)
            self.maybe_free_model_hooks()
            if output_type != "adapter":
                return result
            asked = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "num_adapters": num_adapters, **schedule}
            settings = generation_settings(self.scheduler, self.unet.dtype, self._execution_device, generator, self._source)
        made = [{**asked, **settings, "candidate": index, "seed": seed} for index, seed in enumerate(seeds)]
        output = self._to_output(checked, tensors, made, latents, condition_embeddings[0], condition_report, at_hand)
        if refine_steps or refine_seconds is not None:
            output = self._refined(output, checked, refine_steps or REFINE_STEPS, refine_seed, refine_seconds)
        return output if return_dict else output.to_tuple()

    # --- internals ----------------------------------------------------------------------------------------------

    def _step_hook(self, bar: Any, callback: Callback | None, names: Sequence[str]) -> OnStep:
        """Return what follows each step: the caller's callback, the progress bar, and whether to go on."""

        def on_step(
            index: int, timestep: torch.Tensor, latents: torch.Tensor, embeddings: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, bool]:
            tensors = {"latents": latents, "condition_embeddings": embeddings}
            if callback is not None:
                tensors |= callback(self, index, timestep, {name: tensors[name] for name in names}) or {}
            bar.total = len(self.scheduler.timesteps)  # known only now, and more than were asked for where a solver looks twice at each
            bar.update()
            return tensors["latents"], tensors["condition_embeddings"], not self.interrupt

        return on_step

    def _denoise(
        self,
        noise: torch.Tensor,
        embeddings: torch.Tensor,
        num_inference_steps: int,
        generator: torch.Generator | Sequence[torch.Generator],
        on_step: OnStep,
        schedule: dict[str, Any],
    ) -> torch.Tensor:
        """Return each adapter's latents, shape of `noise`: the mean over the views of its condition, which all begin at the same noise."""
        views = len(embeddings) // len(noise)
        drawn = [rng for rng in generator for _ in range(views)] if isinstance(generator, Sequence) else generator
        start, steps, guidance = noise.repeat_interleave(views, 0), num_inference_steps, self.guidance_scale
        made = denoise(self.unet, self.scheduler, start, embeddings, steps, guidance, drawn, on_step, **schedule)
        return made.unflatten(0, (len(noise), views)).mean(1)

    def nearest(self, embedding: torch.Tensor) -> tuple[tuple[Neighbour, ...], bool]:
        """Return the nearest trained tasks of a condition, and whether it is in-distribution."""
        nearest = tuple(self.condition_index.nearest(embedding.to(self.condition_index.device, torch.float32)))
        return nearest, bool(nearest) and self.condition_index.in_distribution(nearest[0].similarity)

    def _to_output(
        self,
        condition: Condition,
        tensors: Sequence[Mapping[str, torch.Tensor]],
        made: Sequence[dict[str, Any]],
        latents: torch.Tensor,
        embedding: torch.Tensor,
        condition_report: EncoderReport,
        at_hand: Mapping[Text, torch.Tensor] | None = None,
    ) -> CondPDiffPipelineOutput:
        nearest, inside = self.nearest(embedding)
        metadata = {
            "condition": condition.to_json(),
            "nearest": [[neighbour.task, neighbour.similarity] for neighbour in nearest],
            "in_distribution": inside,
        }
        trained = tuple(self.condition_index.config.tasks[nearest[0].task].get("labels", ())) if inside else ()
        classes = condition.classes(trained, bool(self.template.spec.modules_to_save))
        labels, labels_from = classes or ((), "nowhere")
        if classes is not None:
            metadata["labels"] = list(labels)
        if condition.descriptions:
            metadata["label_descriptions"] = {label: list(texts) for label, texts in condition.descriptions.items()}
        adapters = [self.template.adapter_of(each, {**metadata, **facts}) for each, facts in zip(tensors, made, strict=True)]
        choice = self._choose(adapters, labels, condition, nearest, at_hand or {})
        threshold = round(float(self.condition_index.threshold), 4)
        report = GenerationReport(nearest, inside, threshold, condition_report, labels, labels_from, choice)
        return CondPDiffPipelineOutput(adapters, choice.index if choice else 0, report, latents)

    def _refined(
        self, output: CondPDiffPipelineOutput, condition: Condition, steps: int, seed: int, seconds: float | None
    ) -> CondPDiffPipelineOutput:
        """Go on from the chosen adapter, also where examples prefer the base model: on the mean, a generated one is the better start."""
        base, start = self.base_model(), output.adapters[output.chosen]
        with torch.enable_grad():
            return replace(output, refined=self.family.refine(base, start, condition, steps, seed, seconds))

    @property
    def family(self) -> Family:
        """The family of base models that the generator's adapters are for.

        Raises:
            CondPDiffError: it is not known here.
        """
        found = family_of(self.template.spec, adapted_names(self.template.layout.shapes))
        if found is None:
            raise CondPDiffError(f"adapters for {self.template.base.repo_id!r} are of no family of base models that is known here")
        return found

    def base_model(self) -> Any:
        """Return the frozen base model, as its family loads it; on first use. Never attach to it for longer than a call."""
        family = self.family
        base = load_once(self._base, lambda: family.load(self.template.base, self.template.spec, self._head_labels))
        base.to(self._execution_device)
        return base

    @property
    def _head_labels(self) -> int | None:
        """The number of labels that the adapters' heads tell apart; None where they bring none, or no trained task says it."""
        task: dict[str, Any] = next(iter(self.condition_index.config.tasks.values()), {})
        return len(task.get("labels", ())) or None if self.template.spec.modules_to_save else None

    def _choose(
        self,
        adapters: Sequence[LoraAdapter],
        labels: Sequence[str],
        condition: Condition,
        nearest: Sequence[Neighbour],
        at_hand: Mapping[Text, torch.Tensor],
    ) -> Choice | None:
        if not condition.examples or len(adapters) < self.family.fewest_judged:
            return None
        length, similarity = self.template.config.max_length, nearest[0].similarity if nearest else 0.0
        known, model = self.knows(nearest, labels), self.condition_index.gain_model
        request = FewShotRequest(labels, condition.examples, length, similarity, known, model, at_hand, condition.descriptions)
        return self.family.choose(self.base_model(), adapters, request)

    def knows(self, nearest: Sequence[Neighbour], labels: Sequence[str]) -> bool:
        """Return whether a request with these neighbours and label names is one of the trained tasks, in about its own words."""
        near = [neighbour.task for neighbour in nearest if neighbour.similarity >= KNOWN_SIMILARITY]
        return any(set(self.condition_index.config.tasks[task].get("labels", ())) == set(labels) for task in near)

    def _check_inputs(
        self,
        condition: Any,
        num_adapters: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
    ) -> Condition:
        check_count("num_adapters", num_adapters, MAX_ADAPTERS)
        check_count("num_inference_steps", num_inference_steps, MAX_STEPS)
        check_schedule(timesteps, sigmas)
        if guidance_scale is not None:
            check_guided(guidance_scale, self.unet.config.unconditional)
        check_generators(generator, num_adapters)
        checked = self.condition_encoder.condition_kind.of(condition)
        told = self._head_labels
        if told is not None and len(checked.labels) not in (0, told):
            raise ConditionError(f"the adapters' heads tell {told} labels apart, the prompt names {len(checked.labels)}")
        return checked
