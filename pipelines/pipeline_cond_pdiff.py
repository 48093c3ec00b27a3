"""CondPDiffPipeline: condition → condition encoder → U-Net and scheduler → decoder → normaliser⁻¹ → layout → adapters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.attach import adapted_names
from cond_pdiff.component import PathlessConfig
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.conditions.texts import Text
from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.errors import ConditionError, CondPDiffError, HubError
from cond_pdiff.families.family import Family, family_of
from cond_pdiff.few_shot import KNOWN_SIMILARITY, Choice
from cond_pdiff.hub import check_generator, find_generator, generator_source
from cond_pdiff.locks import LOADING, load_once, lock_of
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.models.condition_encoder import ConditionEncoder, EncoderReport
from cond_pdiff.models.condition_index import ConditionIndex, Neighbour
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.models.param_unet_1d import ParamUNet1D
from cond_pdiff.normalization import ParamNormalizer, extra_length, split_statistics
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput, GenerationReport
from cond_pdiff.pipelines.provenance import machine_facts, package_versions, recorded_seeds, scheduler_settings
from cond_pdiff.publish import add_card, push_generator
from cond_pdiff.sampling import check_count, check_guidance, denoise

MAX_ADAPTERS = 1000
BROKEN_GENERATOR = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError, AssertionError),
    SafetensorError,
)
"""What diffusers and torch raise on settings and weights that make no sense."""

REFUSED_OPTIONS = ("trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx", "use_safetensors")


class CondPDiffPipeline(PathlessConfig, DiffusionPipeline):
    """Generate LoRA adapters from a condition (paper, sections 3.3 and 4.1 "inference procedures").

    Args:
        autoencoder: decodes latents to normalised params.
        unet: denoises latents.
        scheduler: any diffusers scheduler; a few-step solver by default.
        condition_encoder: turns a task prompt or a style image into a condition embedding.
        normalizer: normalised params ↔ params.
        template: layout, LoRA settings, base model and constant tensors.
        condition_index: the trained tasks.
    """

    model_cpu_offload_seq: Any = "condition_encoder->unet->autoencoder"
    _exclude_from_cpu_offload: Any = ("normalizer", "template", "condition_index")  # small, and read in other ways than by `forward`
    _callback_tensor_inputs = ("latents", "condition_embeddings")

    autoencoder: ParamAutoencoder
    unet: ParamUNet1D
    scheduler: Any
    condition_encoder: ConditionEncoder
    normalizer: ParamNormalizer
    template: AdapterTemplate
    condition_index: ConditionIndex

    def __init__(
        self,
        autoencoder: ParamAutoencoder,
        unet: ParamUNet1D,
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
        self._source: dict[str, str | None] | None = None
        self._card_folder: Path | None = None
        self._guidance_scale = 1.0
        self._interrupt = False

    # --- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """The local folder of a generator: bundled, cached, or fetched (only JSON, safetensors, text; never code)."""
        options = {
            name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only", "force_download") if name in kwargs
        }
        return str(find_generator(pretrained_model_name, **options))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any], **kwargs: Any) -> CondPDiffPipeline:
        """Load a generator from a local folder, by the name of a bundled one, or from the Hub.

        Args:
            kwargs: as for every diffusers pipeline (`dtype`, `revision`, `token`, `cache_dir`, `local_files_only`,
                `variant`, components to replace …).

        Raises:
            HubError: not found, not reachable, incomplete, or not a generator of this package.
        """
        refused = [name for name in REFUSED_OPTIONS if name in kwargs]
        if refused:
            raise HubError(f"{refused[0]} is not accepted: generators are JSON and safetensors only, and no code is run from them")
        folder = Path(cls.download(str(pretrained_model_name_or_path), **kwargs))
        check_generator(folder)
        try:
            with LOADING:
                pipe: CondPDiffPipeline = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
        except CondPDiffError:
            raise
        except BROKEN_GENERATOR as error:
            raise HubError(
                f"the generator {str(pretrained_model_name_or_path)!r} cannot be loaded, perhaps it is incomplete: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not set(pipe.components) & set(kwargs):  # with another component, adapters could not be made again from the name
            pipe._source, pipe._card_folder = generator_source(str(pretrained_model_name_or_path), folder), folder
        return pipe

    def to(self, *args: Any, **kwargs: Any) -> CondPDiffPipeline:
        """Move and cast as any diffusers pipeline; half precision is for the CPU too, so diffusers' warnings of it are not printed."""
        pipe: CondPDiffPipeline = super().to(*args, **{"silence_dtype_warnings": True, **kwargs})
        return pipe

    # --- saving -------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[Any],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save every component and the card.

        Args:
            save_directory: created if need be.
            safe_serialization: must be true.
            variant: say "fp16", for weights saved beside those of another precision.
            push_to_hub: also push it, to `repo_id` (default: the folder's name in your namespace).
            use_flashpack: must be false.
            kwargs: with `push_to_hub`, `repo_id` and the options of `cond_pdiff.hub.push_folder`.

        Raises:
            HubError: another format was asked for, or the push failed; the saved folder is complete in that case.
        """
        if not safe_serialization or use_flashpack:
            raise HubError("generators are saved as safetensors only; leave safe_serialization as it is")
        if kwargs and not push_to_hub:
            raise HubError(f"{next(iter(kwargs))} means something with push_to_hub=True only")
        super().save_pretrained(str(save_directory), True, variant, max_shard_size)
        add_card(Path(save_directory), self._card_folder)
        if push_to_hub:
            push_generator(Path(save_directory), str(kwargs.pop("repo_id", Path(save_directory).absolute().name)), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Push the generator with its card to a Hub repository, which is created if there is none.

        Args:
            private: for a new repository.
            create_pr: open a pull request instead of committing.
            safe_serialization: must be true.
            variant: see `save_pretrained`.
            subfolder: must be None: a generator is a whole repository.
            revision: a branch, created if there is none.

        Returns:
            The address of the commit or pull request.

        Raises:
            HubError: see `cond_pdiff.hub.push_folder`.
        """
        if subfolder is not None:
            raise HubError(f"a generator is a whole repository; it cannot be pushed to the subfolder {subfolder!r}")
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, safe_serialization, variant)
            options = {"commit_message": commit_message} if commit_message else {}
            push = push_generator(folder, repo_id, private=private, token=token, create_pr=create_pr, revision=revision, **options)
        return str(push.url)

    # --- steps --------------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """The classifier-free guidance of the call in progress; 1 is none."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop denoising."""
        return self._interrupt

    def encode_condition(self, condition: Condition, num_adapters: int) -> tuple[torch.Tensor, EncoderReport]:
        """Condition embeddings, shape `(num_adapters * views, condition_dim)`, each adapter's together, and the encoder's report."""
        embeddings, reports = self.condition_encoder.encode([condition])
        views = () if self.nearest(embeddings[0])[1] else condition.views()
        if views:
            embeddings = torch.cat([embeddings, self.condition_encoder.encode(views)[0]])
        return embeddings.to(self._execution_device, self.unet.dtype).repeat(num_adapters, 1), reports[0]

    def prepare_latents(
        self, num_adapters: int, generator: torch.Generator | Sequence[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Initial noise of unit variance, shape `(num_adapters, channels, length)`; drawn in float32 whatever the precision."""
        channels, length = self.autoencoder.latent_shape
        shape = (num_adapters, channels, length + extra_length(self.normalizer.num_statistics, channels))
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
        """Latents, shape `(batch, channels, length)` → params, shape `(batch, num_params)`, float32."""
        code, statistics = split_statistics(latents, self.normalizer.num_statistics)
        values = self.autoencoder.decode(code.to(self.autoencoder.dtype))
        return self.normalizer.denormalize(values.float(), statistics.float())

    @torch.no_grad()
    def __call__(
        self,
        condition: Any,
        num_adapters: int = 1,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["adapter", "params", "latent"] = "adapter",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generate adapters for one condition. Threads that share a pipeline take turns.

        Args:
            condition: for a text generator a `TaskPrompt`, or a plain task description; for a style generator a `StyleImage`,
                a Pillow image, or the path or bytes of an image file.
            num_adapters: how many candidates. With examples in the prompt, the one that does best on them is chosen (the paper
                generates 20 and chooses on training data), or the base model if it is expected to do better; of adapters with
                heads, one alone is not judged, nor compared with the base model.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 switches it off. Default: the generator's own. Another than 1 needs a generator that
                was trained without a condition too.
            generator: a `torch.Generator`, or one for each adapter: then each adapter depends on its own only. Default: a new one
                from a seed that is drawn; adapters record it.
            latents: initial noise, shape `(num_adapters, channels, length)`, instead of drawing it.
            output_type: "adapter"; or "params" / "latent" for the tensor, without adapters.
            return_dict: False gives the output as a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; may return changed
                tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets: "latents", "condition_embeddings"; for an
                out-of-distribution style picture, `cond_pdiff.conditions.style_image.STYLE_VIEWS` of each for every adapter.

        Returns:
            `CondPDiffPipelineOutput`; a tuple of its fields with `return_dict=False`; params, shape `(num_adapters,
            num_params)`, or latents for those output types.

        Raises:
            ConditionError: the condition cannot be used.
            CondPDiffError: another argument is out of its range.
        """
        checked = self._check_inputs(
            condition, num_adapters, num_inference_steps, guidance_scale, generator, output_type, callback_on_step_end_tensor_inputs
        )
        guidance_scale = self.unet.config.guidance_scale if guidance_scale is None else guidance_scale
        with lock_of(self.unet):  # guidance scale, interruption, offloading and the scheduler have state
            self._guidance_scale, self._interrupt = guidance_scale, False
            if generator is None:  # so that it is recorded which adapter this is
                generator = torch.Generator().manual_seed(int(torch.randint(2**32, ())))
            seeds = recorded_seeds(None if latents is not None else generator, num_adapters)
            condition_embeddings, condition_report = self.encode_condition(checked, num_adapters)
            latents = self.prepare_latents(num_adapters, generator, latents)
            views = len(condition_embeddings) // num_adapters
            latents = latents.repeat_interleave(views, 0)
            drawn = [rng for rng in generator for _ in range(views)] if isinstance(generator, Sequence) else generator
            with self.progress_bar(total=num_inference_steps) as bar:

                def on_step(
                    index: int, timestep: torch.Tensor, latents: torch.Tensor, embeddings: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor, bool]:
                    tensors = {"latents": latents, "condition_embeddings": embeddings}
                    if callback_on_step_end is not None:
                        asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        tensors |= callback_on_step_end(self, index, timestep, asked) or {}
                    bar.update()
                    return tensors["latents"], tensors["condition_embeddings"], not self.interrupt

                latents = denoise(
                    self.unet, self.scheduler, latents, condition_embeddings, num_inference_steps, guidance_scale, drawn, on_step
                )
            latents = latents.unflatten(0, (num_adapters, views)).mean(1)
            result = latents if output_type == "latent" else self.decode(latents)
            self.maybe_free_model_hooks()
            if output_type != "adapter":
                return result
            settings = {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                **scheduler_settings(self.scheduler),
                "dtype": str(self.unet.dtype).removeprefix("torch."),
                "num_adapters": num_adapters,
                "generators": "each" if isinstance(generator, Sequence) else "one",
                "generator": self._source,
                "machine": machine_facts(self._execution_device),
                "versions": package_versions(),
            }
        made = [{**settings, "candidate": index, "seed": seed} for index, seed in enumerate(seeds)]
        output = self._to_output(checked, result, made, latents, condition_embeddings[0], condition_report)
        return output if return_dict else output.to_tuple()

    # --- internals ----------------------------------------------------------------------------------------------

    def nearest(self, embedding: torch.Tensor) -> tuple[tuple[Neighbour, ...], bool]:
        """The nearest trained tasks of a condition, and is it in-distribution?"""
        nearest = tuple(self.condition_index.nearest(embedding.to(self.condition_index.device, torch.float32)))
        return nearest, bool(nearest) and self.condition_index.in_distribution(nearest[0].similarity)

    def _to_output(
        self,
        condition: Condition,
        params: torch.Tensor,
        made: Sequence[dict[str, Any]],
        latents: torch.Tensor,
        embedding: torch.Tensor,
        condition_report: EncoderReport,
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
        adapters = [self.template.to_adapter(row, {**metadata, **facts}) for row, facts in zip(params, made, strict=True)]
        choice = self._choose(adapters, labels, condition.examples, nearest)
        threshold = round(float(self.condition_index.threshold), 4)
        report = GenerationReport(nearest, inside, threshold, condition_report, labels, labels_from, choice)
        return CondPDiffPipelineOutput(adapters, choice.index if choice else 0, report, latents)

    @property
    def family(self) -> Family:
        """The family of base models that its adapters are for.

        Raises:
            CondPDiffError: it is not known here.
        """
        found = family_of(self.template.spec, adapted_names(self.template.layout.shapes))
        if found is None:
            raise CondPDiffError(f"adapters for {self.template.base.repo_id!r} are of no family of base models that is known here")
        return found

    def base_model(self) -> Any:
        """The frozen base model, as its family loads it; on first use. Never attach to it for longer than a call."""
        family, spec = self.family, self.template.spec
        labels = next(iter(self.condition_index.config.tasks.values())).get("labels", ())
        base = load_once(self._base, lambda: family.load(self.template.base, spec, len(labels)))
        base.to(self._execution_device)
        return base

    def _choose(
        self, adapters: Sequence[LoraAdapter], labels: Sequence[str], examples: Sequence[tuple[Text, str]], nearest: Sequence[Neighbour]
    ) -> Choice | None:
        if not examples or len(adapters) < self.family.fewest_judged:
            return None
        length, similarity = self.template.config.max_length, nearest[0].similarity if nearest else 0.0
        known, model = self.knows(nearest, labels), self.condition_index.gain_model
        return self.family.choose(self.base_model(), adapters, labels, examples, length, similarity, known, model)

    def knows(self, nearest: Sequence[Neighbour], labels: Sequence[str]) -> bool:
        """Is a request with these neighbours and label names one of the trained tasks, in about its own words?"""
        near = [neighbour.task for neighbour in nearest if neighbour.similarity >= KNOWN_SIMILARITY]
        return any(set(self.condition_index.config.tasks[task].get("labels", ())) == set(labels) for task in near)

    def _check_guidance(self, scale: float) -> None:
        check_guidance(scale)
        if scale != 1 and not self.unet.config.unconditional:
            raise CondPDiffError(
                f"guidance_scale is {scale:g}, but this generator was never trained without a condition (condition_dropout 0), so there is "
                "nothing to guide away from; leave it out, or say 1"
            )

    def _check_inputs(
        self,
        condition: Any,
        num_adapters: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        callback_tensors: Sequence[str],
    ) -> Condition:
        check_count("num_adapters", num_adapters, MAX_ADAPTERS)
        check_count("num_inference_steps", num_inference_steps, 1000)
        if guidance_scale is not None:
            self._check_guidance(guidance_scale)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * (generator is not None)
        if not all(isinstance(rng, torch.Generator) for rng in generators):
            raise CondPDiffError(f"generator must be a torch.Generator, or a list of them, got {generator!r:.80}")
        if isinstance(generator, Sequence) and len(generator) != num_adapters:
            raise CondPDiffError(f"got {len(generator)} generators for {num_adapters} adapters; give one each")
        if output_type not in ("adapter", "params", "latent"):
            raise CondPDiffError(f"output_type must be 'adapter', 'params' or 'latent', got {output_type!r}")
        unknown = [name for name in callback_tensors if name not in self._callback_tensor_inputs]
        if unknown:
            raise CondPDiffError(f"callbacks can have {list(self._callback_tensor_inputs)}, not {unknown[0]!r}")
        if isinstance(condition, (list, tuple)):
            raise ConditionError("one condition a call, please; num_adapters gives several adapters for it")
        checked = self.condition_encoder.condition_kind.of(condition)
        told = len(next(iter(self.condition_index.config.tasks.values())).get("labels", ()))
        if self.template.spec.modules_to_save and len(checked.labels) not in (0, told):
            raise ConditionError(f"the adapters' heads tell {told} labels apart, the prompt names {len(checked.labels)}")
        return checked
