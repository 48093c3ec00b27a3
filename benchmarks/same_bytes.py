"""Make the same seed's adapter in many fresh processes with random PYTHONHASHSEED: how many different ones come out? (One.)

python benchmarks/same_bytes.py [--processes 20]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [
    "generate",
    "Classify a news item by its topic.",
    "--example",
    "shares fell=business",
    "--example",
    "a late goal=sports",
    "--seed",
    "7",
]


def folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=20)
    found = set()
    processes = parser.parse_args().processes
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "adapter"
            environment = {**os.environ, "PYTHONHASHSEED": str(random.randrange(2**32))}
            program = str(Path(sys.executable).with_name("cond-pdiff"))
            subprocess.run([program, *COMMAND, "--out", str(out)], check=True, capture_output=True, env=environment)
            found.add(folder_sha256(out))
    print(f"{processes} processes, {len(found)} different adapter folders: {sorted(found)}")
    sys.exit(len(found) != 1)
