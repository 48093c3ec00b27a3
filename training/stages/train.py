"""`train`: both stages, one after the other, then the generator. Run the same command again to go on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import atomic_folder
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.publish import CARD_FILES, add_card
from cond_pdiff.training.config import AutoencoderConfig, UNetConfig, parse
from cond_pdiff.training.processes import processes
from cond_pdiff.training.stages.codec_stages import codec_stage
from cond_pdiff.training.stages.condition_bank import BANK_FILE, ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo


def train(
    recipe: dict[str, Any], zoo_folder: str | Path, tasks_folder: str | Path | None, run_folder: str | Path, tensorboard: bool = False
) -> Path:
    """Train a generator on a zoo.

    Args:
        recipe: its `autoencoder` and `unet` sections (see `AutoencoderConfig`, `UNetConfig`).
        zoo_folder: made by `collect`, or by `import-adapters`.
        tasks_folder: the task collection that the zoo was collected on; prompts are drawn from its training rows. None for an imported
            zoo, which holds its conditions.
        run_folder: gets `params/` (the zoo as one matrix; made again if it is deleted), `autoencoder/` and `unet/` (checkpoints,
            metrics.jsonl) and `generator/`. Several processes share it.
        tensorboard: also write tensorboard events.

    Raises:
        TaskDataError: the zoo is not complete, or a task is missing.
        TrainingError: `run_folder` holds a run with other settings, data, prompts or number of processes.

    Returns:
        The generator's folder. Autoencoder, U-Net and condition encoder are stored in half precision (and loaded in float32 by default).
    """
    run_folder = Path(run_folder)
    zoo = Zoo(zoo_folder)
    autoencoder_config = parse(AutoencoderConfig, recipe.get("autoencoder", {}), "autoencoder")
    unet_config = parse(UNetConfig, recipe.get("unet", {}), "unet")
    tasks = zoo.load_tasks(tasks_folder, zoo.task_names)

    with processes().main_process_first():  # which writes the matrix that the others read
        data = ZooParams.load(zoo, run_folder / "params")
    bank = ConditionBank.build(tasks, unet_config, run_folder)  # first of all: conditions that do not fit are told before hours pass
    autoencoder = codec_stage(data, autoencoder_config)
    autoencoder.train(run_folder / "autoencoder", tensorboard)
    processes().print(f"autoencoder: loses {autoencoder.lost():.1%} of the zoo's energy", file=sys.stderr)
    denoiser = DenoiserStage(autoencoder.codec, data, bank, unet_config, autoencoder.identity, autoencoder.latents())
    fit(denoiser, unet_config.fit, run_folder / denoiser.name, tensorboard)
    if processes().is_main_process:
        save_generator(denoiser.pipeline(), run_folder / "generator")
        (run_folder / BANK_FILE).unlink(missing_ok=True)
    processes().wait_for_everyone()
    return run_folder / "generator"


def save_generator(pipe: CondPDiffPipeline, folder: Path) -> None:
    """Save a generator, complete or not at all, replacing the one of an earlier run of the same command; its card stays.

    Of a generator that was loaded and then trained, the old card, pictures and results do not come along.
    """
    pipe._card_folder = None
    for name in ("autoencoder", "unet", "condition_encoder"):
        pipe.components[name].half()
    own = ("model_index.json", *pipe.components, *CARD_FILES)
    with atomic_folder(folder, own, overwrite=True) as aside:
        pipe.save_pretrained(aside)
        add_card(aside, folder, folder.name)
