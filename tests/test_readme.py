"""The README's code runs as it stands there, and its commands exist."""

import csv
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from cond_pdiff import cli
from cond_pdiff.cli import main
from cond_pdiff.hub import BUNDLED_FOLDER, MINILM, bundled_generators, find_backbone
from cond_pdiff.training.evaluate.text_table import TextTable

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH_BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in BASH_BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("cond-pdiff ")
]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("painting.jpg")
    return tmp_path


def test_the_named_generators_are_bundled() -> None:
    for name in ("minilm-text-tasks", "pixart-mini-styles"):
        assert f"cond-pdiff/{name}" in README
        assert f"cond-pdiff/{name}" in bundled_generators()
        assert (BUNDLED_FOLDER / name / "README.md").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python_blocks_run_in_order(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(PYTHON_BLOCKS) == 4
    for block in PYTHON_BLOCKS:
        # Where the Hub is out of reach, the base model comes from the package that carries it.
        exec(compile(block.replace(MINILM.repo_id, str(find_backbone(MINILM))), "README.md", "exec"), {})
    predicted, *report = capsys.readouterr().out.splitlines()
    assert predicted == "['negative', 'positive']"
    assert [line.split()[0] for line in report] == ["request", "nearest", "chosen", "gain", "labels"]
    with Image.open("house.png") as house:
        assert house.size == (256, 256)
    for name in ("my-adapter", "refined-adapter"):
        assert {path.name for path in (inside / name).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_table_of_text_tasks_is_the_measured_one() -> None:
    measured = json.loads((Path(__file__).parent.parent / "results" / "text_tasks.json").read_text(encoding="utf-8"))
    lines = TextTable().to_markdown(measured).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| mean over"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    assert len(table) == 6
    card = (BUNDLED_FOLDER / "minilm-text-tasks" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table) in README
    assert "\n".join(table) in card


def test_generate_and_classify_run(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate, classify = (next(command for command in COMMANDS if command[0] == name) for name in ("generate", "classify"))
    assert main(generate) == 0
    assert main(classify) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["negative", "positive"]


def test_a_picture_becomes_a_preview(inside: Path) -> None:
    generate = next(command for command in COMMANDS if "--image" in command)
    preview = next(command for command in COMMANDS if command[0] == "preview")
    assert main(generate) == 0
    assert main(preview) == 0
    assert (inside / "my-style-preview.png").is_file()


def test_from_a_csv_to_labelled_texts_in_five_commands(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BASH_BLOCKS if "reviews.csv" in block)
    install, *commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert (install[:2], len(commands)) == (["pip", "install"], 4)
    things = ("keyboard", "screen", "battery", "charger", "speaker", "cable", "mouse", "printer", "camera", "router")
    said = {
        "positive": ("works perfectly", "is great", "was worth the money", "is fast and quiet", "lasts for ages"),
        "negative": ("broke after a week", "is useless", "was a waste of money", "is slow and loud", "never worked"),
    }
    rows = [(f"The {thing} {what}, {end}", label) for label in said for thing in things for what in said[label] for end in ("again", "too")]
    assert len(rows) == 200
    with Path("reviews.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("Review", "Rating"), *rows])
    Path("new.csv").write_text("review\nit keeps disconnecting\nworth every penny\n")
    for command in commands:
        assert main(command[1:]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "rows       160 train rows, 40 test rows" in out
    assert re.search(r"^40 rows, in % +base model +with the adapter +difference$", out, re.MULTILINE)
    with Path("labelled.csv").open(newline="", encoding="utf-8") as file:
        assert [row["predicted"] for row in csv.DictReader(file)] == ["negative", "positive"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_parses(command: list[str]) -> None:
    name, *arguments = command
    found = cli.command.commands[name]
    if name == "recipe":
        name, *arguments = arguments
        found = found.commands[name]
    assert found.make_context(name, arguments).params


def test_all_commands_are_covered() -> None:
    assert {command[0] for command in COMMANDS} >= {"generate", "classify", "test", "collect", "train", "evaluate", "import-task"}
