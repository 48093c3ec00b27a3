"""CausalBackbone: a frozen causal language model that answers prompts, with its tokenizer and its chat template."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import ConditionError, HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.locks import lock_of
from cond_pdiff.models.text_backbone import load_text_model
from cond_pdiff.models.token_batches import Tokens, batches_of_like_length, common_start

PLAIN_PROMPT = "{prompt}\nAnswer:\n"
"""The prompt for a base model without a chat template."""
ROWS_AT_ONCE = 128
"""The number of rows that the model reads at once where no gradients are wanted."""
CACHE_NAMES = ("cache", "past_key_values")
"""The names that transformers has had for a cache of keys and values, as an argument and in what a model returns."""
IGNORED = -100
"""What stands for padding among the tokens that are to be predicted: torch's cross-entropy leaves it out."""

Under = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""What attaches adapters to the rows of a batch, one after the other, for as long as a block lasts; it is given the places of the prompts
in the batch, as batches are formed by length. A row's keys and values are then its own: nothing is read once for several rows."""


@dataclass
class _Read:
    """What a model has read: its cache of keys and values, and which of its places hold tokens, shape `(rows, places)`, 1 or 0."""

    cache: Any
    mask: torch.Tensor

    def repeat(self, times: int) -> None:
        """Make neighbouring copies of each row."""
        if times > 1:
            self.cache.batch_repeat_interleave(times)
            self.mask = self.mask.repeat_interleave(times, 0)


