"""A batch whose rows go through different adapters says what they say one after another."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_adapter, make_bert
from tiny_language_models import LINEARS, save_gpt2, save_llama
from torch import nn
from transformers import BertForSequenceClassification, MistralForCausalLM

from cond_pdiff import AdapterPool, LoraAdapter, PrototypeClassifier, Request, attached_to_rows
from cond_pdiff.adapter import FACTORS
from cond_pdiff.attach import attach_to_rows
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.errors import AdapterError, ConditionError, CondPDiffError
from cond_pdiff.families.family import family_named
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, base_fingerprint, target_linears, update_shape
from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LONG = "the awful meal and the poor song, the dull book and the bad room"
TEXTS = ["the good film", "a kitten", LONG, "the nest", "lovely", "puppy or cat"]


def random_adapter(
    model: nn.Module, base: str, targets: Sequence[str], rank: int, task_type: str, seed: int, **metadata: Any
) -> LoraAdapter:
    spec = LoraSpec(base, rank, 2.0 * rank + seed, tuple(targets), task_type)
    spec = replace(spec, base_fingerprint=base_fingerprint(model, spec))
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in target_linears(model, spec).items():
        rows, columns = update_shape(linear)
        for factor, shape in zip(FACTORS, ((rank, columns), (rows, rank)), strict=True):
            tensors[f"{KEY_PREFIX}{name}.{factor}.weight"] = 0.3 / rank**0.5 * torch.randn(shape, generator=rng)
    return LoraAdapter(spec, tensors, {"base": {"repo_id": base}, **metadata})


@pytest.fixture(scope="module")
def encoder(tiny_backbone: Backbone) -> SentenceBackbone:
    return SentenceBackbone.load(tiny_backbone)


@pytest.fixture(scope="module")
def classifiers(encoder: SentenceBackbone, tiny_backbone: Backbone) -> list[LoraAdapter]:
    """Adapters of two ranks and two sets of modules, with two to three labels, one of them with examples."""
    kinds = [(("query", "value"), 2), (("query", "key", "value", "attention.output.dense"), 5), (("query", "value"), 2), (("dense",), 3)]
    facts: list[dict[str, Any]] = [
        {"labels": ["positive", "negative"]},
        {"labels": ["cat", "dog", "bird"], "max_length": 9},
        {"labels": ["same", "different"], "prototype_examples": [["the film", "same"], ["the nest", "different"]]},
        {"labels": ["dog", "cat"]},
    ]
    return [
        random_adapter(encoder.model, tiny_backbone.repo_id, targets, rank, "FEATURE_EXTRACTION", seed, **own)
        for seed, ((targets, rank), own) in enumerate(zip(kinds, facts, strict=True))
    ]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalBackbone:
    folder = tmp_path_factory.mktemp("base") / request.param
    return CausalBackbone.load(Backbone(str({"llama": save_llama, "gpt2": save_gpt2}[request.param](folder))))


def writers(base: CausalBackbone) -> list[LoraAdapter]:
    """Adapters of two ranks and two sets of modules; the last two have labels."""
    linears = LINEARS["gpt2" if "attn.c_attn" in " ".join(dict(base.model.named_modules())) else "llama"]
    kinds = [(linears, 3), (linears, 3), (linears[:1], 7), (linears, 2), (linears, 2)]
    facts: list[dict[str, Any]] = [
        {"description": "Say the opposite."}, {}, {"description": "Go on."},
        {"labels": ["left", "left_most"]}, {"labels": ["up", "down", "neither of the two"], "description": "Which way?", "max_length": 110},
    ]  # fmt: skip
    where = base.model.config._name_or_path  # type: ignore[union-attr]
    return [
        random_adapter(base.model, str(where), targets, rank, "CAUSAL_LM", seed, **own)
        for seed, ((targets, rank), own) in enumerate(zip(kinds, facts, strict=True))
    ]


def pool_of(base: Any, adapters: Sequence[LoraAdapter]) -> AdapterPool[Any, Any]:
    family = adapters[0].family
    assert family is not None
    pool = family.pool(base)
    for place, adapter in enumerate(adapters):
        pool.add(f"adapter {place}", adapter)
    return pool


# --- rows --------------------------------------------------------------------------------------------------------------------

MIXES = [[0], [0, 1, 2, 3, 1, 0], [2, 0, None, 0, 0, 2], [None, None], [3, 3, 3, 1, 0, 2], [0, 2, 0, 2]]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_a_row_is_what_it_is_alone(mix: list[int | None], encoder: SentenceBackbone, classifiers: list[LoraAdapter]) -> None:
    adapters = [None if place is None else classifiers[place] for place in mix]
    texts = TEXTS[: len(mix)]
    with attached_to_rows(encoder.model, adapters), torch.no_grad():
        mixed = encoder.forward(texts, 64)
    alone = []
    for text, adapter in zip(texts, adapters, strict=True):
        with attached_to_rows(encoder.model, [adapter]) if adapter is None else adapter.attached(encoder.model):
            alone.append(encoder.embed([text], 64)[0])
    torch.testing.assert_close(mixed, torch.stack(alone), **CLOSE)
    assert not encoder.model._forward_hooks
    assert not any(module._forward_hooks or "forward" in vars(module) for module in encoder.model.modules())


def test_gradients_flow_to_each_rows_own_adapter(encoder: SentenceBackbone, classifiers: list[LoraAdapter]) -> None:
    parts = [(adapter.spec, {key: tensor.clone().requires_grad_() for key, tensor in adapter.tensors.items()}) for adapter in classifiers]
    attachment = attach_to_rows(encoder.model, [parts[0], parts[1], parts[0]])
    encoder.forward(TEXTS[:3], 64)[0].sum().backward()
    attachment.detach()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in parts[0][1].values())
    assert all(not tensor.grad.any() for tensor in parts[1][1].values() if tensor.grad is not None)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_transformers_own_generation(options: dict[str, int], writer: CausalBackbone) -> None:
    adapters = writers(writer)
    mix = [adapters[0], adapters[2], None, adapters[0], adapters[1]]
    prompts = [writer.prompt_tokens(text) for text in TEXTS[: len(mix)]]
    width = max(map(len, prompts))
    ids = torch.tensor([[writer.end] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": writer.end, **options}
    with attached_to_rows(writer, mix):
        mixed = writer.model.generate(input_ids=ids, attention_mask=mask, **settings)  # type: ignore[operator]
    each = options.get("num_return_sequences", 1)
    for row, (adapter, prompt) in enumerate(zip(mix, prompts, strict=True)):
        with attached_to_rows(writer, [adapter]):
            own = writer.model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)  # type: ignore[operator]
        mine = mixed[row * each : (row + 1) * each, width:]
        end = own.shape[1] - len(prompt)
        assert torch.equal(mine[:, :end], own[:, len(prompt) :])
        assert bool((mine[:, end:] == writer.end).all())


def test_another_number_of_rows_is_refused(encoder: SentenceBackbone, classifiers: list[LoraAdapter]) -> None:
    with attached_to_rows(encoder.model, classifiers[:2]), pytest.raises(AdapterError, match="attached to 2 rows"):
        encoder.forward(TEXTS[:3], 64)
    with attached_to_rows(encoder.model, classifiers[:3]), pytest.raises(AdapterError, match=r"of shape \(2, .*attached to 3 rows"):
        encoder.forward(TEXTS[:2], 64)
    layer = nn.Sequential(nn.Linear(4, 4))
    spec = LoraSpec(None, 1, 1.0, ("0",))
    part = spec, {f"{KEY_PREFIX}0.lora_A.weight": torch.ones(1, 4), f"{KEY_PREFIX}0.lora_B.weight": torch.ones(4, 1)}
    attachment = attach_to_rows(layer, [part, None])
    assert layer(torch.ones(2, 4)).shape == (2, 4)
    with pytest.raises(AdapterError, match="keep rows apart"):  # four tokens, of whichever rows
        layer(torch.ones(4, 4))
    attachment.detach()


def test_adapters_of_another_base_are_refused(
    encoder: SentenceBackbone, classifiers: list[LoraAdapter], tiny_backbone: Backbone
) -> None:
    strange = make_adapter(make_bert(seed=1), tiny_backbone.repo_id)
    with pytest.raises(AdapterError, match="fingerprints differ"), attached_to_rows(encoder, [classifiers[0], strange]):
        pass
    pool = pool_of(encoder, classifiers)
    with pytest.raises(AdapterError, match="fingerprints differ"):
        pool.add("strange", strange)
    headed = BertForSequenceClassification(make_bert().config).eval()
    plain = make_adapter(headed, "x")
    own = {f"{KEY_PREFIX}classifier.{part}": tensor.detach() for part, tensor in headed.classifier.named_parameters()}
    head = replace(plain, spec=replace(plain.spec, modules_to_save=("classifier",)), tensors={**plain.tensors, **own})
    with pytest.raises(AdapterError, match="brings a head"), attached_to_rows(headed, [head]):
        pass
    with pytest.raises(AdapterError, match="sequence-classifier cannot share a batch"):
        family_named("sequence-classifier").pool(None)
    assert not any(module._forward_hooks for module in (*headed.modules(), *encoder.model.modules()))


# --- pools -------------------------------------------------------------------------------------------------------------------


def classify(base: SentenceBackbone, adapter: LoraAdapter, text: str) -> torch.Tensor:
    facts = adapter.metadata
    classifier = PrototypeClassifier(base, facts["labels"], adapter, examples=facts.get("prototype_examples", ()))
    return classifier.logits([text])[0].softmax(0)


def ask(base: CausalBackbone, adapter: LoraAdapter, text: str, max_tokens: int) -> tuple[str, torch.Tensor]:
    """What `cond-pdiff ask` says: the text, or the labels' shares."""
    instruction = Instruction.recorded(adapter.metadata)
    with adapter.attached(base):
        if not instruction.labels:
            return "".join(base.stream(base.prompt_tokens(instruction.prompt(text)), max_tokens)), torch.zeros(0)
        names = [base.answer_tokens(name) for name in instruction.answers]
        fits = base.fitted(instruction, text, int(adapter.metadata.get("max_length", base.max_tokens)) - max(map(len, names)))
        shares = base.choices([base.prompt_tokens(instruction.prompt(fits))], names)[0].softmax(0)
        return instruction.labels[int(shares.argmax())], shares


