"""Commands for an adapter that is there already: `verify`, `convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from cond_pdiff.cli.options import AdapterName, AsJson, Base, Force
from cond_pdiff.cli.output import hide_loading_bars, report
from cond_pdiff.errors import CondPDiffError

commands = typer.Typer()


@commands.command()
def verify(
    adapter: AdapterName,
    *,
    generator: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where its generator is now (default: by its recorded name and commit).")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="The style image that it was made from; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a generated adapter again and compare.

    It is made from what it records. The same bytes, or but for rounding: exit status 0; anything else: 1.
    """
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.verify import verify

    hide_loading_bars()
    result = verify(LoraAdapter.load(adapter), generator, image)
    if not result.only_rounding and not as_json:
        raise CondPDiffError(str(result))
    report({**asdict(result), "only_rounding": result.only_rounding}, result, as_json)
    if not result.only_rounding:
        raise typer.Exit(1)


@commands.command()
def convert(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A peft folder or Hub repository, or a file of diffusers, kohya or ComfyUI.")
    ],
    *,
    to: Annotated[
        Literal["diffusers", "kohya", "comfyui", "peft", "merged"],
        typer.Option(
            metavar="diffusers|kohya|comfyui|peft|merged", help="A tool's LoRA file, a peft folder, or a folder with base weights W + ΔW."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="File or folder to write.")],
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of a merged adapter.")] = 1.0,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the form of another tool.

    The file is read back, and compared, before it is written.
    """
    from cond_pdiff.convert import save_merged, save_peft
    from cond_pdiff.formats.lora_file import read_adapter
    from cond_pdiff.formats.lora_writer import save_lora_file
    from cond_pdiff.hub import Backbone

    loaded = read_adapter(adapter, base_model=base)
    if to == "merged":
        written, what = save_merged(loaded, out, Backbone(base) if base else None, scale, force), "model"
    elif to == "peft":
        written, what = save_peft(loaded, out, force), "adapter"
    else:
        written, what = save_lora_file(loaded, out, to, force), "LoRA file"
    report({"to": to, "written": str(written)}, f"{what:<10} {written}", as_json)
