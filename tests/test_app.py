"""The demo, over its real HTTP interface, with tiny generators."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from test_ask import bases, collections, section, zoos
from test_ask import generator as language_generator

import cond_pdiff
from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.families.family import family_named
from cond_pdiff.locks import lock_of
from cond_pdiff.page.page import LAUNCH, MAX_WAITING, TABS, build_page
from cond_pdiff.page.report import likeliest
from cond_pdiff.page.tab import Tab
from cond_pdiff.peft_files import WEIGHTS_FILE
from cond_pdiff.publish import VARIABLE

__all__ = ["bases", "collections", "language_generator", "section", "zoos"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def page(style_generator: Path, tiny_generator: Path, language_generator: Path) -> Iterator[gradio.Blocks]:
    """The running page."""
    page = build_page(str(style_generator), str(tiny_generator), str(language_generator))
    page.launch(**LAUNCH, prevent_thread_lock=True, quiet=True)
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


def shown(*paths: Path) -> list[dict[str, Any]]:
    """The value of a field for pictures."""
    return [{"image": handle_file(path)} for path in paths]


def unzip(path: str, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder / "adapter"


def weights_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def test_a_picture_becomes_a_zip_with_the_adapter(client: Client, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    report, made = client.predict(shown(picture), None, 0.5, 7, api_name="/make_style")
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
    *_, made = client.predict(shown(picture), shown(other), 0.25, 0, api_name="/make_style")
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    one, two = (pipe(path, generator=[torch.Generator().manual_seed(0)]).adapter for path in (picture, other))
    mixed, expected = LoraAdapter.load(unzip(made, tmp_path / "zip")), one.interpolate(two, 0.25)
    for key, value in expected.tensors.items():
        torch.testing.assert_close(mixed.tensors[key], value)


def test_several_pictures_are_one_style(client: Client, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    other, broken = tmp_path / "other.png", tmp_path / "broken.png"
    Image.new("RGB", (64, 64), (20, 160, 190)).save(other)
    broken.write_bytes(b"no picture")
    *_, made = client.predict(shown(other, picture), None, 0.5, 3, api_name="/make_style")
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    expected = pipe([picture, other], generator=[torch.Generator().manual_seed(3)]).adapter
    found = LoraAdapter.load(unzip(made, tmp_path / "zip"))
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())
    assert len(found.metadata["condition"]["images"]) == 2
    with pytest.raises(AppError, match=r"style image 2 of 3: 'broken\.png' is not an image"):
        client.predict(shown(other, broken, picture), None, 0.5, 3, api_name="/make_style")
    with pytest.raises(AppError, match=r"style image 1 of 2: 'broken\.png' is not an image"):
        client.predict(shown(other), shown(broken, picture), 0.5, 3, api_name="/make_style")


def test_only_the_library_opens_pictures(client: Client, tmp_path: Path) -> None:
    """What Pillow would read, in a format or a size that is refused by its header, is refused in the library's own words."""
    bitmap, huge = tmp_path / "bitmap.png", tmp_path / "huge.png"
    Image.new("RGB", (64, 64)).save(bitmap, format="BMP")
    Image.new("1", (6000, 6000)).save(huge)
    for path, message in ((bitmap, "expected one of PNG, JPEG, WEBP"), (huge, "36.0 megapixels")):
        with pytest.raises(AppError, match=message):
            client.predict(shown(path), None, 0.5, 0, api_name="/make_style")


def test_styles_are_refined_on_their_pictures(client: Client, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), (20, 160, 190)).save(other)
    report, made = client.predict(shown(picture, other), None, 0.5, 3, 2, api_name="/make_style")
    assert "<dt>refined</dt><dd>2 steps on 2 pictures, from candidate 1 of 1</dd>" in report
    pipe = CondPDiffPipeline.from_pretrained(style_generator)
    expected = pipe([picture, other], generator=[torch.Generator().manual_seed(3)], refine_steps=2, refine_seed=3).adapter
    found = LoraAdapter.load(unzip(made, tmp_path / "zip"))
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())
    report, _ = client.predict(shown(picture), shown(other), 0.5, 3, 1, api_name="/make_style")
    assert report.count("1 steps on 1 picture, ") == 2
    report, _ = client.predict(shown(picture), None, 0.5, 3, 0, api_name="/make_style")
    assert "refined" not in report


def test_a_mixture_tells_both_styles_and_their_shares(client: Client, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), (20, 160, 190)).save(other)
    report, _ = client.predict(shown(picture), shown(other), 0.3, 0, api_name="/make_style")
    assert re.findall("<h4>(.*?)</h4>", report) == ["First style: 70% of the mixture", "Second style: 30% of the mixture"]
    assert report.count("nearest (threshold") == 2
    report, _ = client.predict(shown(picture), None, 0.3, 0, api_name="/make_style")
    assert "<h4>" not in report


