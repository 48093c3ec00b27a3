"""GeneratorPipeline: how the files of a generator are found, checked, loaded, saved with their card, and pushed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Self

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError

from cond_pdiff.component import PathlessConfig
from cond_pdiff.errors import CondPDiffError, HubError
from cond_pdiff.hub import check_generator, find_generator
from cond_pdiff.locks import LOADING
from cond_pdiff.pipelines.provenance import generator_source
from cond_pdiff.publish import add_card, push_generator

BROKEN_GENERATOR = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError, AssertionError),
    SafetensorError,
)
"""The errors that diffusers and torch raise on settings and weights that make no sense."""

REFUSED_OPTIONS = ("trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx", "use_safetensors")


class GeneratorPipeline(PathlessConfig, DiffusionPipeline):
    """A diffusers pipeline that is safetensors and JSON only, is fetched without code, and has a card."""

    def __init__(self) -> None:
        super().__init__()
        self._source: dict[str, str | None] | None = None
        self._card_folder: Path | None = None

    # --- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Return the local folder of a generator: bundled, cached, or fetched (only JSON, safetensors, text; never code)."""
        options = {
            name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only", "force_download") if name in kwargs
        }
        return str(find_generator(pretrained_model_name, **options))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any], **kwargs: Any) -> Self:
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
                pipe: Self = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
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

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast as any diffusers pipeline; half precision is for the CPU too, so diffusers' warnings of it are not printed."""
        pipe: Self = super().to(*args, **{"silence_dtype_warnings": True, **kwargs})
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
