from __future__ import annotations

import json
from pathlib import Path

import pytest

from cond_pdiff.atomic import atomic_folder, check_output_folder, dump_json, write_text
from cond_pdiff.errors import OutputExistsError

OWN = ("a.txt", "b.txt")


def contents(folder: Path) -> dict[str, str]:
    """Everything below `folder`, hidden files and empty folders included."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else "/" for path in sorted(folder.rglob("*"))}


def write(target: Path, text: str = "new", overwrite: bool = False) -> None:
    with atomic_folder(target, OWN, overwrite) as aside:
        (aside / "a.txt").write_text(text)


@pytest.mark.parametrize("existing", [None, {}, {"a.txt": "old"}, {"a.txt": "old", "b.txt": "old"}])
def test_a_folder_is_created_or_replaced_as_a_whole(tmp_path: Path, existing: dict[str, str] | None) -> None:
    target = tmp_path / "target"
    if existing is not None:
        target.mkdir()
        for name, text in existing.items():
            (target / name).write_text(text)
    write(target, overwrite=bool(existing))
    assert contents(tmp_path) == {"target": "/", "target/a.txt": "new"}


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    write(tmp_path / "target")
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "target" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_parents_are_made_and_a_relative_target_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("one/two/target"))
    assert (tmp_path / "one/two/target/a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_inside_changes_nothing(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    target = tmp_path / "one" / "two" / "target"
    if existing:
        write(target, "old")
    before = contents(tmp_path)

    def write_half() -> None:
        with atomic_folder(target, OWN, overwrite=True) as aside:
            (aside / "a.txt").write_text("half")
            (aside / "deep").mkdir()
            (aside / "deep" / "b.txt").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "overwrite", "message"),
    [("a.txt", False, "not empty.*a.txt"), ("mine.doc", False, "not empty.*mine.doc"), ("mine.doc", True, "mine.doc.*not ours")],
)
def test_what_may_not_be_replaced_stays(tmp_path: Path, name: str, overwrite: bool, message: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text("old")
    with pytest.raises(OutputExistsError, match=message):
        write(target, overwrite=overwrite)
    with pytest.raises(OutputExistsError, match=message):
        check_output_folder(target, OWN, overwrite)
    assert contents(tmp_path) == {"target": "/", f"target/{name}": "old"}


def test_the_current_folder_stays_and_a_link_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    with pytest.raises(OutputExistsError, match="is the current folder"):
        write(Path())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").is_file()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    with pytest.raises(OutputExistsError, match="is a file"):
        write(tmp_path / "target", overwrite=True)
    assert (tmp_path / "target").read_text() == "old"


@pytest.mark.parametrize(("name", "overwrite"), [("a.txt", False), ("mine.doc", False), ("mine.doc", True)])
def test_what_appears_meanwhile_is_not_destroyed(tmp_path: Path, name: str, overwrite: bool) -> None:
    target = tmp_path / "target"

    def write_while_another_does() -> None:
        with atomic_folder(target, OWN, overwrite) as aside:
            (aside / "a.txt").write_text("new")
            target.mkdir()
            (target / name).write_text("theirs")

    with pytest.raises(OutputExistsError, match=name):
        write_while_another_does()
    assert contents(tmp_path) == {"target": "/", f"target/{name}": "theirs"}


def test_an_own_folder_that_appears_meanwhile_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target, OWN, overwrite=True) as aside:
        (aside / "a.txt").write_text("new")
        write(target, "theirs")
    assert contents(tmp_path) == {"target": "/", "target/a.txt": "new"}


def test_write_text_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    for text in ("one", "zwei Ä 🙂"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert contents(path.parent) == {"file.txt": "zwei Ä 🙂"}


def test_dump_json_is_sorted_and_refuses_nan() -> None:
    text = dump_json({"b": 1, "a": {"d": [1, 2], "c": "é"}})
    assert text == dump_json({"a": {"c": "é", "d": [1, 2]}, "b": 1})
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")
    assert "é" in text
    assert json.loads(text)["a"]["d"] == [1, 2]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            dump_json({"a": value})