def in_eight_threads(work: Callable[[int], None]) -> None:
    start = threading.Barrier(8)

    def begin(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(begin, range(8)))


def test_a_pool_classifies_as_one_after_another(encoder: SentenceBackbone, classifiers: list[LoraAdapter]) -> None:
    pool = pool_of(encoder, classifiers)
    expected = {(place, text): classify(encoder, adapter, text) for place, adapter in enumerate(classifiers) for text in TEXTS}
    asked = list(expected)

    def work(number: int) -> None:
        mine = asked[number:] + asked[:number]
        if number == 7:  # someone else uses the base alone
            torch.testing.assert_close(classify(encoder, classifiers[1], TEXTS[0]), expected[1, TEXTS[0]], **CLOSE)
        for (place, text), answer in zip(mine, pool.answer([Request(f"adapter {p}", text) for p, text in mine]), strict=True):
            torch.testing.assert_close(torch.tensor(list(answer.probabilities.values())), expected[place, text], **CLOSE)
            assert answer.answer == classifiers[place].metadata["labels"][int(expected[place, text].argmax())]
            assert answer.complete == (place != 1 or text != LONG)

    in_eight_threads(work)


def test_a_pool_asks_as_one_after_another(writer: CausalBackbone) -> None:
    adapters = writers(writer)
    pool = pool_of(writer, adapters)
    limits = dict(zip(TEXTS, itertools.cycle((8, 3)), strict=False))
    expected = {(place, text): ask(writer, adapters[place], text, limits[text]) for place in range(len(adapters)) for text in TEXTS}
    asked = list(expected)

    def work(number: int) -> None:
        mine = asked[number:] + asked[:number]
        answers = pool.answer([Request(f"adapter {place}", text, limits[text]) for place, text in mine])
        for key, answer in zip(mine, answers, strict=True):
            told, shares = expected[key]
            assert answer.answer == told.strip()
            torch.testing.assert_close(torch.tensor(list(answer.probabilities.values())), shares, **CLOSE)

    in_eight_threads(work)
    assert len({told for told, shares in expected.values() if not len(shares)}) > 3


