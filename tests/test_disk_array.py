from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cond_pdiff.errors import TrainingError
from cond_pdiff.training.zoo import disk_array
from cond_pdiff.training.zoo.disk_array import DiskArray


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (5,)), (torch.uint8, (3, 2, 2))])
def test_an_array_is_read_as_it_was_written(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (100 * torch.rand(7, *shape)).to(dtype)
    (tmp_path / ".a.safetensors.left").touch()  # by a killed process
    array = DiskArray.write(tmp_path / "a.safetensors", iter(rows), 7)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_file(array.path)["array"], rows)  # an ordinary file
    assert (len(array), array.shape) == (7, rows.shape)
    picks = torch.tensor([6, 0, 0])
    assert torch.equal(array[picks], rows[picks])
    assert torch.equal(array[2], rows[2])
    assert torch.equal(array[picks, torch.tensor([1, 0, 2])], rows[picks, torch.tensor([1, 0, 2])])
    monkeypatch.setattr(disk_array, "NUMBERS_AT_ONCE", 2 * rows[0].numel())
    chunks = list(array.chunks())
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(chunks), rows)
    assert torch.equal(torch.cat(list(array.chunks(picks))), rows[picks])


def test_rows_that_do_not_come_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected 3 rows, 2 came"):
        DiskArray.write(tmp_path / "a.safetensors", iter(torch.zeros(2, 4)), 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40, None])
def test_damage_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = DiskArray.write(tmp_path / "a.safetensors", iter(torch.zeros(2, 4)), 2).path
    path.write_bytes(path.read_bytes()[:-1] if data is None else data)
    with pytest.raises(TrainingError, match=r"is damaged .*delete it to make it again"):
        DiskArray(path)
