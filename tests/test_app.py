"""The demo, over its real HTTP interface, with a tiny style generator."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from cond_pdiff import CondPDiffPipeline, LoraAdapter
from cond_pdiff.peft_files import WEIGHTS_FILE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import app

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def page(style_generator: Path, tiny_generator: Path) -> Iterator[gradio.Blocks]:
    """The running app."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "STYLES", str(style_generator))
        patch.setattr(app, "TASKS", str(tiny_generator))
        page = app.build()
        page.launch(css=app.CSS, max_file_size=app.MAX_UPLOAD, prevent_thread_lock=True, quiet=True)
        yield page
        page.close()
    with warnings.catch_warnings():  # gradio leaves the sockets of its event loops to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def address(page: gradio.Blocks) -> str:
    return str(page.local_url)


@pytest.fixture
def client(address: str, tmp_path: Path) -> Iterator[Client]:
    client = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / "downloads")
    yield client
    client.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (90, 60), (230, 60, 30)).save(path)
    return path


def unzip(path: str, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder / "adapter"


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def test_a_picture_becomes_a_zip_with_the_adapter(client: Client, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    report, made = client.predict(handle_file(picture), None, 0.5, 7, api_name="/make_style")
    assert "distribution" in report
    assert report.count("data:image/png") == 2
    assert all(name in report for name in ("embers", "lagoon"))
    folder = unzip(made, tmp_path / "zip")
    expected = CondPDiffPipeline.from_pretrained(style_generator)(picture, generator=[torch.Generator().manual_seed(7)]).adapter
    found = LoraAdapter.load(folder)
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())
    assert f"# A LoRA adapter for {Path(found.spec.base_model).name}\n" in (folder / "README.md").read_text(encoding="utf-8")
    pictures = client.predict("a red house\n\n a boat \nc\nd\ne", 1.0, 0, api_name="/preview")
    assert [entry["caption"] for entry in pictures] == ["a red house", "a boat", "c", "d"]


def test_two_pictures_are_mixed(client: Client, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), (20, 160, 190)).save(other)
    *_, made = client.predict(handle_file(picture), handle_file(other), 0.25, 0, api_name="/make_style")
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    one, two = (pipe(path, generator=[torch.Generator().manual_seed(0)]).adapter for path in (picture, other))
    mixed, expected = LoraAdapter.load(unzip(made, tmp_path / "zip")), one.interpolate(two, 0.25)
    for key, value in expected.tensors.items():
        torch.testing.assert_close(mixed.tensors[key], value)


def test_a_description_becomes_an_adapter_that_is_tried(client: Client, tmp_path: Path) -> None:
    examples = "the good film = positive\nthe awful meal = negative"
    report, table, made = client.predict("Is the remark kind?", examples, "a lovely room", 0, api_name="/make_task")
    assert "distribution" in report
    assert [row[0] for row in table["data"]] == ["a lovely room"]
    assert {cell for row in table["data"] for cell in row[1:]} <= {"positive", "negative"}
    assert LoraAdapter.load(unzip(made, tmp_path / "zip")).metadata["labels"] == ["positive", "negative"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not an image"), (b"GIF89a" + bytes(100), "not an image"), (b"<svg/>", "not an image"), (b"\x89PNG\r\n\x1a\n", "not an image")],
)
def test_what_is_no_picture_gets_a_friendly_answer(client: Client, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(AppError, match=message) as caught:
        client.predict(handle_file(path), None, 0.5, 0, api_name="/make_style")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        ((None, None, 0.5, 0), "/make_style", "Drop a style picture first"),
        (("", "", "", 0), "/make_task", "the task description is empty"),
        (("Is it?", "good", "", 0), "/make_task", "an example is written TEXT=LABEL, got 'good'"),
        (("", 1.0, 0), "/preview", "at least one prompt"),
    ],
)
def test_what_can_be_mended_is_said(client: Client, arguments: tuple[Any, ...], name: str, message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name=name)


def test_nothing_outside_the_cache_is_served(address: str, client: Client) -> None:
    for path in (Path(app.__file__), Path(app.__file__).with_name("pyproject.toml"), Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert caught.value.code in (403, 404)
    with pytest.raises((AppError, ValueError)):
        client.predict({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None, 0.5, 0, api_name="/make_style")


def test_every_client_gets_its_own_adapter(address: str, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(style_generator)

    def ask(seed: int) -> str:
        one = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / f"downloads-{seed}")
        *_, made = one.predict(handle_file(picture), None, 0.5, seed, api_name="/make_style")
        return weights_sha256(unzip(made, tmp_path / str(seed)))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    for seed, sha256 in enumerate(found):
        alone = pipe(picture, generator=[torch.Generator().manual_seed(seed)]).save_adapter(tmp_path / f"alone-{seed}")
        assert weights_sha256(alone) == sha256


def test_queue_and_uploads_are_bounded_and_names_are_stable(page: gradio.Blocks, address: str) -> None:
    assert page._queue.max_size == app.MAX_WAITING
    with urllib.request.urlopen(f"{address}gradio_api/info") as answer:
        assert set(json.load(answer)["named_endpoints"]) == {"/make_style", "/preview", "/make_task"}
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    assert config["max_file_size"] == 10 * 2**20  # in gradio's megabytes; the library itself takes no more than 10,000,000 bytes
