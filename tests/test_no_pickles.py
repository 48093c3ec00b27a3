"""Nothing that the package does unpickles: an audit hook in a process of its own watches the whole way from training to loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WATCH = """
import json, sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(str(arguments)) if event == "pickle.find_class" else None)
import torch
from cond_pdiff import CondPDiffPipeline, LoraAdapter
from cond_pdiff.training.stages.train import train

recipe, zoo, tasks, run, adapter = json.loads(sys.argv[1])
seen.clear()  # what importing packages does is theirs
for _ in range(2):  # train, and resume what is finished
    generator = train(recipe, zoo, tasks, run)
pipe = CondPDiffPipeline.from_pretrained(generator)
pipe("Is the film good?", num_adapters=2).save_adapter(adapter)
LoraAdapter.load(adapter)
pipe.save_pretrained(run + "/again")
CondPDiffPipeline.from_pretrained(run + "/again")
import pickle
pickle.loads(pickle.dumps(LoraAdapter))
print("SEEN", json.dumps(seen))
"""


def test_training_resuming_loading_generating_and_saving_unpickle_nothing(
    recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path
) -> None:
    arguments = json.dumps([recipe, str(tiny_zoo), str(tasks_folder), str(tmp_path / "run"), str(tmp_path / "adapter")])
    done = subprocess.run([sys.executable, "-c", WATCH, arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    seen = json.loads(line.removeprefix("SEEN "))
    assert len(seen) == 1  # the one at the end, by which the hook shows that it works
    assert "LoraAdapter" in seen[0]
