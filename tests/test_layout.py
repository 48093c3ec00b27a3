from __future__ import annotations

import json
import random

import pytest
import torch

from cond_pdiff.errors import AdapterError
from cond_pdiff.layout import MAX_ABS_VALUE, ParamLayout


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    names = [f"{rng.choice('abc')}.{index}" for index in rng.sample(range(100), rng.randint(1, 8))]
    return {name: torch.randn([rng.randint(1, 7) for _ in range(rng.randint(1, 3))], generator=torch_rng) for name in names}


@pytest.mark.parametrize("seed", range(12))
def test_round_trip_over_random_shapes(seed: int) -> None:
    tensors = random_tensors(seed)
    names = sorted(tensors)
    constants = names[1::3]
    layout = ParamLayout.from_tensors(tensors, constants)
    params = layout.flatten(tensors)

    assert params.dtype == torch.float32
    assert params.shape == (layout.num_params,) == (sum(layout.sizes),)
    assert layout.num_adapter_params == sum(tensor.numel() for tensor in tensors.values())
    assert layout.num_adapter_params - layout.num_params == sum(tensors[name].numel() for name in constants)
    assert torch.equal(params, torch.cat([tensors[name].flatten() for name in names if name not in constants]))

    back = layout.unflatten(params, {name: tensors[name] for name in constants})
    assert list(back) == names
    assert all(torch.equal(back[name], tensors[name]) for name in names)
    assert torch.equal(layout.flatten(back), params)


@pytest.mark.parametrize("seed", range(3))
def test_json_round_trip_keeps_everything(seed: int) -> None:
    tensors = random_tensors(seed)
    layout = ParamLayout.from_tensors(tensors, sorted(tensors)[:1])
    back = ParamLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert back == layout
    assert back.modelled == layout.modelled
    assert back.sha256() == layout.sha256()


def test_sha256_is_stable_and_depends_on_everything() -> None:
    layout = ParamLayout({"a": (2, 3), "b": (4,)}, ("a",))
    # Written down: generators in the world record it, so it may never change.
    assert layout.sha256() == "428bdc86aa0bc1250b7f7db9f78bff5df85494777096095e466a2cb4ac5b3463"
    others = [
        ParamLayout({"a": (3, 2), "b": (4,)}, ("a",)),
        ParamLayout({"a": (2, 3), "c": (4,)}, ("a",)),
        ParamLayout({"b": (4,), "a": (2, 3)}, ("a",)),
        ParamLayout({"a": (2, 3), "b": (4,)}),
    ]
    assert len({layout.sha256(), *(other.sha256() for other in others)}) == 5


def test_order_of_insertion_does_not_matter() -> None:
    tensors = random_tensors(1)
    shuffled = dict(reversed(tensors.items()))
    assert ParamLayout.from_tensors(tensors).sha256() == ParamLayout.from_tensors(shuffled).sha256()
    assert torch.equal(ParamLayout.from_tensors(tensors).flatten(tensors), ParamLayout.from_tensors(shuffled).flatten(shuffled))


def test_unflatten_gives_tensors_of_their_own() -> None:
    layout = ParamLayout({"a": (2,), "b": (3,)}, ("b",))
    params, constant = torch.zeros(2), torch.zeros(3)
    back = layout.unflatten(params, {"b": constant})
    back["a"].fill_(1)
    back["b"].fill_(1)
    assert params.sum() == 0
    assert constant.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_flattened_to_float32(dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(5).to(dtype)}
    params = ParamLayout.from_tensors(tensors).flatten(tensors)
    assert params.dtype == torch.float32
    assert torch.equal(params.to(dtype), tensors["a"])


GOOD = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, r"missing 'a'.*1 missing, 0 unexpected of 2"),
        ({"c": torch.zeros(1)}, r"unexpected 'c'.*0 missing, 1 unexpected"),
        ({"a": None, "c": torch.zeros(2, 3)}, r"missing 'a' and unexpected 'c'"),
        ({"a": torch.zeros(3, 2)}, r"'a' has shape \(3, 2\), expected \(2, 3\)"),
        ({"a": torch.zeros(6)}, r"'a' has shape \(6,\)"),
        ({"b": torch.zeros(4, dtype=torch.int64)}, r"'b' has dtype torch.int64"),
        ({"b": torch.zeros(4, dtype=torch.float64)}, r"'b' has dtype torch.float64"),
        ({"b": torch.tensor([0.0, 0.0, float("nan"), 0.0])}, r"'b' holds NaN or infinite"),
        ({"b": torch.tensor([0.0, -float("inf"), 0.0, 0.0])}, r"'b' holds NaN or infinite"),
        ({"b": torch.tensor([0.0, -1.01 * MAX_ABS_VALUE, 0.0, 0.0])}, r"'b' holds a value of size 1.01e\+04"),
    ],
)
def test_validate_names_what_is_wrong(change: dict[str, torch.Tensor | None], message: str) -> None:
    layout = ParamLayout.from_tensors(GOOD)
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    layout.validate(GOOD)
    for refuse in (layout.validate, layout.flatten):
        with pytest.raises(AdapterError, match=message):
            refuse(bad)


@pytest.mark.parametrize(
    ("params", "constants", "message"),
    [
        (torch.zeros(5), {"b": torch.zeros(4)}, r"shape \(5,\), expected \(6,\)"),
        (torch.zeros(1, 6), {"b": torch.zeros(4)}, r"shape \(1, 6\), expected \(6,\)"),
        (torch.zeros(6), None, r"1 constant tensors of the layout, 0 came"),
        (torch.zeros(6), {"b": torch.zeros(4), "c": torch.zeros(1)}, r"1 constant tensors of the layout, 2 came"),
        (torch.zeros(6), {"c": torch.zeros(4)}, r"constant tensors"),
        (torch.zeros(6), {"b": torch.zeros(3)}, r"constant tensor 'b' has shape \(3,\), expected \(4,\)"),
    ],
)
def test_unflatten_refuses_what_does_not_fit(params: torch.Tensor, constants: dict[str, torch.Tensor] | None, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ParamLayout.from_tensors(GOOD, ["b"]).unflatten(params, constants)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "shapes"),
        ([], "not a layout"),
        (None, "not a layout"),
        ({"shapes": [["a", [1]]]}, "constants"),
        ({"shapes": [["a", 3]], "constants": []}, "not a layout"),
        ({"shapes": [["a", ["x"]]], "constants": []}, "not a layout"),
        ({"shapes": ["abc"], "constants": []}, "not a layout"),
        ({"shapes": [["a", [2, 0]]], "constants": []}, "at least 1"),
        ({"shapes": [["a", [-1]]], "constants": []}, "at least 1"),
        ({"shapes": [["a", [float("inf")]]], "constants": []}, "not a layout"),
        ({"shapes": [["a", [2]], ["a", [3]]], "constants": []}, "twice"),
        ({"shapes": [], "constants": []}, "at least one tensor"),
        ({"shapes": [["a", [1]]], "constants": ["b"]}, r"constant tensors \['b'\]"),
    ],
)
def test_from_json_refuses_anything_else(data: object, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ParamLayout.from_json(data)
