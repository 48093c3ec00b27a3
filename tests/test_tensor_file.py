"""Safetensors files, a tensor at a time."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cond_pdiff.tensor_file import TensorFile, in_file_order, write_tensors

TENSORS = {
    "b.10": torch.randn(3, 4),
    "b.9": torch.randn(2).half(),
    "a": torch.randn(5, 1).bfloat16(),
    "é": torch.randn(1),
    "z": torch.randint(255, (7,), dtype=torch.uint8),
}


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_tensors(file, entries, (tensors[key] for key in in_file_order(entries)), metadata)
    return file.getvalue()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("keys", [["b.10"], ["b.10", "é"], ["b.9", "a"], [*TENSORS], ["z", "a"]])
def test_it_writes_what_the_library_writes(keys: list[str], metadata: dict[str, str] | None) -> None:
    tensors = {key: TENSORS[key] for key in keys}
    assert written(tensors, metadata) == save(tensors, metadata)


def test_pieces_are_put_together_and_must_fit(tmp_path: Path) -> None:
    entries = {"a": (torch.float32, (3, 4))}
    file = io.BytesIO()
    write_tensors(file, entries, TENSORS["b.10"].split(1))
    assert file.getvalue() == written({"a": TENSORS["b.10"]})
    with pytest.raises(ValueError, match="expected 48 bytes of tensors, 32 came"):
        write_tensors(io.BytesIO(), entries, TENSORS["b.10"][:2])


def test_parts_are_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({key: TENSORS[key] for key in ("b.10", "b.9", "z")}))
    file = TensorFile(path)
    assert file.shape("b.10") == (3, 4)
    assert "z" in file
    assert "a" not in file
    assert torch.equal(file.read("b.10", slice(None), slice(1, 3)), TENSORS["b.10"][:, 1:3])
    assert torch.equal(file.read("b.9"), TENSORS["b.9"])
    with pytest.raises(KeyError):
        file.read("a")


@pytest.mark.parametrize("data", [b"", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 40, save({"a": torch.ones(9)})[:-1], save(TENSORS)])
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r".+"):
        TensorFile(path)
