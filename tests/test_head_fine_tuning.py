"""Fine-tuning with a head, and the paper's language half from end to end through the real classes of its four models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, TINY_RECIPE, WORDS
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from cond_pdiff import CondPDiffPipeline, LoraAdapter, ParamUNet1D, PrototypeClassifier, TaskPrompt
from cond_pdiff.errors import AdapterError, ConditionError, HubError, TaskDataError, TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import HEAD_TASK, KEY_PREFIX, LoraSpec, head_modules, target_linears, update_shape
from cond_pdiff.models.head_backbone import HeadBackbone
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.stages.tune import tune
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.zoo import Zoo
from cond_pdiff.verify import verify

SPECIAL = ("[PAD]", "[UNK]", "[END]")
SMALL = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
NARROW = {**SMALL, "intermediate_size": 64, "initializer_range": 0.15, "pad_token_id": 0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}  # as microsoft/deberta-base
# Variant of the recipe → the architecture, tiny and whole.
ARCHITECTURES: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[], PretrainedConfig]]] = {
    "bert": (lambda: BertConfig(**NARROW), BertConfig),
    "roberta": (lambda: RobertaConfig(**NARROW, max_position_embeddings=40), RobertaConfig),
    "deberta": (lambda: DebertaConfig(**NARROW, **DISENTANGLED), lambda: DebertaConfig(**DISENTANGLED)),
    "gpt2": (lambda: GPT2Config(**SMALL, initializer_range=0.15), GPT2Config),
}
HEADS = {"bert": ["classifier"], "roberta": ["classifier"], "deberta": ["classifier", "pooler"], "gpt2": ["score"]}
PROMPT = TaskPrompt("Is the remark kind?", [("the awful meal", "negative"), ("the good film", "positive")])


def variant(name: str, *others: str) -> dict[str, Any]:
    return read_recipe("+".join(["paper-language-half", *([name] if name != "bert" else []), *others]))


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    """A tiny base model without a head, and its tokenizer; GPT-2's has no padding."""

    def make(name: str) -> Backbone:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModel.from_config(ARCHITECTURES[name][0]()).save_pretrained(folder)
        vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"unk_token": "[UNK]", "eos_token": "[END]", **({} if name == "gpt2" else {"pad_token": "[PAD]"})}
        names = ["input_ids", "attention_mask"]
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=32, model_input_names=names, padding_side="right", **special
        ).save_pretrained(folder)
        return Backbone(str(folder))

    return make


