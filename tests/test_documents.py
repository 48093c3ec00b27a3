"""README and pages: every command can be given, every Python block compiles, and what is shown of a run is what comes out of it."""

from __future__ import annotations

import ast
import csv
import importlib
import io
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from documents import DOCS, PAGES, ROOT, Block, blocks, own_arguments, text_of
from PIL import Image

from cond_pdiff import cli
from cond_pdiff.cli import main
from cond_pdiff.cli.document import commands_document
from cond_pdiff.hub import BUNDLED_FOLDER, MINILM, bundled_generators, find_backbone

ALL = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "bash", "text", "json", "yaml"}
RUN = (
    "README.md", "docs/quick_start.md", "docs/your_csv.md", "docs/style_adapters.md", "docs/your_loras.md", "docs/hub.md",
    "docs/comfyui.md", "docs/concepts/codec.md", "docs/concepts/denoiser.md", "docs/concepts/distribution.md",
)  # fmt: skip
"""The pages whose blocks are run in order, as one would paste them, but for those that a comment above them excuses."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")
UNTOUCHED = {"make test", "make lint", "make docs", "source .venv/bin/activate", "python app.py"}
"""Lines of such pages that a test of these pages does not run: they install, test or serve."""


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages call the reader's own."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("painting.jpg")
    Image.linear_gradient("L").convert("RGB").save("charcoal.jpg")
    things = ("keyboard", "screen", "battery", "charger", "speaker", "cable", "mouse", "printer", "camera", "router")
    said = {
        "positive": ("works perfectly", "is great", "was worth the money", "is fast and quiet", "lasts for ages"),
        "negative": ("broke after a week", "is useless", "was a waste of money", "is slow and loud", "never worked"),
    }
    rows = [(f"The {thing} {what}, {end}", label) for label in said for thing in things for what in said[label] for end in ("again", "too")]
    with Path("reviews.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("Review", "Rating"), *rows])
    Path("new.csv").write_text("review\nit keeps disconnecting\nworth every penny\n")
    return tmp_path


def demo_of_the_makefile() -> list[str]:
    """Return the arguments of `cond-pdiff` in the target `demo`."""
    (line,) = re.findall(r"^demo:.*\n\t\$\(BIN\)/cond-pdiff (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line)


def run_line(line: str) -> None:
    """Run a line of a shell, as far as it is of this package; whatever else it is must be known."""
    if line == "make demo":
        assert main(demo_of_the_makefile()) == 0
    elif line.startswith("cond-pdiff "):
        (arguments,) = own_arguments(line)
        assert main(arguments) == 0
    else:
        known = line in UNTOUCHED or re.match(r"pip install -e '\.\[\w+\]'", line)
        assert known, f"a test runs this page, and does not know what this is: {line}"


def run_page(page: str) -> str:
    """Run a page's blocks in order, compare what is shown with what comes out, and return all that came out."""
    scope: dict[str, object] = {}
    everything, out = [], ""
    for block in blocks(page):
        if block.reason:
            continue
        if block.language == "text" and out:
            assert ends_with(out, block.text), f"{block} shows what does not come out: {out}"
            out = ""
        if block.language not in ("python", "bash"):
            continue
        caught = io.StringIO()
        with redirect_stdout(caught):
            if block.language == "python":
                # Where the Hub is out of reach, the base model comes from the package that carries it.
                exec(compile(block.text.replace(MINILM.repo_id, str(find_backbone(MINILM))), str(block), "exec"), scope)
            else:
                for line in block.commands():
                    run_line(line)
        out = caught.getvalue()
        everything.append(out)
    return "".join(everything)


def ends_with(out: str, shown: str) -> bool:
    """Say whether these lines came out, as all of it or the last; numbers may differ as they do on another processor."""
    came, wanted = out.splitlines(), shown.splitlines()
    return len(came) >= len(wanted) and all(map(alike, came[-len(wanted) :], wanted))


def alike(first: str, second: str) -> bool:
    numbers = [[float(number) for number in NUMBER.findall(line)] for line in (first, second)]
    words = [" ".join(NUMBER.sub("0", line).split()) for line in (first, second)]
    return words[0] == words[1] and all(abs(one - other) <= (2 if one == int(one) else 0.02) for one, other in zip(*numbers, strict=True))