def test_answers_end_at_their_own_limit(writer: CausalBackbone) -> None:
    pool = pool_of(writer, writers(writer)[:2])
    room = writer.max_tokens - len(writer.prompt_tokens("x" * 300))
    long, short = pool.answer([Request("adapter 1", "x" * 300, 2), Request("adapter 1", "on", room + 4)])
    assert not long.complete
    assert long == pool.answer([Request("adapter 1", "x" * 300, 2)])[0]
    assert short == pool.answer([Request("adapter 1", "on", room + 4)])[0]
    with pytest.raises(ConditionError, match="more than the 512 of the model"):
        pool.answer([Request("adapter 1", "x" * 300, room + 4)])
    with pytest.raises(CondPDiffError, match="max_tokens"):
        pool.answer([Request("adapter 1", "on", 0)])
    strange = replace(writers(writer)[0].spec, task_type="FEATURE_EXTRACTION")
    with pytest.raises(AdapterError, match="not for a language model"):
        pool.add("other", replace(writers(writer)[0], spec=strange))


def test_a_sliding_window(tmp_path: Path) -> None:
    base = CausalBackbone.load(Backbone(str(save_llama(tmp_path / "base", kind=MistralForCausalLM, sliding_window=8, head_dim=8))))
    adapters = writers(base)
    pool = pool_of(base, adapters)
    answers = pool.answer([Request(f"adapter {place}", TEXTS[place], 6) for place in range(len(adapters))])
    for place, (adapter, answer) in enumerate(zip(adapters, answers, strict=True)):
        told, shares = ask(base, adapter, TEXTS[place], 6)
        assert answer.answer == told.strip()
        torch.testing.assert_close(torch.tensor(list(answer.probabilities.values())), shares, **CLOSE)


def test_a_pool_from_folders(classifiers: list[LoraAdapter], tmp_path: Path) -> None:
    folders = {f"a{place}": adapter.save(tmp_path / str(place)) for place, adapter in enumerate(classifiers)}
    pool = AdapterPool.load(folders)
    assert list(pool.adapters) == list(folders)
    assert pool.answer([]) == []
    ready = pool.ready(Request("a1", TEXTS[0]))
    pool.remove("a1")
    assert pool.answer_ready([ready])[0].answer in classifiers[1].metadata["labels"]
    with pytest.raises(AdapterError, match="no adapter 'a1' here; known are 'a0', 'a2', 'a3'"):
        pool.answer([Request("a1", TEXTS[0])])
    with pytest.raises(AdapterError, match="no adapter 'a1'"):
        pool.remove("a1")
    with pytest.raises(AdapterError, match="'a0' already"):
        pool.add("a0", classifiers[0])
    with pytest.raises(AdapterError, match="records no labels"):
        pool.add("a1", replace(classifiers[1], metadata={}))
    with pytest.raises(ConditionError, match="the text is empty"):
        pool.answer([Request("a0", " ")])
    with pytest.raises(AdapterError, match="at least one adapter"):
        AdapterPool.load({})