def test_pictures_come_one_after_the_other_with_their_prompts(client: Client, picture: Path) -> None:
    client.predict(shown(picture), None, 0.5, 7, api_name="/make_style")
    job = client.submit("a red house\na boat", 1.0, 0, api_name="/preview")
    job.result()
    assert [[entry["caption"] for entry in shown] for shown in job.outputs()] == [["a red house"], ["a red house", "a boat"]]


def test_the_strength_draws_anew_only_what_was_made(page: gradio.Blocks) -> None:
    """As the field changes, by pointer or keyboard: it has no event of its own for the keys."""
    (event,) = [found for found in page.fns.values() if found.name == "again"]
    assert [(type(page.blocks[target]).__name__, kind) for target, kind in event.targets] == [("Slider", "change")]
    assert event.trigger_mode == "always_last"
    nothing, *rest = event.fn(None, "a red house", 0.5, 0)
    assert (nothing, rest) == (gradio.skip(), [])


def test_an_example_that_is_chosen_becomes_the_style_picture(page: gradio.Blocks) -> None:
    (event,) = [found for found in page.fns.values() if found.name == "take"]
    (gallery,) = [page.blocks[target] for target, kind in event.targets if kind == "select"]
    assert [entry["caption"] for entry in gallery.value] == ["embers", "lagoon"]
    assert [taken.size for taken in event.fn(gradio.SelectData(None, {"index": 1, "value": None}))] == [(48, 48)]
    assert [output.label for output in event.outputs] == ["Style pictures"]


def table(answers: str) -> list[list[str]]:
    """The cells of a table of answers."""
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", answers)]


def test_a_description_becomes_an_adapter_that_is_tried(client: Client, tmp_path: Path, tiny_generator: Path) -> None:
    examples = "the good film = positive\nthe awful meal = negative"
    report, answers, made = client.predict("Is the remark kind?", examples, "a lovely room", 0, api_name="/make_task")
    assert "distribution" in report
    assert "<dt>labels</dt><dd>positive, negative (from the prompt)</dd>" in report
    assert "<dt>chosen</dt>" in report
    folder = unzip(made, tmp_path / "zip")
    assert LoraAdapter.load(folder).metadata["labels"] == ["positive", "negative"]
    classifier = PrototypeClassifier.load(folder)
    base, adapted = (likeliest(one.probabilities(["a lovely room"])[0]) for one in (classifier.with_adapter(None), classifier))
    assert table(answers) == [["Text", "Base model", "With the adapter"], ["a lovely room", base, adapted]]
    assert re.fullmatch(r"(positive|negative) \d+%", adapted)


def test_labels_and_pairs_are_given_in_fields_of_their_own(client: Client, tmp_path: Path) -> None:
    arguments = ("Are the two the same?", "a film ||| a movie = same", "a meal ||| a <b>room</b>", 0, "same\n\n different ")
    _, answers, made = client.predict(*arguments, api_name="/make_task")
    metadata = LoraAdapter.load(unzip(made, tmp_path / "zip")).metadata
    assert metadata["labels"] == ["same", "different"]
    assert metadata["condition"]["examples"] == [[["a film", "a movie"], "same"]]
    assert table(answers)[1][0] == "a meal ||| a &lt;b&gt;room&lt;/b&gt;"


def test_text_tasks_are_refined_on_their_examples(client: Client, tmp_path: Path) -> None:
    one = "the good film = positive\nthe awful meal = negative"
    asked = ("Is the remark kind?", one, "a lovely room", 0, "", 4)
    with pytest.raises(AppError, match="two examples of at least one class"):
        client.predict(*asked, api_name="/make_task")
    with pytest.raises(AppError, match="training steps are taken on labelled examples"):
        client.predict("Is the remark kind?", "", "a lovely room", 0, "yes\nno", 4, api_name="/make_task")
    two = f"{one}\na lovely room = positive\na dull book = negative"
    report, answers, made = client.predict("Is the remark kind?", two, "a nice film", 0, "", 4, api_name="/make_task")
    folder = unzip(made, tmp_path / "zip")
    taken = LoraAdapter.load(folder).metadata["refined"]
    done = rf"{taken['steps']} steps"
    assert re.search(rf"<dt>refined</dt><dd>{done} on 4 examples, from candidate \d of 8</dd>", report)
    assert table(answers)[1][2] == likeliest(PrototypeClassifier.load(folder).probabilities(["a nice film"])[0])


