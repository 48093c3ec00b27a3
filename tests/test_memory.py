"""What goes over a whole zoo needs no more memory for more adapters. Measured in processes of their own: a peak is never forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def peak():  # of this program alone: getrusage's begins with that of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def told(before):
    print(json.dumps(round(peak() - before)))
"""

STAGES = START + """
from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.training.config import AutoencoderConfig, FitConfig
from cond_pdiff.training.precision import on_training_device
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.zoo.params import ZooParams

rank, width, count = 32, 1024, 300
rng = torch.Generator().manual_seed(0)

def adapter():
    shapes = {"A": (rank, width), "B": (width, rank)}
    tensors = {f"{KEY_PREFIX}q.lora_{factor}.weight": torch.randn(shape, generator=rng) for factor, shape in shapes.items()}
    return LoraAdapter(LoraSpec("nobody/base", rank, 8.0, ("q",)), tensors)

template = AdapterTemplate.from_adapters([adapter(), adapter()], Backbone("nobody/base"), 16)
model = {"encoder_channels": [4, 4, 4], "decoder_channels": [4, 64, 4], "stride": 4, "kernel_size": 5, "latent_dim": None}
config = AutoencoderConfig(model, FitConfig(steps=1, batch_size=40, warmup_steps=0))
chunk = 64  # adapters that are read at once
small = ZooParams.write(
    folder / "small", template, (template.to_params(adapter()) for _ in range(chunk)), [0] * chunk, ["a"] * chunk, "{}"
)
for data in (small, None):
    if data is None:
        before = peak()
        params = (template.to_params(adapter()) for _ in range(count))
        data = ZooParams.write(folder / "params", template, params, [0] * count, ["a"] * count, "{}")
    stage = AutoencoderStage(data, config)
    fit(stage, config.fit, folder / f"run-{len(data)}")
    with on_training_device(stage.module):
        assert 0 < stage.codec.reconstruction_error(data.chunks()) < 2
        assert len(stage.codec.fit_scaling_factor(stage.codec.encode(data.chunks()))) == len(data)
told(before)
"""

SAVING = START + """
from cond_pdiff import AdapterCodec, AdapterTemplate, LoraSpec, ModuleBasis, ParamLayout, ParamNormalizer
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import KEY_PREFIX

modules, rank, width = 20, 128, 4096  # 21 million numbers: 84 MB
factors = {"A": (rank, width), "B": (width, rank)}
layout = ParamLayout({f"{KEY_PREFIX}{n:02d}.q.lora_{f}.weight": shape for n in range(modules) for f, shape in factors.items()})
spans = [(span.start, span.stop) for span in layout.module_spans()]
basis = ModuleBasis(spans, 2).eval()
entries = {"mean": (torch.float32, (layout.num_params,))} | {
    f"directions.{index:05d}": (torch.float16, (2, stop - start)) for index, (start, stop) in enumerate(spans)
}
pieces = [torch.zeros(stop - start) for start, stop in spans] + [torch.ones(2, stop - start).half() for start, stop in spans]
basis.write_file(folder / "modules.safetensors", entries, pieces)
del pieces
template = AdapterTemplate(layout.to_json(), LoraSpec("nobody/base", rank, 8.0, ("q",)).to_json(), Backbone("nobody/base").to_json())
normalizer = ParamNormalizer("none", layout.sizes)
normalizer.fitted.fill_(1)
codec = AdapterCodec(template, normalizer, basis)
adapter = template.adapter_of(codec.decode_tensors(torch.randn(1, *codec.latent_shape))[0])
from cond_pdiff.adapter_card import adapter_card
adapter_card(adapter, None)  # imports much
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: that of writing the file is not what is measured
before = peak()
adapter.save(folder / "adapter")
assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 80e6
told(before)
"""

INDEX = START + """
from cond_pdiff.models.condition_index import ConditionIndex

tasks, prompts, dim = 1500, 48, 64
index = ConditionIndex({f"task {number}": {"group": f"group {number % 7}"} for number in range(tasks)}, dim)
own = torch.nn.functional.normalize(torch.randn(tasks, prompts, dim, generator=torch.Generator().manual_seed(0)), dim=2)
before = peak()
index.fit(own)
assert 0 < float(index.threshold) < 1
told(before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("script", "most"),
    [
        (STAGES, 30),  # megabytes; the larger zoo has 62 more, and a single one of its feature maps 1,260
        (INDEX, 60),  # similarities of all prompts to all tasks take 432
        (SAVING, 20),  # the adapter has 84
    ],
    ids=["stages", "index", "saving"],
)
def test_memory_does_not_grow_with_the_zoo_or_the_adapter(script: str, most: int, tmp_path: Path) -> None:
    # Large tensors go back to the system when they are freed: what is left of others would come and go with chance.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) < most