# --- all pages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_says_its_language(block: Block) -> None:
    assert block.language in LANGUAGES


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "python"], ids=str)
def test_python_compiles_and_its_imports_are_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cond_pdiff":
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def check_line(line: str) -> None:
    """Refuse a line of a shell block that could not be given as it stands."""
    for name, *arguments in own_arguments(line):
        group, found = cli.command.commands, name
        if name == "recipe":
            group, (found, *arguments) = group[name].commands, arguments
        assert group[found].make_context(found, arguments).params
    first, *words = line.split()
    if first == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for extras in re.findall(r"pip install (?:-e )?'(?:\.|cond-pdiff)\[([\w,]+)\]'", line):
        with (ROOT / "pyproject.toml").open("rb") as file:
            assert set(extras.split(",")) <= set(tomllib.load(file)["project"]["optional-dependencies"])
    if first == "python" and words[0].endswith(".py"):
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "bash"], ids=str)
def test_every_command_can_be_given(block: Block) -> None:
    for line in block.commands():
        check_line(line)


@pytest.mark.parametrize(
    "line",
    ["cond-pdiff generate x --outt y", "cond-pdiff nothing", "make nothing", "pip install -e '.[nothing]'", "python benchmarks/nothing.py",
     "python benchmarks/style_part.py --nothing x", "srun cond-pdiff collect --tasks t"],
)  # fmt: skip
def test_what_could_not_be_given_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r".*"):
        check_line(line)


def test_each_page_says_for_whom_it_is() -> None:
    for page in PAGES:
        lines = text_of(page).splitlines()
        if page != "CONTRIBUTING.md":
            assert lines[0].startswith("# "), page
            assert lines[2].startswith("For "), page


def test_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 900


def test_the_page_of_commands_is_what_they_say() -> None:
    assert (DOCS / "command_line.md").read_text(encoding="utf-8") == commands_document() + "\n"


def test_the_named_generators_are_bundled() -> None:
    for name, page in (("minilm-text-tasks", "README.md"), ("pixart-mini-styles", "docs/style_adapters.md")):
        assert f"cond-pdiff/{name}" in text_of(page)
        assert f"cond-pdiff/{name}" in bundled_generators()
        assert (BUNDLED_FOLDER / name / "README.md").is_file()


# --- pages that are run ------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_enough_is_run() -> None:
    ran = [block for page in RUN for block in blocks(page) if block.language in ("python", "bash") and not block.reason]
    assert len(ran) >= 25
    assert {own[0] for block in ran for line in block.commands() for own in own_arguments(line)} >= {
        "generate", "classify", "test", "import-task", "preview", "verify", "convert", "push", "list", "info",
    }  # fmt: skip
    told = {own[0] for block in ALL if block.language == "bash" for line in block.commands() for own in own_arguments(line)}
    assert told >= {"collect", "train", "evaluate", "tune", "recipe", "import-adapters", "make-styles", "push-space", "reproduce"}


def test_readme_runs(inside: Path) -> None:
    run_page("README.md")
    assert (inside / "tweets-adapter" / "adapter_config.json").is_file()


def test_the_quick_start_runs(inside: Path) -> None:
    run_page("docs/quick_start.md")
    for name in ("my-adapter", "refined-adapter"):
        assert {path.name for path in (inside / name).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_from_a_csv_to_labelled_texts(inside: Path) -> None:
    out = run_page("docs/your_csv.md")
    assert "rows       160 train rows, 40 test rows" in out
    assert re.search(r"^40 rows, in % +base model +with the adapter +difference$", out, re.MULTILINE)
    with Path("labelled.csv").open(newline="", encoding="utf-8") as file:
        assert [row["predicted"] for row in csv.DictReader(file)] == ["negative", "positive"]


def test_a_picture_becomes_a_style(inside: Path) -> None:
    run_page("docs/style_adapters.md")
    with Image.open("house.png") as house:
        assert house.size == (256, 256)
    assert (inside / "my-style-preview.png").is_file()
    assert (inside / "way.png").is_file()


@pytest.mark.parametrize("page", RUN[4:])
def test_a_page_runs(inside: Path, page: str) -> None:
    run_page(page)


def test_what_is_shown_is_compared(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shown in ("4 of 20", "10 of 21 tasks", "9 of 20 tasks, 0.95"):
        code = "print('so it is')\nprint('9 of 20 tasks, 0.91')"
        page = [Block("page", 1, "python", code, ""), Block("page", 4, "text", f"{shown}\n", "")]
        monkeypatch.setitem(globals(), "blocks", lambda _, page=page: page)
        with pytest.raises(AssertionError, match="page:4 shows what does not come out: so it is"):
            run_page("page")
    monkeypatch.setitem(globals(), "blocks", lambda page: [Block("page", 1, "bash", "rm -rf everything\n", "")])
    with pytest.raises(AssertionError, match="does not know what this is: rm -rf everything"):
        run_page("page")