def test_labels_may_be_described(client: Client, tmp_path: Path) -> None:
    written = "a = a good film\nb\na = the lovely room"
    _, answers, made = client.predict("Is it a?", "", "a nice film", 0, written, api_name="/make_task")
    folder = unzip(made, tmp_path / "zip")
    metadata = LoraAdapter.load(folder).metadata
    assert metadata["labels"] == ["a", "b"]
    assert metadata["label_descriptions"] == {"a": ["a good film", "the lovely room"]}
    assert table(answers)[1][2] == likeliest(PrototypeClassifier.load(folder).probabilities(["a nice film"])[0])


def test_an_empty_table_says_why(page: gradio.Blocks, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    _, answers, _ = client.predict("Is it kind?", "", "", 0, "yes\nno", api_name="/make_task")
    assert "No text was given to try" in answers
    (event,) = [found for found in page.fns.values() if found.api_name == "make_task"]
    monkeypatch.setattr(event.fn.__self__.pipe, "nearest", lambda embedding: ((), False))  # no request is that foreign to a tiny generator
    _, answers, _ = client.predict("Is it kind?", "", "a lovely room", 0, api_name="/make_task")
    assert "names no labels, and is unlike every trained task" in answers
    assert "<table" not in answers


def test_every_run_begins_with_nothing_and_ends_with_a_download(page: gradio.Blocks) -> None:
    for name, count in (("make_style", 5), ("make_task", 3), ("make_language", 5)):
        (made,) = [event for event in page.fns.values() if event.api_name == name]
        cleared = page.fns[made.trigger_after]
        assert (cleared.queue, [page.blocks[target].value for target, _ in cleared.targets]) == (False, ["Make the adapter"])
        assert len(cleared.outputs) == count
        assert {type(output).__name__ for output in cleared.outputs} >= {"DownloadButton", "HTML"}
        assert list(cleared.fn()) == [gradio.update(value=None, interactive=False), *[None] * (count - 1)]
        download = cleared.outputs[0]
        assert not download.interactive
        (ready,) = [event for event in page.fns.values() if event.trigger_after == made._id and event.outputs == [download]]
        assert ready.trigger_only_on_success
        assert ready.fn() == gradio.update(interactive=True)


def test_cancel_stops_all_that_a_tab_runs(page: gradio.Blocks) -> None:
    running = {event._id for event in page.fns.values() if event.concurrency_id == "model"}
    stops = [event for event in page.fns.values() if event.is_cancel_function]
    pressed = [{page.blocks[target].value for target, _ in event.targets} for event in stops]
    assert {index for event in stops for index in event.cancels} == running
    assert all("Cancel" in buttons for buttons in pressed)
    others = [page.fns[index].name for event, buttons in zip(stops, pressed, strict=True) if len(buttons) > 1 for index in event.cancels]
    assert others == ["again", "ask"]  # a run that begins ends these, which are not its own
    assert len(running) == 8


def test_a_language_model_is_adapted_and_asked(client: Client, tmp_path: Path) -> None:
    report, made = client.predict("Do opposites.", "up = down\nin = out", "", 0, api_name="/make_language")
    assert "none: answers are free" in report
    adapter = LoraAdapter.load(unzip(made, tmp_path / "zip"))
    assert adapter.metadata["condition"]["free"] is True
    job = client.submit("up", api_name="/ask")
    plain, adapted = job.result()
    base = family_named("causal-lm").load(adapter.base, adapter.spec)
    prompt = base.prompt_tokens(Instruction("Do opposites.").prompt("up"))
    assert plain == "".join(base.stream(prompt, 64))
    with adapter.attached(base):
        assert adapted == "".join(base.stream(prompt, 64))
    told = job.outputs()
    assert told[0] == ("", "")
    assert len(told) > 4
    for earlier, later in pairwise(told):
        assert all(after.startswith(before) for before, after in zip(earlier, later, strict=True))


def test_a_language_model_chooses_among_labels(client: Client) -> None:
    report, _ = client.predict("Which side?", "", "left\nright", 0, api_name="/make_language")
    assert "left, right (from the prompt)" in report
    for answer in client.predict("up ||| down", api_name="/ask"):
        assert re.fullmatch(r"(left|right) \d+%", answer)


def test_an_answer_that_is_cancelled_leaves_the_model_free(page: gradio.Blocks, client: Client) -> None:
    client.predict("Do opposites.", "", "", 0, api_name="/make_language")
    (event,) = [found for found in page.fns.values() if found.api_name == "ask"]
    tab = event.fn.__self__
    pipe = tab.pipe
    adapter = pipe("Do opposites.", generator=[torch.Generator().manual_seed(0)]).adapter
    model = pipe.base_model()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    answers = tab.ask(adapter, "up")
    assert [next(answers), bool(next(answers))] == [("", ""), True]
    answers.close()
    deadline = time.monotonic() + 30
    while not lock_of(model.model).acquire(blocking=False):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock_of(model.model).release()
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_tab_without_its_generator_says_what_to_do(style_generator: Path, tiny_generator: Path) -> None:
    page = build_page(str(style_generator), "cond-pdiff/no-such", str(tiny_generator))
    told = [block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown) and "needs a generator" in block.value]
    assert len(told) == 2
    assert "no bundled generator is called 'cond-pdiff/no-such'" in told[0]
    assert "makes text adapters, this tab needs a generator of language adapters" in told[1]
    assert "COND_PDIFF_LANGUAGE_GENERATOR=run/generator python app.py" in told[1]
    assert "cond-pdiff collect --recipe smollm2-tasks" in told[1]
    assert {event.api_name for event in page.fns.values() if event.api_visibility == "public"} == {"make_style", "preview"}
    page.close()


