"""The family of causal language models: reading, answering, training, and adapters that others read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import LINEARS, TEMPLATE, save_gpt2, save_llama, tokenizer
from transformers import Gemma2ForCausalLM, MambaConfig, MambaForCausalLM, MistralForCausalLM, PreTrainedModel

from cond_pdiff import LoraAdapter, TaskPrompt
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.convert import save_merged
from cond_pdiff.errors import ConditionError, HubError, TaskDataError
from cond_pdiff.families.family import family_named
from cond_pdiff.hub import Backbone
from cond_pdiff.models.causal_backbone import CausalBackbone
from cond_pdiff.models.token_batches import Tokens
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.tasks.answers import accuracy, predict
from cond_pdiff.training.tasks.language import Exchange, load_language_tasks
from cond_pdiff.training.tasks.tasks import write_task
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.zoo import Zoo

PROMPTS = ["Say the opposite.\nInput: up", "Say the opposite.\nInput: a longer text", "Say the opposite.\nInput: on"]
ANSWERS = ["down", "no", "off and on"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"llama": save_llama(folder / "llama"), "gpt2": save_gpt2(folder / "gpt2")}


@pytest.fixture(params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, bases: dict[str, Path]) -> CausalBackbone:
    return CausalBackbone.load(Backbone(str(bases[request.param])))


def one_by_one(backbone: CausalBackbone, prompt: Tokens, answer: Tokens) -> float:
    """The log-likelihood by the model alone, without padding, cache or shared beginnings."""
    logits = backbone.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(answer))


# --- reading -----------------------------------------------------------------------------------------------------------------


def test_a_batch_reads_as_one_text_alone(backbone: CausalBackbone) -> None:
    prompts = [*map(backbone.prompt_tokens, PROMPTS), backbone._tokens("other")]
    answers = [*map(backbone.answer_tokens, ANSWERS), backbone.answer_tokens("x")]
    expected = [one_by_one(backbone, *pair) for pair in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(backbone.log_likelihoods(prompts, answers), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(backbone.log_likelihoods(prompts[:3], answers[:3]), torch.tensor(expected[:3]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(backbone.log_likelihoods(prompts[:2], answers[:2], 2), torch.tensor(expected[:2]), atol=1e-4, rtol=1e-5)
    table = torch.tensor([[one_by_one(backbone, prompt, answer) for answer in answers] for prompt in prompts])
    torch.testing.assert_close(backbone.choices(prompts, answers), table, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", [MistralForCausalLM, Gemma2ForCausalLM])
def test_a_sliding_window_sees_no_padding(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    changes = {"kind": kind, "head_dim": 8, "query_pre_attn_scalar": 8}
    for window in (8, 300):
        backbone = CausalBackbone.load(Backbone(str(save_llama(tmp_path / str(window), sliding_window=window, **changes))))
        prompts, answers = [*map(backbone.prompt_tokens, PROMPTS)], [*map(backbone.answer_tokens, ANSWERS)]
        table = torch.tensor([[one_by_one(backbone, prompt, answer) for answer in answers] for prompt in prompts])
        torch.testing.assert_close(backbone.log_likelihoods(prompts, answers), table.diagonal(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(backbone.choices(prompts, answers), table, atol=1e-4, rtol=1e-5)


def test_recurrent_models_are_refused(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=8, state_size=4, num_hidden_layers=1))
    with pytest.raises(HubError, match="a MambaForCausalLM keeps no cache of keys and values alone"):
        CausalBackbone(model, tokenizer())


def test_gradients_are_those_of_plain_reading(backbone: CausalBackbone) -> None:
    weight = backbone.model.get_input_embeddings().weight.requires_grad_()  # type: ignore[operator]
    prompts, answers = [*map(backbone.prompt_tokens, PROMPTS)], [*map(backbone.answer_tokens, ANSWERS)]
    backbone.log_likelihoods(prompts, answers).sum().backward()
    found, weight.grad = weight.grad, None
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = backbone.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        logits[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].sum().backward()
    torch.testing.assert_close(found, weight.grad, atol=1e-3, rtol=1e-4)


def test_answers_are_those_of_transformers(backbone: CausalBackbone) -> None:
    prompts = [*map(backbone.prompt_tokens, PROMPTS)]
    for prompt in prompts:
        whole = backbone.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=1)[0].tolist()
        theirs = whole[len(prompt) :]
        told = "".join(backbone.stream(prompt, 12))
        assert told == backbone._text(theirs)
        assert backbone.answers([prompt], 12) == [told if backbone.end in theirs else None]
    assert backbone.answers(prompts, 12) == [backbone.answers([prompt], 12)[0] for prompt in prompts]


def test_a_label_that_begins_another_ends(bases: dict[str, Path]) -> None:
    backbone = CausalBackbone.load(Backbone(str(bases["llama"])))
    short, long = backbone.answer_tokens("not"), backbone.answer_tokens("not sure")
    assert short[-1] == long[-1] == backbone.end == 1
    assert short[:-1] == long[: len(short) - 1]
    prompt = backbone.prompt_tokens("?")
    found = backbone.choices([prompt], [short, long])[0]
    assert found.tolist() == pytest.approx([one_by_one(backbone, prompt, answer) for answer in (short, long)], abs=1e-4)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS * 20])
def test_adapters_side_by_side_answer_as_one_by_one(prompts: list[str], zoos: dict[str, Zoo]) -> None:
    zoo = zoos["llama"]
    adapters = [zoo.runs(name)[0].adapter() for name in ("opposites", "sides", "copies")]
    backbone = CausalBackbone.load(zoo.base)
    stacked = {key: torch.stack([adapter.tensors[key] for adapter in adapters]) for key in adapters[0].tensors}
    asked, names = [*map(backbone.prompt_tokens, prompts)], [*map(backbone.answer_tokens, ("not", "not sure", "a"))]
    with attached_to_groups(backbone.model, adapters[0].spec, stacked):
        choices, answers = backbone.choices(asked, names, 3), backbone.answers(asked, 6, 3)
    for group, adapter in enumerate(adapters):
        own = slice(group * len(asked), (group + 1) * len(asked))
        with adapter.attached(backbone):
            torch.testing.assert_close(choices[own], backbone.choices(asked, names), atol=1e-3, rtol=1e-4)
            assert answers[own] == backbone.answers(asked, 6)
    assert not torch.allclose(choices[: len(asked)], choices[len(asked) : 2 * len(asked)], atol=1e-2)


# --- prompts -----------------------------------------------------------------------------------------------------------------


def test_prompts_follow_the_template_or_are_plain(bases: dict[str, Path]) -> None:
    chat, plain = (CausalBackbone.load(Backbone(str(bases[name]))) for name in ("llama", "gpt2"))
    assert chat._text(chat.prompt_tokens("hi")) == "user\nhi\nassistant"
    assert plain._text(plain.prompt_tokens("hi")) == "hi\nAnswer:"
    assert chat.prompt_tokens("hi")[0] == 0


def test_instructions_in_words() -> None:
    task = Instruction("Kind or not?", ["not_kind", "kind"])
    assert task.prompt("fine") == "Kind or not?\nOptions: not kind, kind\nInput: fine"
    assert task.prompt(("a", "b")).endswith("\nInput 1: a\nInput 2: b")
    assert Instruction("Add.").prompt("1 2") == "Add.\nInput: 1 2"
    assert Instruction().prompt("hello") == "hello"
    assert Instruction("?", ["+", "-"]).answers == ("+", "-")  # as words, the minus would be nothing
    assert Instruction("?", ["a_b", "a-b"]).answers == ("a_b", "a-b")


def test_long_texts_are_cut_and_instructions_are_not(backbone: CausalBackbone) -> None:
    task = Instruction("Which?", ["a", "b"])
    for text in ("word " * 60, ("word " * 60, "short")):
        tokens = backbone.prompt_tokens(task.prompt(backbone.fitted(task, text, 90)))
        assert 80 <= len(tokens) <= 90
        told = backbone._text(tokens)
        assert "Which?\nOptions: a, b\nInput" in told
        assert "short" in told or isinstance(text, str)
        shares, read = backbone.shares(task, text, 90)
        assert read == backbone.fitted(task, text, 90 - len(backbone.answer_tokens("a"))) != text
        likelihoods = [one_by_one(backbone, backbone.prompt_tokens(task.prompt(read)), backbone.answer_tokens(name)) for name in "ab"]
        assert list(shares.values()) == pytest.approx(torch.tensor(likelihoods).softmax(0).tolist(), abs=1e-4)
        assert list(shares) == ["a", "b"]
    with pytest.raises(ConditionError, match="without its text it is too long already"):
        backbone.fitted(task, "word", 20)
    long, answer = backbone.prompt_tokens("word " * 100), backbone.answer_tokens("b" * 99)
    for ask in (
        lambda: backbone.answers([long], 100),
        lambda: backbone.choices([backbone.prompt_tokens("?"), long], [backbone.answer_tokens("a"), answer]),
        lambda: backbone.judge([long], [answer]),
        lambda: backbone.log_likelihoods([long], [answer]),
    ):
        with pytest.raises(ConditionError, match="and 100 of its answer are more than the 512 of the model"):
            ask()
    for given in ("", " "):
        with pytest.raises(ConditionError, match="empty"):
            TaskPrompt("Do.", [("a", given)], free=True)
    with pytest.raises(ConditionError, match="an answer is empty"):
        backbone.answer_tokens("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 200}, "the tokenizer has 259 tokens, the model embeddings for 200"),
        ({"template": "{{ raise_exception('no such role') }}"}, "chat template cannot be used: .*no such role"),
    ],
)
def test_bases_that_cannot_answer_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    template = change.pop("template", TEMPLATE)
    folder = save_llama(tmp_path / "base", template)
    if change:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(change["vocab_size"])
        model.save_pretrained(folder)
    with pytest.raises(HubError, match=message):
        CausalBackbone.load(Backbone(str(folder)))


def test_a_tokenizer_without_padding_or_end(tmp_path: Path) -> None:
    assert CausalBackbone.load(Backbone(str(save_gpt2(tmp_path / "no-pad", pad_token=None)))).end == 1
    with pytest.raises(HubError, match="neither a padding token nor an end-of-text token"):
        CausalBackbone.load(Backbone(str(save_gpt2(tmp_path / "no-end", pad_token=None, eos_token=None))))
    words = tokenizer(TEMPLATE)
    words.add_tokens(["<new>"])
    backbone = CausalBackbone(CausalBackbone.load(Backbone(str(tmp_path / "no-pad"))).model, words)
    with pytest.raises(HubError, match="no embedding of the token '<new>'"):
        backbone.prompt_tokens("a <new> word")
    with pytest.raises(HubError, match="no answer would ever end"):
        CausalBackbone(CausalBackbone.load(Backbone(str(tmp_path / "no-pad"))).model, tokenizer(None, eos_token=None))


# --- tasks -------------------------------------------------------------------------------------------------------------------


def write_generation_task(folder: Path, rows: list[dict[str, Any]], **meta: Any) -> Path:
    folder.mkdir(parents=True)
    facts = {"name": folder.name, "description": f"Do {folder.name}.", "task_type": "generation", **meta}
    (folder / "meta.json").write_text(json.dumps(facts))
    for split, part in (("train", rows), ("test", rows[:4])):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return folder


OPPOSITES = [("up", "down"), ("in", "out"), ("on", "off"), ("hot", "cold"), ("big", "small"), ("old", "new")]


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two collections of tasks, one of generation and one of classification."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [*OPPOSITES, *((second, first) for first, second in OPPOSITES)]
    rows = [{"input": first, "outputs": [second, second.upper()]} for first, second in pairs]
    write_generation_task(folder / "generation" / "opposites", rows)
    write_generation_task(folder / "generation" / "copies", [{"input": first, "outputs": [first]} for first, _ in pairs])
    sides = [(word, label) for pair in OPPOSITES for label, word in enumerate(pair)]
    write_task(folder / "text" / "sides", "Which side?", ["left", "left_most"], {"train": sides, "validation": sides[:6]}, group="toy")
    return folder


def test_tasks_of_both_kinds(collections: Path) -> None:
    tasks = {task.name: task for task in load_language_tasks(collections)}
    assert list(tasks) == ["copies", "opposites", "sides"]
    assert tasks["sides"].exchanges("train")[1] == Exchange("down", ("left most",))
    assert tasks["sides"].reported_split == "validation"
    assert tasks["opposites"].test_exchanges(1)[0].answers[1].isupper()
    assert [task.name for task in load_language_tasks(collections / "text")] == ["sides"]
    first, *others = tasks["opposites"].conditions(6)
    assert (first.free, first.labels, len(first.examples)) == (True, (), 12)
    assert all(other.free and not other.labels for other in others)
    assert first.from_json(first.to_json()) == first


def test_malformed_tasks_are_refused(collections: Path, tmp_path: Path) -> None:
    for place, (row, message) in enumerate((
        ({"input": "a", "outputs": []}, "outputs must be a list of answers"),
        ({"input": "a", "outputs": [" "]}, "none of them empty"),
        ({"input": " ", "outputs": ["b"]}, "input must be a text"),
        ({"text": "a"}, "line 1: KeyError"),
    )):
        task, = load_language_tasks(tmp_path, [write_generation_task(tmp_path / f"bad-{place}", [row]).name])
        with pytest.raises(TaskDataError, match=message):
            task.exchanges("train")
    with pytest.raises(TaskDataError, match=r"meta\.json is missing"):
        load_language_tasks(collections, ["nothing"])
    write_generation_task(tmp_path / "one" / "twin", [])
    write_generation_task(tmp_path / "two" / "twin", [])
    for names in (None, ["twin"]):
        with pytest.raises(TaskDataError, match="have one name"):
            load_language_tasks(tmp_path, names)
    with pytest.raises(TaskDataError, match="no classification or generation tasks below"):
        load_language_tasks(tmp_path / "one" / "twin")


# --- training ----------------------------------------------------------------------------------------------------------------


def section(base: Path, kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "tasks": ["opposites", "sides"], "unseen": ["copies"], "family": "causal-lm", "base": Backbone(str(base)).to_json(), "rank": 4,
        "alpha": 8.0, "target_modules": LINEARS[kind], "fan_in_fan_out": kind == "gpt2", "train_lora_a": True, "runs": 1, "steps": 3,
        "batch_size": 4, "max_length": 160, "learning_rates": [0.01], "multitask_steps": 2, "metric_rows": 4, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def zoos(bases: dict[str, Path], collections: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    folder = tmp_path_factory.mktemp("zoos")
    return {
        kind: collect(parse(CollectConfig, section(base, kind), "collect"), collections, folder / kind) for kind, base in bases.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_collected_on_all_linear_layers(kind: str, zoos: dict[str, Zoo], bases: dict[str, Path]) -> None:
    run = zoos[kind].runs("opposites")[0]
    adapter = run.adapter()
    assert adapter.family is family_named("causal-lm")
    assert adapter.spec.task_type == "CAUSAL_LM"
    assert len(adapter.modules) == {"llama": 14, "gpt2": 8}[kind]
    assert {"accuracy", "loss", "split"} <= run.facts.keys()
    assert adapter.metadata["description"] == "Do opposites."
    assert zoos[kind].runs("sides")[0].adapter().metadata["labels"] == ["left", "left_most"]
    starts = {key: value for key, value in adapter.tensors.items() if ".lora_A." in key}
    assert not all(torch.equal(value, zoos[kind].runs("sides")[0].adapter().tensors[key]) for key, value in starts.items())


def test_one_frozen_factor_and_side_by_side(bases: dict[str, Path], collections: Path, tmp_path: Path) -> None:
    config = parse(CollectConfig, section(bases["llama"], "llama", train_lora_a=False, multitask_steps=0), "collect")
    alone, together = (collect(config, collections, tmp_path / str(count), together=count) for count in (1, 3))
    for name in ("opposites", "sides", "copies"):
        first, second = (zoo.runs(name)[0].adapter() for zoo in (alone, together))
        for key, tensor in first.tensors.items():
            torch.testing.assert_close(second.tensors[key], tensor, atol=2e-4, rtol=1e-3)
            assert ".lora_A." not in key or torch.equal(tensor, alone.runs("sides")[0].adapter().tensors[key])


@pytest.mark.parametrize("name", ["opposites", "sides"])
def test_a_task_is_learnt(name: str, bases: dict[str, Path], collections: Path, tmp_path: Path) -> None:
    changes = {"tasks": [name], "unseen": [], "subset": 1.0, "rank": 16, "alpha": 32, "steps": 300, "batch_size": 8, "multitask_steps": 0}
    zoo = collect(parse(CollectConfig, section(bases["llama"], "llama", **changes), "collect"), collections, tmp_path / "zoo")
    run = zoo.runs(name)[0]
    task, = load_language_tasks(collections, [name])
    backbone = CausalBackbone.load(zoo.base)
    exchanges = task.exchanges("train")
    before = accuracy(predict(backbone, task, exchanges, 160), exchanges)
    with run.adapter().attached(backbone):
        after = accuracy(predict(backbone, task, exchanges, 160), exchanges)
    assert after >= 0.7 > before
    assert 0 <= run.facts["accuracy"] <= 1


@pytest.mark.parametrize(("tasks", "length", "message"), [(["copies"], 30, "more than 30"), (["sides"], 30, "too long already")])
def test_what_does_not_fit_is_refused_before_training(
    tasks: list[str], length: int, message: str, bases: dict[str, Path], collections: Path, tmp_path: Path
) -> None:
    config = parse(CollectConfig, section(bases["llama"], "llama", tasks=tasks, unseen=[], max_length=length), "collect")
    with pytest.raises(TaskDataError, match=f"{tasks[0]}: .*{message}"):
        collect(config, collections, tmp_path / "zoo")


# --- others read them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_and_transformers_read_them(kind: str, zoos: dict[str, Zoo], bases: dict[str, Path]) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = zoos[kind].runs("opposites")[0]
    backbone = CausalBackbone.load(Backbone(str(bases[kind])))
    tokens = torch.tensor([backbone.prompt_tokens("hello")])
    base = backbone.model(tokens).logits
    with run.adapter().attached(backbone):
        ours = backbone.model(tokens).logits
    assert not torch.allclose(ours, base, atol=1e-3)
    torch.testing.assert_close(AutoPeftModelForCausalLM.from_pretrained(run.folder)(input_ids=tokens).logits, ours, atol=1e-4, rtol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(bases[kind])
    theirs.load_adapter(str(run.folder))
    torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-4, rtol=1e-4)
    assert LoraAdapter.load(run.folder).family is family_named("causal-lm")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_base_answers_alike(kind: str, zoos: dict[str, Zoo], tmp_path: Path) -> None:
    adapter = zoos[kind].runs("opposites")[0].adapter()
    backbone, merged = CausalBackbone.load(adapter.base), CausalBackbone.load(Backbone(str(save_merged(adapter, tmp_path / "merged"))))
    assert merged.prompt_tokens("hi") == backbone.prompt_tokens("hi")  # its chat template came along
    tokens = torch.tensor([backbone.prompt_tokens("hello")])
    with adapter.attached(backbone):
        torch.testing.assert_close(merged.model(tokens).logits, backbone.model(tokens).logits, atol=1e-4, rtol=1e-4)
