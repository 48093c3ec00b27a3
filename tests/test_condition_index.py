from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import HIDDEN

from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.condition_index import ConditionIndex, Neighbour
from cond_pdiff.models.prompt_encoders import SentenceConditionEncoder

NAMES = ("zebra", "apple", "mango", "lemon")  # not in the alphabet's order
DIM = 8


def unit_parts(*tasks: int, present: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
    """Conditions of three unit parts of size 8; part p of task t points along axis (t + p) % 8."""
    parts = torch.zeros(len(tasks), 3, DIM)
    for row, task in enumerate(tasks):
        for part in present:
            parts[row, part, (task + part) % DIM] = 1
    return parts.flatten(1)


@pytest.fixture
def index() -> ConditionIndex:
    """Four tasks, each with a complete prompt, one without examples, and a plain description."""
    index = ConditionIndex({name: {"labels": [name, "other"]} for name in NAMES}, 3 * DIM, num_parts=3)
    index.fit(torch.stack([unit_parts(0, 1, 2, 3), unit_parts(0, 1, 2, 3, present=(0, 1)), unit_parts(0, 1, 2, 3, present=(0,))], dim=1))
    return index


def test_the_most_similar_comes_first(index: ConditionIndex) -> None:
    condition = 0.6 * unit_parts(1)[0] + 0.5 * unit_parts(3)[0] + 0.2 * unit_parts(0)[0]
    nearest = index.nearest(condition, count=4)
    assert [neighbour.task for neighbour in nearest] == ["apple", "lemon", "zebra", "mango"]
    assert [neighbour.similarity for neighbour in nearest] == sorted((n.similarity for n in nearest), reverse=True)
    assert [neighbour.task for neighbour in index.nearest(condition)] == ["apple", "lemon", "zebra"]
    assert index.nearest(condition, count=9) == nearest


@pytest.mark.parametrize("task", range(4))
@pytest.mark.parametrize("present", [(0, 1, 2), (0, 1), (0,), (0, 2)])
def test_a_trained_prompt_has_similarity_one_whatever_parts_it_has(index: ConditionIndex, task: int, present: tuple[int, ...]) -> None:
    condition = unit_parts(task, present=present)[0]
    assert index.nearest(condition, 1) == [Neighbour(NAMES[task], 1.0)]
    assert index.in_distribution(index.nearest(condition, 1)[0].similarity)


def test_what_shares_nothing_has_similarity_zero_and_is_out(index: ConditionIndex) -> None:
    (first, *_) = index.nearest(unit_parts(5)[0])
    assert first.similarity == 0
    assert not index.in_distribution(first.similarity)
    (first, *_) = index.nearest(torch.zeros(3 * DIM))
    assert first.similarity == 0


def test_the_embeddings_are_the_means_of_complete_prompts(index: ConditionIndex) -> None:
    assert torch.equal(index.embeddings, unit_parts(0, 1, 2, 3))
    index.fit(torch.stack([unit_parts(0, 1, 2, 3, present=(0,)), unit_parts(4, 5, 6, 7, present=(0,))], dim=1))
    torch.testing.assert_close(index.embeddings, (unit_parts(0, 1, 2, 3, present=(0,)) + unit_parts(4, 5, 6, 7, present=(0,))) / 2)


def test_the_threshold_is_what_prompts_seldom_reach_with_another_group() -> None:
    rng = torch.Generator().manual_seed(0)
    axes = torch.eye(4, 20)
    axes[1] = torch.nn.functional.normalize(axes[0] + 0.3 * axes[1], dim=0)  # a and b are near relatives, of one group
    own = torch.nn.functional.normalize(axes[:, None] + 0.1 * torch.randn(4, 50, 20, generator=rng), dim=2)
    index = ConditionIndex({"a": {"group": "g"}, "b": {"group": "g"}, "c": {"group": "h"}, "d": {}}, 20)
    index.fit(own)
    similarities = torch.stack([index.similarities(prompts) for prompts in own])
    for task in range(4):
        assert (similarities[task, :, task] >= index.threshold).all()
    others = ([2, 3], [2, 3], [0, 1, 3], [0, 1, 2])
    to_other = torch.cat([similarities[task][:, other].amax(1) for task, other in enumerate(others)])
    assert float((to_other >= index.threshold).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert (similarities[0, :, 1] >= index.threshold).all()  # a relative of the same group is no other kind

    index = ConditionIndex({name: {"group": "g"} for name in "abcd"}, 20)  # one group only: every other task counts
    index.fit(own)
    assert 0.8 < float(index.threshold) < 1


def test_among_crowded_tasks_their_own_prompts_are_not_foreign() -> None:
    rng = torch.Generator().manual_seed(0)
    axes = torch.ones(30, 20) + 0.2 * torch.randn(30, 20, generator=rng)
    own = torch.nn.functional.normalize(axes[:, None] + 0.3 * torch.randn(30, 50, 20, generator=rng), dim=2)
    index = ConditionIndex({f"task {number}": {} for number in range(30)}, 20)
    index.fit(own)
    reached = torch.cat([index.similarities(prompts) for prompts in own]).amax(1)
    assert float((reached >= index.threshold).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_evidence_can_only_add() -> None:
    index = ConditionIndex({name: {} for name in NAMES}, 3 * DIM, num_parts=3, last_is_evidence=True)
    index.fit(unit_parts(0, 1, 2, 3)[:, None])
    strange, complete, plain = unit_parts(0)[0].clone(), unit_parts(0)[0], unit_parts(0, present=(0, 1))[0]
    strange[2 * DIM :] = torch.eye(DIM)[7]
    for condition in (strange, complete, plain):
        assert index.nearest(condition, 1) == [Neighbour(NAMES[0], 1.0)]
    half = unit_parts(0)[0].clone()
    half[DIM : 2 * DIM] = 0
    half[:DIM] = torch.eye(DIM)[7]
    assert index.nearest(half, 1) == [Neighbour(NAMES[0], 0.5)]


def test_plain_strings_are_comparable_with_full_prompts(tiny_backbone: Backbone) -> None:
    encoder = SentenceConditionEncoder(tiny_backbone.to_json(), HIDDEN)
    words = {"film": ("good", "bad"), "meal": ("kitten", "puppy"), "room": ("feather", "bark")}
    full = [TaskPrompt(f"the {noun}", [(f"the {label}", label) for label in labels]) for noun, labels in words.items()]
    encoder.fit_center(full)
    plain = [f"the {noun}" for noun in words]
    own = torch.stack([encoder.encode([prompt, string])[0] for prompt, string in zip(full, plain, strict=True)])
    index = ConditionIndex({noun: {} for noun in words}, encoder.condition_dim, **encoder.index_options)
    index.fit(own)
    for noun, conditions in zip(words, own, strict=True):
        for condition in conditions:
            (first, *_) = index.nearest(condition)
            assert first.task == noun
            assert first.similarity == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 2, 3 * DIM), (4, 2, DIM), (4, 3 * DIM)])
def test_fit_refuses_other_shapes(index: ConditionIndex, shape: tuple[int, ...]) -> None:
    with pytest.raises(CondPDiffError, match=rf"expected \(4, prompts, {3 * DIM}\) conditions, got"):
        index.fit(torch.zeros(shape))


def test_one_task_alone_is_nearest_to_everything() -> None:
    index = ConditionIndex({"only": {}}, DIM)
    index.fit(torch.eye(DIM)[None, :1])
    assert index.nearest(torch.eye(DIM)[0]) == [Neighbour("only", 1.0)]
    assert index.in_distribution(0.5)


def test_save_and_load_keep_order_and_numbers(index: ConditionIndex, tmp_path: Path) -> None:
    index.save_pretrained(tmp_path)
    loaded = ConditionIndex.from_pretrained(tmp_path)
    assert loaded.names == list(NAMES)
    assert loaded.config.tasks["mango"]["labels"] == ["mango", "other"]
    assert torch.equal(loaded.embeddings, index.embeddings)
    assert torch.equal(loaded.threshold, index.threshold)
