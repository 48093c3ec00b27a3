"""Measure what hostile or broken files and connections do to loading: every load must give an error of ours, or be right.

    python benchmarks/hostile.py files [--weights 100000] [--json 10000]  # mutated files of an adapter and of a generator
    python benchmarks/hostile.py moves [--trials 100]                     # the branch moves during the download
    python benchmarks/hostile.py cuts [--trials 200]                      # the connection is cut at a random byte, then it is tried again

The last two run against the loopback Hub of the tests. All print how many loads ended how, the slowest one, and the peak of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.hub import fetch
from cond_pdiff.lora import LoraSpec
from cond_pdiff.peft_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
FIXTURE = TESTS / "fixtures" / "generator-0.1.0"
WEIRD = (b"", b"\x00", b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"x"', b"[[[[[[[[", b"9" * 400, b"\xff\xfe", b'"../../x"', b"true")


def small_adapter(folder: Path) -> Path:
    """Save an adapter of a few kilobytes."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (2, 16), "lora_B": (16, 2)}
    modules = [f"layer.{index}.{name}" for index in range(2) for name in ("query", "value")]
    tensors = {
        f"base_model.model.{module}.{factor}.weight": torch.randn(shape, generator=rng)
        for module in modules
        for factor, shape in shapes.items()
    }
    return LoraAdapter(LoraSpec("a/base", 2, 4.0, ("query", "value")), tensors).save(folder)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change, cut out, double or replace bytes at random places; often near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(min(len(changed), rng.choice((8, 600, 1 << 30))) or 1)
        length = rng.choice((1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length]
        elif kind == 3:
            changed[place : place + length] = rng.choice(WEIRD)
        else:
            del changed[place:]
    return bytes(changed)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Mutate JSON as `mutate` does, or exchange a value somewhere in the tree for another kind."""
    if rng.random() < 0.4:
        return mutate(data, rng)
    tree = json.loads(data)
    node: Any = tree
    while True:
        key = (
            rng.choice(list(node))
            if isinstance(node, dict) and node
            else rng.randrange(len(node))
            if isinstance(node, list) and node
            else None
        )
        if key is None:
            return mutate(data, rng)
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.4:
            node[key] = rng.choice((None, True, -1, 0, 10**30, 1e308, "", "x" * 9999, [], {}, [[]], {"a": {}}, "../..", ["query"] * 500))
            return json.dumps(tree).encode()
        node = node[key]


def outcomes(trials: int, trial: Callable[[int], str]) -> None:
    """Run the trials, count how they end, and print it."""
    counts: Counter[str] = Counter()
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(trials):
        started = time.perf_counter()
        counts[trial(index)] += 1
        slowest = max(slowest, time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{trials} trials: {dict(counts.most_common())}; slowest {slowest:.2f} s; memory +{grown:.0f} MB", flush=True)


def files(weights: int, json_files: int) -> None:
    """Load mutated weights and configurations."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as parent:
        adapter = small_adapter(Path(parent) / "adapter")
        originals = {name: (adapter / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE, METADATA_FILE)}

        def load(folder: Path, name: str, data: bytes, loader: Callable[[Path], Any], original: bytes) -> str:
            (folder / name).write_bytes(data)
            try:
                loader(folder)
            except CondPDiffError:
                return "refused"
            finally:
                (folder / name).write_bytes(original)
            return "loaded"

        print("adapter, weights:")
        original = originals[WEIGHTS_FILE]
        outcomes(weights, lambda index: load(adapter, WEIGHTS_FILE, mutate(original, rng), LoraAdapter.load, original))
        for name in (CONFIG_FILE, METADATA_FILE):
            print(f"adapter, {name}:")
            text = originals[name]
            outcomes(
                json_files // 4, lambda index, name=name, text=text: load(adapter, name, mutate_json(text, rng), LoraAdapter.load, text)
            )  # type: ignore[misc]
        generator = Path(shutil.copytree(FIXTURE, Path(parent) / "generator"))
        for path in sorted(generator.glob("*/*config.json")):
            name, text = path.relative_to(generator).as_posix(), path.read_bytes()
            print(f"generator, {name}:")
            outcomes(
                json_files // 20, lambda index, name=name, text=text: load(generator, name, mutate_json(text, rng), read_generator, text)
            )  # type: ignore[misc]
        name, text = "model_index.json", (generator / "model_index.json").read_bytes()
        print(f"generator, {name}:")
        outcomes(json_files // 20, lambda index: load(generator, name, mutate_json(text, rng), read_generator, text))


def read_generator(folder: Path) -> None:
    """Load a generator from a folder as users do."""
    CondPDiffPipeline.from_pretrained(folder)


def fetched(hub: Any, cache: Path) -> dict[str, str] | None:
    """Fetch the repository, and return name → sha256 of what that leaves, or None where it is refused."""
    try:
        folder = fetch("owner/x", endpoint=hub.endpoint, cache_dir=cache)
    except CondPDiffError:
        return None
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def digest(data: bytes) -> str:
    """Return the sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def contents(mark: bytes) -> dict[str, bytes]:
    """Return a repository of nine files, each different for every mark."""
    rng = random.Random(mark)
    names = [f"part-{index}/{kind}" for index in range(3) for kind in ("config.json", "weights.safetensors", "notes.txt")]
    return {name: mark + rng.randbytes(rng.randrange(10, 60_000)) for name in names}


def moves(trials: int) -> None:
    """Fetch from a branch that moves at a random request."""
    from loopback_hub import LoopbackHub

    rng = random.Random(0)

    def trial(index: int) -> str:
        hub = LoopbackHub()
        versions = [contents(f"{index}/{number}".encode()) for number in range(2)]
        hub.add("owner/x", versions[0])
        left = [rng.randrange(1, 24)]

        def move(line: str) -> None:
            left[0] -= 1
            if left[0] == 0:
                hub.add("owner/x", versions[1])

        hub.before = move
        with hub.running(), tempfile.TemporaryDirectory() as cache:
            found = fetched(hub, Path(cache))
        expected = [{name: digest(data) for name, data in version.items()} for version in versions]
        return "refused" if found is None else "old" if found == expected[0] else "new" if found == expected[1] else "A MIXTURE"

    outcomes(trials, trial)


def cuts(trials: int) -> None:
    """Fetch over a connection that breaks at a random byte of a random file; then again without a break."""
    from loopback_hub import LoopbackHub

    rng = random.Random(0)
    time.sleep = lambda seconds: None  # type: ignore[assignment]  # huggingface_hub waits before it tries again

    def trial(index: int) -> str:
        hub = LoopbackHub()
        files = contents(str(index).encode())
        hub.add("owner/x", files)
        expected = {name: digest(data) for name, data in files.items()}
        victim, share = rng.choice(sorted(files)), rng.random()
        hub.cut = lambda name, data: int(share * len(data)) if name == victim else None
        with hub.running(), tempfile.TemporaryDirectory() as cache:
            first = fetched(hub, Path(cache))
            hub.cut = lambda name, data: None
            second = fetched(hub, Path(cache))
        if first not in (None, expected) or second != expected:
            return "WRONG"
        return "complete at once" if first else "refused, then complete"

    outcomes(trials, trial)


def main() -> None:
    """Run the trials that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    mutated = commands.add_parser("files")
    mutated.add_argument("--weights", type=int, default=100_000)
    mutated.add_argument("--json", type=int, default=10_000)
    for name, trials in (("moves", 100), ("cuts", 200)):
        commands.add_parser(name).add_argument("--trials", type=int, default=trials)
    arguments = parser.parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    disable_progress_bar()
    if arguments.command == "files":
        files(arguments.weights, arguments.json)
    else:
        {"moves": moves, "cuts": cuts}[arguments.command](arguments.trials)


if __name__ == "__main__":
    main()