def test_the_file_that_starts_the_page_reads_every_tabs_variable() -> None:
    source = Path(__file__).parents[1].joinpath("app.py").read_text(encoding="utf-8")
    assert all(VARIABLE.format(kind.makes.upper()) in source for kind in TABS)
    assert all(issubclass(kind, Tab) for kind in TABS)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not an image"), (b"GIF89a" + bytes(100), "not an image"), (b"<svg/>", "not an image"), (b"\x89PNG\r\n\x1a\n", "not an image")],
)
def test_what_is_no_picture_gets_a_friendly_answer(client: Client, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(AppError, match=message) as caught:
        client.predict(shown(path), None, 0.5, 0, api_name="/make_style")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        ((None, None, 0.5, 0), "/make_style", "drop a style picture first"),
        (("", "", "", 0), "/make_task", "the task description is empty"),
        (("Is it?", "good", "", 0), "/make_task", "an example is written TEXT=LABEL, got 'good'"),
        (("Is it?", "", "", 0, "only"), "/make_task", "at least two labels"),
        (("Is it?", "good = yes", "", 0, "a\nb"), "/make_task", "which is not among the labels"),
        (("Is it?", "", "", 0, "a\nb\na"), "/make_task", "the label 'a' is given twice"),
        (("Is it?", "", "", 0, "a =\nb"), "/make_task", "the description of the label 'a' is empty"),
        (("Is it?", "", "", 0, "a\nb", 101), "/make_task", "Value 101 is greater than maximum value 100"),
        (("Is it?", "", "a ||| b ||| c", 0), "/make_task", "a pair has two parts"),
        (("", "", "", 0), "/make_language", "the task description is empty"),
        (("up",), "/ask", "make an adapter first"),
        (("", 1.0, 0), "/preview", "at least one prompt"),
    ],
)
def test_what_can_be_mended_is_said(client: Client, arguments: tuple[Any, ...], name: str, message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name=name)


def test_nothing_outside_the_cache_is_served(address: str, client: Client) -> None:
    for path in (Path(cond_pdiff.__file__), Path(__file__).parents[1] / "pyproject.toml", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert caught.value.code in (403, 404)
    with pytest.raises((AppError, ValueError)):
        client.predict([{"image": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}], None, 0.5, 0, api_name="/make_style")


def test_every_client_gets_its_own_adapter(address: str, picture: Path, style_generator: Path, tmp_path: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(style_generator)

    def ask(seed: int) -> str:
        one = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / f"downloads-{seed}")
        *_, made = one.predict(shown(picture), None, 0.5, seed, api_name="/make_style")
        return weights_sha256(unzip(made, tmp_path / str(seed)))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    for seed, sha256 in enumerate(found):
        alone = pipe(picture, generator=[torch.Generator().manual_seed(seed)]).save_adapter(tmp_path / f"alone-{seed}")
        assert weights_sha256(alone) == sha256


def test_queue_and_uploads_are_bounded_and_names_are_stable(page: gradio.Blocks, address: str) -> None:
    assert page._queue.max_size == MAX_WAITING
    with urllib.request.urlopen(f"{address}gradio_api/info") as answer:
        assert set(json.load(answer)["named_endpoints"]) == {"/make_style", "/preview", "/make_task", "/make_language", "/ask"}
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    assert config["max_file_size"] == 10 * 2**20  # in gradio's megabytes; the library itself takes no more than 10,000,000 bytes