class CausalBackbone:
    """A frozen causal language model.

    The tokens that all prompts of a batch begin with (a chat template's own, a task's description) are read once for all of them.

    Args:
        model: an `AutoModelForCausalLM` that keeps keys and values in a cache.
        tokenizer: its fast tokenizer.

    Raises:
        HubError: model and tokenizer do not fit each other, or nothing tells where an answer ends.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._known = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        if tokenizer.vocab_size > self._known:
            raise HubError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model embeddings for {self._known}: they are not of one base model"
            )
        self.end = self._end_of_answer()
        known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self._ends = {self.end, tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        accepted = inspect.signature(type(model).forward).parameters
        self._options = {"position_ids", "logits_to_keep"} & accepted.keys()
        cache = next((name for name in CACHE_NAMES if name in accepted), None)
        if cache is None or getattr(model, "_is_stateful", False):  # a recurrent state would take padding for text
            raise HubError(f"a {type(model).__name__} keeps no cache of keys and values alone; expected a transformer decoder that does")
        self._cache = cache
        self._window = int(getattr(model.config, "sliding_window", None) or 0)

    @classmethod
    def load(cls, backbone: Backbone) -> CausalBackbone:
        """Load a base model from a folder, a GGUF file or the Hub: frozen, in evaluation mode, float32, on the CPU.

        Raises:
            HubError: not to be had, or no such model.
        """
        model, tokenizer, _, missing = load_text_model(backbone, AutoModelForCausalLM)
        if missing:
            raise HubError(f"{backbone.repo_id} is no causal language model: it has no weights {min(missing)!r}")
        return cls(model, tokenizer)

    @property
    def max_tokens(self) -> int:
        """The longest input that the model is made for."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length)

    def to(self, device: torch.device) -> None:
        """Move the model, once no other thread is using it."""
        with lock_of(self.model):
            self.model.to(device)

    # --- tokens -------------------------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: str, shots: Sequence[tuple[str, str]] = ()) -> Tokens:
        """Return a prompt as the model is used to it: through its chat template, or `PLAIN_PROMPT` where it has none.

        Args:
            shots: prompts with their answers that come before it (examples in context).
        """
        if self.tokenizer.chat_template is None:
            before = "".join(f"{PLAIN_PROMPT.format(prompt=asked)}{answer}\n\n" for asked, answer in shots)
            tokens = self._tokens(before + PLAIN_PROMPT.format(prompt=prompt), special=True)
            return tokens[:-1] if tokens[-1] == self.end else tokens
        turns = [turn for asked, answer in shots for turn in (_turn("user", asked), _turn("assistant", answer))]
        return self._tokens(self._chat([*turns, _turn("user", prompt)], add_generation_prompt=True))

    def answer_tokens(self, answer: str) -> Tokens:
        """Return an answer with the token that ends it, without which "not" would be a part of "not sure"; `ConditionError` if empty."""
        tokens = self._tokens(answer)
        if not tokens:
            raise ConditionError("an answer is empty; a language model is taught and asked to write at least one token")
        return [*tokens, self.end]

    def fitted(self, instruction: Instruction, text: Text, limit: int) -> Text:
        """Return a text, or as much of its beginning as a prompt of at most `limit` tokens has room for; of a pair, the longer one is cut.

        Raises:
            ConditionError: the rest of the prompt alone is too long.
        """
        while (over := len(self.prompt_tokens(instruction.prompt(text))) - limit) > 0:
            parts = [text] if isinstance(text, str) else list(text)
            place = max(range(len(parts)), key=lambda index: len(parts[index]))
            size = len(self._tokens(parts[place]))
            if size <= over:
                raise ConditionError(
                    f"the prompt has {limit + over} tokens, and {limit} are allowed: without its text it is too long already; allow more "
                    f"(max_length), or shorten the description or the label names: {instruction.prompt('…')!r:.160}"
                )
            kept = min(len(parts[place]) * (size - over) // size, len(parts[place]) - 1)
            parts[place] = parts[place][: max(kept, 1)]
            text = parts[0] if len(parts) == 1 else (parts[0], parts[1])
        return text

    def _tokens(self, text: str, special: bool = False) -> Tokens:
        with lock_of(self.tokenizer):
            tokens = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if strange := next((token for token in tokens if token >= self._known), None):
            name = self.tokenizer.convert_ids_to_tokens(strange)
            raise HubError(f"the model has no embedding of the token {name!r}, which its tokenizer makes: they are not of one base model")
        return tokens

    def _chat(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except Exception as error:  # a template is a small program of the base model's authors
            raise HubError(f"the base model's chat template cannot be used: {type(error).__name__}: {error}") from error

    def _end_of_answer(self) -> int:
        """Return the token that the chat template puts behind an answer, or the end of the text."""
        if self.tokenizer.chat_template is not None:
            mark = "the answer"
            said = self._chat([_turn("user", "a question"), _turn("assistant", mark)])
            tokens = self._tokens(said.rpartition(mark)[2].lstrip())
            if tokens and tokens[0] in self.tokenizer.all_special_ids:
                return tokens[0]
        if self.tokenizer.eos_token_id is None:
            raise HubError("the tokenizer has no end-of-text token, so no answer would ever end; set its eos_token and save it")
        return int(self.tokenizer.eos_token_id)

    # --- reading ------------------------------------------------------------------------------------------------

    def log_likelihoods(self, prompts: Sequence[Tokens], answers: Sequence[Tokens], groups: int = 1) -> torch.Tensor:
        """Return the log-likelihood of each answer after its prompt, with gradients if any are wanted, shape `(len(prompts),)`.

        Args:
            groups: of equally many neighbouring rows, where adapters are `attached_to_groups`.
        """
        logits, targets = self._predictions(prompts, answers, groups)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return -losses.view(targets.shape).sum(1)

    @torch.no_grad()
    def judge(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood of each answer, and whether the model would write it, the likeliest token each time.

        Returns:
            Float32 and bool, on the CPU, both of shape `(len(prompts),)`.
        """
        likelihoods, written = torch.zeros(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
        for places in batches_of_like_length(prompts, ROWS_AT_ONCE):
            logits, targets = self._predictions([prompts[place] for place in places], [answers[place] for place in places])
            known = targets != IGNORED
            found = logits.float().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
            likelihoods[places] = (found * known).sum(1).cpu()
            written[places] = ((logits.argmax(-1) == targets) | ~known).all(1).cpu()
        return likelihoods, written

    def _predictions(self, prompts: Sequence[Tokens], answers: Sequence[Tokens], groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, shape `(rows, places, vocabulary)`, and the answers' tokens that they should predict, shape `(rows, places)`."""
        whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        for prompt, answer in zip(prompts, answers, strict=True):
            self.check_room(prompt, len(answer))
        width = max(map(len, answers))
        with lock_of(self.model):
            logits = self._read(prompts, whole, width, groups)[0]
        return logits, torch.tensor([[IGNORED] * (width - len(answer)) + answer for answer in answers], device=logits.device)

    @torch.no_grad()
    def choices(self, prompts: Sequence[Tokens], answers: Sequence[Tokens], groups: int = 1) -> torch.Tensor:
        """Return the log-likelihood of every answer after every prompt, float32, on the CPU.

        Args:
            groups: adapters that are `attached_to_groups`: all prompts are asked under each.

        Returns:
            Shape `(groups * len(prompts), len(answers))`, group after group.
        """
        return torch.stack(self.own_choices([*prompts] * groups, [answers] * (groups * len(prompts)), groups=groups))

    @torch.no_grad()
    def own_choices(
        self, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], under: Under | None = None, groups: int = 1
    ) -> list[torch.Tensor]:
        """Return for every prompt the log-likelihoods of its own answers after it, float32, on the CPU, shape `(len(its answers),)`.

        Args:
            under: attaches adapters, see `Under`.
            groups: of neighbouring prompts, where adapters are `attached_to_groups`; in each the same ones.

        Raises:
            ConditionError: a prompt and its longest answer are longer than what the model is made for.
        """
        found = [torch.zeros(0)] * len(prompts)
        most = max(map(len, answers))
        for prompt, own in zip(prompts, answers, strict=True):
            self.check_room(prompt, max(map(len, own)))
        for places in batches_of_like_length(prompts, max(1, ROWS_AT_ONCE // most), groups):
            filled = [[*answers[place], *[answers[place][0]] * (most - len(answers[place]))] for place in places]
            with lock_of(self.model), under(places) if under else nullcontext():
                rows = self._likelihoods([prompts[place] for place in places], filled, len(places) if under else groups)
            for place, row in zip(places, rows, strict=True):
                found[place] = row[: len(answers[place])]
        return found

    def _likelihoods(self, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], groups: int) -> torch.Tensor:
        """Return the log-likelihoods of equally many answers to each prompt, of one batch, shape `(rows, answers)`."""
        every = [answer for own in answers for answer in own]
        width = max(map(len, every)) - 1
        wanted = torch.tensor([[*answer[1:], *[IGNORED] * (width - len(answer) + 1)] for answer in every])
        ids = torch.tensor([[*answer[:-1], *[self.end] * (width - len(answer) + 1)] for answer in every])
        logits, read = self._read(prompts, prompts, 1, groups)
        first = logits[:, -1].float().log_softmax(-1).cpu().gather(1, ids[:, 0].view(len(prompts), -1))
        read.repeat(len(answers[0]))
        logits = self._extend(read, ids.to(logits.device), (wanted != IGNORED).long().to(logits.device), width).float().cpu()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        return first - losses.view(wanted.shape).sum(1).view(first.shape)

    def shares(self, instruction: Instruction, text: Text, limit: int) -> tuple[dict[str, float], Text]:
        """Return the probability of each label of an instruction for a text, and as much of the text as was read.

        Args:
            limit: prompt and answer may have that many tokens, as in training; no more than the model is made for.

        Raises:
            ConditionError: see `fitted`.
        """
        names = [self.answer_tokens(name) for name in instruction.answers]
        read = self.fitted(instruction, text, min(limit, self.max_tokens) - max(map(len, names)))
        found = self.choices([self.prompt_tokens(instruction.prompt(read))], names)[0].softmax(0)
        return dict(zip(instruction.labels, found.tolist(), strict=True)), read

    def _read(self, starts: Sequence[Tokens], whole: Sequence[Tokens], keep: int, groups: int = 1) -> tuple[torch.Tensor, _Read]:
        """Read rows from left to right: what all `starts` have in common once a group, then the rest of each row, padded on the left.

        Returns:
            Logits of the last `keep` places, shape `(rows, keep, vocabulary)`, and what was read.
        """
        shared = min(common_start(starts), min(map(len, starts)) - 1)
        # Nothing is shared, or padding between the shared part and the rest would take up places of the window.
        if groups == len(whole) or 0 < self._window < max(map(len, whole)):
            shared = 0
        device = next(self.model.parameters()).device
        read = _Read(None, torch.zeros(len(whole) if not shared else groups, 0, dtype=torch.long, device=device))
        if shared:
            ids = torch.tensor([whole[0][:shared]] * groups, device=device)
            self._extend(read, ids, torch.ones_like(ids), 1)
            read.repeat(len(whole) // groups)
        rests = [row[shared:] for row in whole]
        width = max(map(len, rests))
        ids = torch.tensor([[self.end] * (width - len(rest)) + rest for rest in rests], device=device)
        mask = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
        return self._extend(read, ids, mask, keep), read

    def _extend(self, read: _Read, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        """Read further tokens, shape `(rows, places)`, and return the logits of the last `keep` places."""
        read.mask = torch.cat([read.mask, mask], 1)
        positions = (read.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        known = {"position_ids": positions, "logits_to_keep": keep}
        options = {self._cache: read.cache, **{name: value for name, value in known.items() if name in self._options}}
        output = self.model(input_ids=ids, attention_mask=read.mask, use_cache=True, **options)
        read.cache = getattr(output, self._cache)
        logits: torch.Tensor = output.logits[:, -keep:]
        return logits

    # --- writing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answers(self, prompts: Sequence[Tokens], limit: int, groups: int = 1) -> list[str | None]:
        """Write the answers to prompts, the likeliest token each time; None: it had not ended after `limit` tokens.

        Args:
            groups: adapters that are `attached_to_groups`: all prompts are answered under each, group after group.

        Raises:
            ConditionError: a prompt and `limit` tokens are longer than what the model is made for.
        """
        written = self.write([*prompts] * groups, [limit] * (groups * len(prompts)), groups=groups)
        return [text if ended else None for text, ended in written]

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Tokens], limits: Sequence[int], under: Under | None = None, groups: int = 1
    ) -> list[tuple[str, bool]]:
        """Write the answers to prompts, each of at most so many tokens, and return them with whether they had ended by then.

        Args:
            under, groups: see `own_choices`.

        Raises:
            ConditionError: see `answers`.
        """
        written: list[Tokens] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for places in batches_of_like_length(prompts, ROWS_AT_ONCE, groups):
            still = set(places)
            with lock_of(self.model), under(places) if under else nullcontext():
                own = [limits[place] for place in places]
                for tokens in self._written([prompts[place] for place in places], own, len(places) if under else groups):
                    for place, token in zip(places, tokens, strict=True):
                        if place in still:
                            ended[place] = token in self._ends
                            written[place] += [] if ended[place] else [token]
                            if ended[place] or len(written[place]) == limits[place]:
                                still.remove(place)
                    if not still:
                        break
        return [(self._text(tokens), end) for tokens, end in zip(written, ended, strict=True)]

    def stream(self, prompt: Tokens, limit: int) -> Iterator[str]:
        """Yield the answer to a prompt piece by piece, at most `limit` tokens of it; see `answers`."""
        written: Tokens = []
        told = ""
        for (token,) in self._written([prompt], [limit]):
            if token in self._ends:
                break
            written.append(token)
            text = self._text(written)
            if not text.endswith("\ufffd") and text.startswith(told):  # else a character's bytes are not all there yet
                yield text[len(told) :]
                told = text
        if rest := self._text(written)[len(told) :]:
            yield rest

    @torch.no_grad()
    def _written(self, prompts: Sequence[Tokens], limits: Sequence[int], groups: int = 1) -> Iterator[list[int]]:
        """Yield the next token of every row; those of a row beyond its own limit mean nothing, and take up no positions."""
        for prompt, limit in zip(prompts, limits, strict=True):
            self.check_room(prompt, limit)
        with lock_of(self.model):
            logits, read = self._read(prompts, prompts, 1, groups)
            allowed = torch.tensor(limits, device=logits.device)[:, None]
            for count in range(1, max(limits) + 1):
                tokens = logits[:, -1].argmax(-1)
                yield tokens.tolist()
                if count < max(limits):
                    logits = self._extend(read, tokens[:, None], (count < allowed).long(), 1)

    def check_room(self, prompt: Tokens, limit: int) -> None:
        """Raise `ConditionError` if a prompt and an answer of `limit` tokens are longer than what the model is made for."""
        if len(prompt) + limit > self.max_tokens:
            raise ConditionError(
                f"a prompt of {len(prompt)} tokens and {limit} of its answer are more than the {self.max_tokens} of the model"
            )

    def _text(self, tokens: Tokens) -> str:
        with lock_of(self.tokenizer):
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