def tiny(recipe: dict[str, Any], base: Backbone, tiny_backbone: Backbone, **entries: Any) -> dict[str, Any]:
    """The recipe with its own settings of adapters, and stages of one step."""
    few = {"tasks": ["moods", "likeness"], "steps": 4, "batch_size": 8, "max_length": 16, "learning_rates": [0.01], "last_checkpoints": 2}
    recipe["collect"].update({"base": base.to_json(), **few, "multitask_steps": 0, "metric_rows": 8, **entries})
    encoder = {"type": "SentenceConditionEncoder", "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    for stage in ("autoencoder", "unet"):
        recipe[stage] = {**TINY_RECIPE[stage], "fit": {**TINY_RECIPE[stage]["fit"], "steps": 1}}
    recipe["unet"].update(condition_encoder=encoder)
    return recipe


@pytest.fixture(scope="module")
def bert_recipe(make_base: Any, tiny_backbone: Backbone) -> dict[str, Any]:
    return tiny(variant("bert"), make_base("bert"), tiny_backbone)


@pytest.fixture(scope="module")
def bert_zoo(bert_recipe: dict[str, Any], tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return collect(parse(CollectConfig, bert_recipe["collect"], "collect"), tasks_folder, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def bert_generator(bert_recipe: dict[str, Any], bert_zoo: Zoo, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(bert_recipe, bert_zoo.folder, tasks_folder, tmp_path_factory.mktemp("run"))


@pytest.fixture
def config(bert_recipe: dict[str, Any]) -> CollectConfig:
    return parse(CollectConfig, bert_recipe["collect"], "collect")


# --- zoos --------------------------------------------------------------------------------------------------------------------


def test_a_zoo_of_heads(bert_zoo: Zoo, config: CollectConfig, tasks_folder: Path) -> None:
    assert bert_zoo.family.name == "sequence-classifier"
    assert bert_zoo.facts["collect"]["lora_dropout"] == bert_zoo.facts["collect"]["weight_decay"] == 0.1
    weights = []
    for name in ("moods", "likeness"):
        (run,) = bert_zoo.runs(name)
        adapters = list(run.adapters())
        assert len(adapters) == 2  # the last checkpoints
        assert {adapter.spec.task_type for adapter in adapters} == {HEAD_TASK}
        weights += [adapter.tensors[f"{KEY_PREFIX}classifier.weight"] for adapter in adapters]
        task = Task.load(tasks_folder / name)
        base = HeadBackbone.load(bert_zoo.base, 2, ["classifier"])
        rows = task.test_rows(8)
        with adapters[0].attached(base.model):
            predicted = base.logits([text for text, _ in rows], 16).argmax(1).tolist()
        right = sum(guess == label for guess, (_, label) in zip(predicted, rows, strict=True))
        assert run.facts["accuracy"] == round(right / len(rows), 4)
    assert not any(torch.equal(one, other) for index, one in enumerate(weights) for other in weights[:index])


def test_a_head_learns_its_task(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    longer = replace(config, tasks=("moods",), rank=2, steps=100, last_checkpoints=1, learning_rates=(0.02,), metric_rows=100)
    (run,) = collect(longer, tasks_folder, tmp_path / "zoo").runs("moods")
    assert run.facts["accuracy"] >= 0.9


def test_a_lost_run_comes_back_bit_for_bit(bert_zoo: Zoo, config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    again = collect(config, tasks_folder, tmp_path / "zoo")
    assert [run.facts["sha256"] for run in again.runs("likeness")] == [run.facts["sha256"] for run in bert_zoo.runs("likeness")]


@pytest.mark.parametrize("change", [{"lora_dropout": 0.0}, {"weight_decay": 0.0}])
def test_dropout_and_weight_decay_are_heard(
    bert_zoo: Zoo, config: CollectConfig, tasks_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    other = collect(replace(config, tasks=("moods",), **change), tasks_folder, tmp_path / "zoo").runs("moods")[0].adapter()
    mine = bert_zoo.runs("moods")[0].adapter()
    assert not torch.equal(other.tensors[f"{KEY_PREFIX}classifier.weight"], mine.tensors[f"{KEY_PREFIX}classifier.weight"])
    with pytest.raises(TrainingError, match=r"\(collect, tasks differ\)"):
        collect(replace(config, tasks=("moods",), **change), tasks_folder, bert_zoo.folder)


def test_settings_of_zoos_from_before_there_were_heads_read_the_same() -> None:
    assert set(CollectConfig().record()) == {
        *("family", "rank", "alpha", "target_modules", "train_lora_a", "runs", "steps", "batch_size", "max_length", "max_pictures"),
        *("time_shift", "learning_rates", "precision", "warmup", "subset", "last_checkpoints", "checkpoint_every", "multitask_steps"),
        *("multitask_learning_rate", "from_multitask", "metric_rows", "seed"),
    }
    assert CollectConfig(weight_decay=0.1).record()["weight_decay"] == 0.1


def test_tasks_of_different_numbers_of_labels_are_refused(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="animals has 3 labels, but moods has 2; the heads of one zoo have one shape"):
        collect(replace(config, tasks=("moods", "animals")), tasks_folder, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_bases_with_other_missing_weights_are_refused(make_base: Any) -> None:
    with pytest.raises(HubError, match=r"no weights 'pooler\.dense\.bias'.*add 'pooler\.dense'.*to modules_to_save"):
        HeadBackbone.load(make_base("deberta"), 2, ["classifier"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ()}, "modules_to_save names the heads of a family that has some, got .* for 'sequence-classifier'"),
        ({"family": "sentence-encoder"}, "modules_to_save names the heads of a family that has some, got .* for 'sentence-encoder'"),
        ({"family": "heads"}, "there is no family of base models 'heads'; known are "),
        ({"lora_dropout": 1.0}, "lora_dropout must be less than 1, got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be greater than or equal to 0, got -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: CollectConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        parse(CollectConfig, {**asdict(config), **change}, "collect")


# --- generators --------------------------------------------------------------------------------------------------------------


def check_generated(generator: Path, base: Backbone, heads: list[str], tmp_path: Path) -> CondPDiffPipeline:
    """An adapter that the generator wrote gives the same logits to stock peft and to us."""
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(PROMPT, num_adapters=2, num_inference_steps=2, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert out.report.choice is not None
    assert (out.report.choice.strength, out.report.choice.predicted_gain) == (1.0, None)
    folder = out.save_adapter(tmp_path / "adapter")

    texts = ["the good film", "the meal awful poor dull bad", ("the film", "the room")]
    ours = HeadBackbone.load(base, 2, heads)
    plain = ours.logits(texts, 32)
    with LoraAdapter.load(folder).attached(ours.model):
        adapted = ours.logits(texts, 32)
    stock = AutoModelForSequenceClassification.from_pretrained(base.repo_id, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(base.repo_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        stock.config.pad_token_id = tokenizer.pad_token_id
    stock = PeftModel.from_pretrained(stock, folder).eval()
    order = [1, 2, 0]  # ours reads longer texts first; sums of another batch may round in another way
    with torch.no_grad():
        theirs = stock(**tokenizer([texts[index] for index in order], padding=True, return_tensors="pt")).logits
    assert torch.equal(adapted[order], theirs)
    assert (adapted - plain).norm() > 1e-3
    return pipe


def test_bert_from_tasks_to_an_adapter(bert_zoo: Zoo, bert_generator: Path, tmp_path: Path) -> None:
    pipe = check_generated(bert_generator, bert_zoo.base, HEADS["bert"], tmp_path)
    assert f"{KEY_PREFIX}classifier.weight" in pipe.template.layout.modelled
    assert verify(LoraAdapter.load(tmp_path / "adapter"), bert_generator).same
    assert "head classifier" in (bert_generator / "README.md").read_text()
    with pytest.raises(AdapterError, match="brings a trained head"):
        PrototypeClassifier(pipe.base_model(), ["positive", "negative"], LoraAdapter.load(tmp_path / "adapter"))
    with pytest.raises(TrainingError, match="this generator makes adapters for a sequence-classifier"):
        tune({}, bert_generator, bert_zoo.folder, tmp_path / "tune")


@pytest.mark.parametrize("name", ["roberta", "deberta", "gpt2"])
def test_the_papers_other_models_from_tasks_to_an_adapter(
    make_base: Any, tiny_backbone: Backbone, tasks_folder: Path, tmp_path: Path, name: str
) -> None:
    base = make_base(name)
    recipe = tiny(variant(name), base, tiny_backbone)
    zoo = collect(parse(CollectConfig, recipe["collect"], "collect"), tasks_folder, tmp_path / "zoo")
    adapter = zoo.runs("moods")[0].adapter()
    assert sorted(adapter.spec.modules_to_save) == HEADS[name]
    check_generated(train(recipe, zoo.folder, tasks_folder, tmp_path / "run"), base, HEADS[name], tmp_path)


def test_a_heads_labels_stand_in_its_tasks_order(bert_generator: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(bert_generator)
    pipe.set_progress_bar_config(disable=True)
    pipe.condition_index.threshold.fill_(-2)  # everything counts as known
    asked = TaskPrompt("Is the remark kind?", [("the awful meal", "negative"), ("the good film", "positive")], ["negative", "positive"])
    out = pipe(asked, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert out.report.nearest[0].task == "moods"
    assert out.report.labels == ("positive", "negative")
    with pytest.raises(ConditionError, match="heads tell 2 labels apart, the prompt names 3"):
        pipe(TaskPrompt("Which animal is it about?", labels=["cat", "dog", "bird"]))


def test_zoos_of_heads_cannot_be_evaluated_yet(bert_generator: Path, bert_zoo: Zoo, tasks_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"a sequence-classifier; so far those for causal-lm, .*text-to-image can be"):
        evaluate(bert_generator, bert_zoo.folder, tasks_folder, tmp_path, EvaluateConfig())


# --- the paper's Table 1 -----------------------------------------------------------------------------------------------------

TABLE_1 = [(name, rank) for name, ranks in (("bert", (1, 2, 4, 16)), ("roberta", (1, 2, 4, 16)), ("deberta", (1, 2, 4))) for rank in ranks]
PER_RANK = {"bert": 73_728, "roberta": 73_728, "deberta": 92_160, "gpt2": 55_296}  # the last is arithmetic; the paper has no number
ALPHAS = {1: 8, 2: 8, 4: 16, 16: 32}


@pytest.mark.parametrize(("name", "rank"), [*TABLE_1, ("gpt2", 1)])
def test_sizes_are_those_of_the_papers_table(name: str, rank: int) -> None:
    """Whole models and networks, without weights; the head is not counted, as in the paper, but modelled."""
    recipe = variant(name, *([f"rank{rank}"] if rank > 1 else []))
    config = parse(CollectConfig, recipe["collect"], "collect")
    assert (config.rank, config.alpha, config.weight_decay, config.lora_dropout) == (rank, ALPHAS[rank], 0.1, 0.1)
    assert (config.batch_size, config.max_length, config.learning_rates, config.warmup) == (16, 128, (1e-4,), 0.1)
    assert (config.last_checkpoints, config.checkpoint_every, config.train_lora_a) == (150, 1, True)
    spec = LoraSpec("base", rank, config.alpha, config.target_modules, HEAD_TASK, None, config.modules_to_save, config.fan_in_fan_out)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(ARCHITECTURES[name][1]())
    linears = target_linears(model, spec)
    assert len(linears) == 12 * len(config.target_modules)
    size = rank * sum(sum(update_shape(linear)) for linear in linears.values())
    assert size == PER_RANK[name] * rank
    size += sum(parameter.numel() for linear in head_modules(model, spec).values() for parameter in linear.parameters())
    with torch.device("meta"):
        autoencoder = ParamAutoencoder(size, **recipe["autoencoder"]["model"])
        channels, length = autoencoder.latent_shape
        network = {name: value for name, value in recipe["unet"]["denoiser"].items() if name != "type"}
        unet = ParamUNet1D(channels, length + 1, 512, **network)  # and the statistics of the normaliser
        assert autoencoder(torch.empty(2, size)).shape == (2, size)
        assert unet(torch.empty(2, channels, length + 1), 5, torch.empty(2, 512)).sample.shape == (2, channels, length + 1)
