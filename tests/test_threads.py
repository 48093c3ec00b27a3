"""Eight threads that share models get the answers that each would get alone."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from conftest import EXAMPLES, PROMPT, make_adapter, quiet, same, seeds
from diffusers import PixArtAlphaPipeline
from test_adapter_head import head_adapter

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier
from cond_pdiff.hub import Backbone
from cond_pdiff.locks import _locks, in_one_thread, lock_of
from cond_pdiff.models.head_backbone import HeadBackbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.refinement import refine
from cond_pdiff.text_to_image import load_text_to_image, make_pictures, unknown_words
from cond_pdiff.training.zoo.zoo import Zoo

THREADS = 8
TEXTS = ["the good film", "a bad meal in the room", ("the kitten", "the puppy"), "the song " * 40, "lovely"]
LABELS = ("positive", "negative")
Answer = TypeVar("Answer")


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(ask: Callable[[int], Answer], times: int = 3) -> list[Answer]:
    """What eight threads are answered that begin together, each asking `ask` for its number several times; the last answers."""
    start = threading.Barrier(THREADS)

    def run(number: int) -> Answer:
        start.wait()
        return [ask(number) for _ in range(times)][-1]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def finished(thread: threading.Thread) -> bool:
    thread.join(0.2)
    return not thread.is_alive()


def in_a_thread(what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def other_adapter(sentence_backbone: SentenceBackbone, tiny_backbone: Backbone) -> LoraAdapter:
    return make_adapter(sentence_backbone.model, tiny_backbone.repo_id, seed=1)


# --- the same answers as alone -----------------------------------------------------------------------------------------------


def test_one_pipeline_makes_what_it_makes_alone(pipe: CondPDiffPipeline) -> None:
    def ask(number: int) -> tuple[LoraAdapter, str]:
        condition = PROMPT if number % 2 else "Which animal is it about?"
        steps = 3 + number % 3
        made = pipe(condition, num_adapters=2, generator=seeds(number, number + 50), num_inference_steps=steps, guidance_scale=1.0 + number)
        return made.adapter, str(made.report)

    alone = [ask(number) for number in range(THREADS)]
    for (adapter, report), (expected, told) in zip(at_once(ask), alone, strict=True):
        assert same(adapter, expected)
        assert adapter.metadata == expected.metadata
        assert report == told


def test_a_fresh_pipeline_loads_what_it_needs_once(tiny_generator: Path) -> None:
    pipe = quiet(CondPDiffPipeline.from_pretrained(tiny_generator))
    made = at_once(lambda number: (pipe(PROMPT, generator=seeds(3), num_inference_steps=2).adapter, pipe.base_model()), times=1)
    assert len({id(base) for _, base in made}) == 1
    assert all(same(adapter, made[0][0]) for adapter, _ in made)


def test_pipelines_are_loaded_at_once(tiny_generator: Path, tiny_base: Backbone) -> None:
    def ask(number: int) -> LoraAdapter | bytes:
        if number % 4 == 3:
            return make_pictures(load_text_to_image(tiny_base), ["a red house"], num_inference_steps=2)[0].tobytes()
        return quiet(CondPDiffPipeline.from_pretrained(tiny_generator))("Is it good?", generator=seeds(1), num_inference_steps=2).adapter

    *_, adapter, picture = (ask(number) for number in range(4))
    for number, found in enumerate(at_once(ask, times=1)):
        assert found == picture if number % 4 == 3 else same(found, adapter)


def test_classifiers_of_one_backbone_do_not_see_each_other(
    sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, other_adapter: LoraAdapter
) -> None:
    classifiers = [PrototypeClassifier(sentence_backbone, LABELS, adapter) for adapter in (tiny_adapter, other_adapter, None)]

    def ask(number: int) -> tuple[torch.Tensor, list[str], int]:
        classifier = classifiers[number % 3]
        return classifier.logits(TEXTS), classifier.predict(TEXTS), sentence_backbone.count_tokens("the song " * 400)

    alone = [ask(number) for number in range(THREADS)]
    assert not torch.allclose(alone[0][0], alone[1][0], atol=1e-2)
    for (logits, predicted, tokens), (expected, named, count) in zip(at_once(ask, times=10), alone, strict=True):
        assert torch.equal(logits, expected)
        assert (predicted, tokens) == (named, count)


def test_heads_take_turns(tiny_backbone: Backbone) -> None:
    base = HeadBackbone.load(tiny_backbone, 2, ["classifier"])
    adapters = [head_adapter(base.model, tiny_backbone.repo_id, seed) for seed in range(THREADS)]

    def ask(number: int) -> torch.Tensor:
        with adapters[number].attached(base.model, check=False):
            return base.logits(TEXTS, 32)

    alone = [ask(number) for number in range(THREADS)]
    assert all(torch.equal(found, expected) for found, expected in zip(at_once(ask), alone, strict=True))


def test_refining_beside_classifying(
    sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, other_adapter: LoraAdapter
) -> None:
    classifiers = [PrototypeClassifier(sentence_backbone, LABELS, adapter, examples=EXAMPLES) for adapter in (tiny_adapter, other_adapter)]

    def ask(number: int) -> LoraAdapter | torch.Tensor:
        classifier = classifiers[number % 2]
        return refine(classifier, steps=3, seed=number) if number < 6 else classifier.logits(TEXTS)

    alone = [ask(number) for number in range(THREADS)]
    for found, expected in zip(at_once(ask, times=2), alone, strict=True):
        assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else same(found, expected)


def test_pictures_with_adapters_and_without(style_zoo: Zoo, text_to_image: PixArtAlphaPipeline) -> None:
    styles: list[list[tuple[LoraAdapter, float]]] = [[(style_zoo.runs(name)[0].adapter(), 4.0)] for name in ("embers", "lagoon")]
    mixtures = [*styles, [], styles[0] + styles[1]]

    def ask(number: int) -> bytes:
        assert unknown_words(text_to_image, "a flibbertigibbet") == ["flibbertigibbet"]
        steps, mixture = 2 + number % 2, mixtures[number % 4]
        return make_pictures(text_to_image, ["a red house"], mixture, number, num_inference_steps=steps)[0].tobytes()

    alone = [ask(number) for number in range(THREADS)]
    assert len(set(alone)) == THREADS
    assert at_once(ask, times=2) == alone


# --- the lock ----------------------------------------------------------------------------------------------------------------


def test_others_wait_while_an_adapter_is_attached_in_a_block(
    sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter, other_adapter: LoraAdapter
) -> None:
    model, base = sentence_backbone.model, sentence_backbone.embed(["good"])
    seen: dict[str, torch.Tensor] = {}
    with tiny_adapter.attached(model):
        adapted = sentence_backbone.embed(["good"])
        reader = in_a_thread(lambda: seen.update(base=sentence_backbone.embed(["good"])))
        assert not finished(reader)
        assert torch.equal(sentence_backbone.embed(["good"]), adapted)
    reader.join()
    assert torch.equal(seen["base"], base)
    with tiny_adapter.attached(model):
        writer = in_a_thread(lambda: seen.update(attachment=other_adapter.attach(model)))
        assert not finished(writer)
        assert torch.equal(sentence_backbone.embed(["good"]), adapted)
    writer.join()  # an attachment without a block is there for all threads
    assert not torch.equal(sentence_backbone.embed(["good"]), base)
    with tiny_adapter.attached(model):
        remover = in_a_thread(seen["attachment"].detach)
        assert not finished(remover)
    remover.join()
    assert torch.equal(sentence_backbone.embed(["good"]), base)


def test_a_block_that_fails_lets_others_go_on(sentence_backbone: SentenceBackbone, tiny_adapter: LoraAdapter) -> None:
    with pytest.raises(ZeroDivisionError), tiny_adapter.attached(sentence_backbone.model):
        raise ZeroDivisionError
    assert finished(in_a_thread(lambda: sentence_backbone.embed(["good"])))


def test_locks_belong_to_models_without_being_part_of_them(pipe: CondPDiffPipeline, tmp_path: Path) -> None:
    expected = pipe("Is it good?", generator=seeds(1), num_inference_steps=2).adapter
    assert lock_of(copy.copy(pipe).unet) is lock_of(pipe.unet)
    assert lock_of(copy.deepcopy(pipe.unet)) is not lock_of(pipe.unet)
    pipe.save_pretrained(tmp_path / "saved")
    for other in (copy.copy(pipe), copy.deepcopy(pipe), quiet(CondPDiffPipeline.from_pretrained(tmp_path / "saved"))):
        assert same(other("Is it good?", generator=seeds(1), num_inference_steps=2).adapter, expected)
    gc.collect()
    count, module = len(_locks), torch.nn.Linear(1, 1)
    lock_of(module)
    assert len(_locks) == count + 1
    del module
    gc.collect()
    assert len(_locks) == count


def counting(model: torch.nn.Module, count: int, ended: threading.Event) -> Generator[tuple[int, int], None, None]:
    """Numbers and the thread that counts them, which has the model to itself meanwhile."""
    try:
        with lock_of(model):
            for number in range(count):
                yield number, threading.get_ident()
            if count == 3:
                raise ValueError("three")
    finally:
        ended.set()


def test_a_generator_that_holds_a_lock_is_driven_by_many_threads() -> None:
    model, ended = torch.nn.Linear(1, 1), threading.Event()
    steps = in_one_thread(lambda: counting(model, 40, ended))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        told = [(one, other)[place % 2].submit(next, steps).result() for place in range(40)]
    assert [number for number, _ in told] == list(range(40))
    assert len({thread for _, thread in told} | {threading.get_ident()}) == 2
    assert next(steps, None) is None
    assert ended.is_set()
    with pytest.raises(ValueError, match="three"):
        list(in_one_thread(lambda: counting(model, 3, ended)))
    assert at_once(lambda number: len(list(in_one_thread(lambda: counting(model, 5, ended))))) == [5] * THREADS


def test_a_caller_that_stops_early_ends_the_thread() -> None:
    model, ended = torch.nn.Linear(1, 1), threading.Event()
    steps = in_one_thread(lambda: counting(model, 10**9, ended))
    assert next(steps)[0] == 0
    assert not ended.is_set()
    steps.close()
    assert ended.wait(30)
    assert lock_of(model).acquire(timeout=30)
    lock_of(model).release()
