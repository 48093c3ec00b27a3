"""Condition encoders for task prompts: a prompt → a condition embedding, shape `(batch, condition_dim)` (paper, section 3.3).

Both encoders report how many tokens a condition has and what did not fit; nothing is cut without a word. The frozen backbone
is referenced (id, revision, sha256) and never saved with the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import nn

from cond_pdiff.component import ExactComponent, register_component
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.conditions.texts import Text, label_text
from cond_pdiff.errors import ConditionError
from cond_pdiff.hub import MINILM, Backbone, find_backbone
from cond_pdiff.locks import load_once
from cond_pdiff.models.condition_encoder import ConditionEncoder, EncoderReport
from cond_pdiff.models.sentence_backbone import SentenceBackbone


@dataclass(frozen=True)
class PromptReport(EncoderReport):
    """A report of what an encoder read of a prompt.

    Args:
        tokens: of the longest text that was encoded, special tokens included.
        token_limit: of the encoder, for one text.
        examples_dropped: examples left out because the prompt was too long.
        texts_cut: example texts of which only the beginning was read.
    """

    condition_kind: ClassVar[type[TaskPrompt]] = TaskPrompt

    tokens: int
    token_limit: int
    examples_dropped: int = 0
    texts_cut: int = 0

    @property
    def cuts(self) -> str:
        """The examples and texts that did not fit, in words; empty if all did."""
        if not self.examples_dropped and not self.texts_cut:
            return ""
        return f"{self.examples_dropped} examples dropped, {self.texts_cut} texts cut at {self.token_limit} tokens"


@register_component
class SentenceConditionEncoder(ExactComponent, ConditionEncoder):  # type: ignore[misc]  # as in `Component`
    """A sentence encoder over the parts of a prompt: its description, its label names (or free answers), its example texts.

    The embedding is three unit vectors side by side (a missing part is all zeros): the description's, the mean over label
    names or answers, and the mean over example texts, each with the training tasks' mean taken away. Prompts share most of their
    wording ("Decide whether …"); without that mean the differences count.

    Args:
        backbone: reference of a sentence encoder (`Backbone.to_json`).
        embedding_dim: its hidden size.
        max_tokens: of one text.
    """

    condition_kind = TaskPrompt
    index_options: Mapping[str, Any] = {"num_parts": 3, "last_is_evidence": True}
    center: torch.Tensor

    @register_to_config
    def __init__(self, backbone: Mapping[str, Any] = MINILM.to_json(), embedding_dim: int = 384, max_tokens: int = 256) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3, embedding_dim))
        # Kept out of the module tree: a frozen backbone is neither saved nor counted, and is loaded on first use.
        self._loaded: list[SentenceBackbone] = []

    @property
    def text_model(self) -> Backbone:
        """The frozen sentence encoder's reference."""
        return Backbone.from_json(self.config.backbone)

    @property
    def condition_dim(self) -> int:
        """The length of a condition embedding."""
        return 3 * self.config.embedding_dim

    @property
    def backbone(self) -> SentenceBackbone:
        """The frozen sentence encoder, on this module's device."""
        backbone = load_once(self._loaded, lambda: SentenceBackbone.load(self.text_model))
        backbone.to(self.center.device)
        return backbone

    def encode(self, conditions: Sequence[str | TaskPrompt]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Return condition embeddings, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: not a prompt, or a description of more than `max_tokens` tokens.
        """
        return self._encode(conditions, self.backbone.embed)[:2]

    def encode_with_texts(
        self, conditions: Sequence[str | TaskPrompt]
    ) -> tuple[torch.Tensor, Sequence[EncoderReport], Mapping[Text, torch.Tensor]]:
        """See `ConditionEncoder`."""
        return self._encode(conditions, self.backbone.embed)

    def encode_apart(self, conditions: Sequence[str | TaskPrompt]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """See `ConditionEncoder`; texts of many conditions are embedded together all the same."""
        return self._encode(conditions, self.backbone.embed_apart)[:2]

    def _encode(
        self, conditions: Sequence[str | TaskPrompt], embed: Callable[[list[Text], int], torch.Tensor]
    ) -> tuple[torch.Tensor, Sequence[EncoderReport], Mapping[Text, torch.Tensor]]:
        prompts = [TaskPrompt.of(condition) for condition in conditions]
        backbone = self.backbone
        reports = [self._report(backbone, prompt) for prompt in prompts]
        parts, texts = self._parts(prompts, embed)
        present = parts.norm(dim=2, keepdim=True) > 0
        centered = nn.functional.normalize(parts - self.center.to(parts), dim=2) * present
        tokens = backbone.token_counts(list(texts))
        whole = {text: row for (text, row), count in zip(texts.items(), tokens, strict=True) if count <= self.config.max_tokens}
        return centered.flatten(1).to(self.center.dtype), reports, whole

    @torch.no_grad()
    def fit_center(self, prompts: Sequence[TaskPrompt]) -> None:
        """Measure the mean of each part over `prompts`, which must all have labels and examples."""
        self.center.copy_(self._parts(prompts, self.backbone.embed)[0].mean(0))

    def _parts(
        self, prompts: Sequence[TaskPrompt], embed: Callable[[list[Text], int], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[Text, torch.Tensor]]:
        """Return the unit-length means of the three parts before centring, shape `(len(prompts), 3, embedding_dim)`, and each text's."""
        groups: list[list[Text]] = []
        for prompt in prompts:
            names: list[Text] = [*map(label_text, prompt.labels)] or [answer for _, answer in prompt.examples]
            groups += [[prompt.description], names, [text for text, _ in prompt.examples]]
        # Prompts of one task share most texts; each is embedded once.
        place = {text: index for index, text in enumerate(dict.fromkeys(text for group in groups for text in group))}
        embeddings = embed(list(place), self.config.max_tokens)
        nothing = embeddings.new_zeros(embeddings.shape[1])
        means = [embeddings[[place[text] for text in group]].mean(0) if group else nothing for group in groups]
        parts = nn.functional.normalize(torch.stack(means), dim=1).unflatten(0, (len(prompts), 3))
        return parts, dict(zip(place, embeddings, strict=True))

    def _report(self, backbone: SentenceBackbone, prompt: TaskPrompt) -> PromptReport:
        limit = self.config.max_tokens
        tokens = backbone.count_tokens(prompt.description)
        if tokens > limit:
            raise ConditionError(f"the task description has {tokens} tokens; the condition encoder reads {limit}: shorten it")
        lengths = backbone.token_counts([text for text, _ in prompt.examples])
        return PromptReport(max([tokens, *lengths]), limit, texts_cut=sum(length > limit for length in lengths))


@register_component
class ClipConditionEncoder(ConditionEncoder):
    """The text tower of an open_clip model over description and examples in one text, as in the paper.

    CLIP reads 77 tokens. Examples that do not fit are dropped, last first, and counted in the report.

    Args:
        model_name: an open_clip architecture.
        backbone: reference of a repository with `open_clip_model.safetensors`, or None for random weights (tests).
        condition_dim: size of the model's text features.
    """

    condition_kind = TaskPrompt
    anchor: torch.Tensor

    @register_to_config
    def __init__(
        self,
        model_name: str = "ViT-B-32",
        backbone: Mapping[str, Any] | None = Backbone("timm/vit_base_patch32_clip_224.openai").to_json(),
        condition_dim: int = 512,
    ) -> None:
        super().__init__()
        # All weights are the backbone's; this says where they belong, and gives the saved encoder a tensor.
        self.register_buffer("anchor", torch.zeros(1))
        self._loaded: list[tuple[nn.Module, Any]] = []

    @property
    def backbone(self) -> tuple[nn.Module, Any]:
        """The open_clip model and its tokenizer, on this module's device."""
        model, tokenizer = load_once(self._loaded, self._load)
        return model.to(self.anchor.device), tokenizer

    def _load(self) -> tuple[nn.Module, Any]:
        import open_clip

        # Random weights, where asked for, are the same in every process and leave the caller's RNG alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(self.config.model_name, pretrained=None)
        if self.config.backbone is not None:
            weights = "open_clip_model.safetensors"
            folder = find_backbone(Backbone.from_json(self.config.backbone), weights)
            model.load_state_dict(load_file(folder / weights))
        return model.requires_grad_(False).eval(), open_clip.get_tokenizer(self.config.model_name)

    @torch.no_grad()
    def encode(self, conditions: Sequence[str | TaskPrompt]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Return unit-length text features, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: not a prompt, or a description that alone is too long.
        """
        model, tokenizer = self.backbone
        fitted = [self._fit(TaskPrompt.of(condition)) for condition in conditions]
        tokens = tokenizer([text for text, _ in fitted]).to(self.anchor.device)
        features = model.encode_text(tokens)  # type: ignore[operator]
        return nn.functional.normalize(features, dim=-1).to(self.anchor.dtype), [report for _, report in fitted]

    def _fit(self, prompt: TaskPrompt) -> tuple[str, PromptReport]:
        _, tokenizer = self.backbone
        limit = tokenizer.context_length
        for kept in range(len(prompt.examples), -1, -1):
            text = prompt_text(prompt, kept)
            tokens = len(tokenizer.encode(text)) + 2
            if tokens <= limit:
                return text, PromptReport(tokens, limit, examples_dropped=len(prompt.examples) - kept)
        raise ConditionError(f"the task description has {tokens} tokens; CLIP reads {limit}: shorten it")


def prompt_text(prompt: TaskPrompt, num_examples: int) -> str:
    """Join description and the first `num_examples` examples into one text."""
    parts = [prompt.description]
    for text, label in prompt.examples[:num_examples]:
        parts.append(f"{text if isinstance(text, str) else ' / '.join(text)} → {label}")
    return " ".join(parts)
