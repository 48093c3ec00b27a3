"""The command that asks a language model under an adapter: `ask`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cond_pdiff.cli.options import AdapterName, AsJson, Base, Labels
from cond_pdiff.cli.output import hide_loading_bars, note, report
from cond_pdiff.defaults import ANSWER_TOKENS
from cond_pdiff.errors import ConditionError
from cond_pdiff.notation import PAIR_SEPARATOR, parse_text

if TYPE_CHECKING:
    from cond_pdiff.conditions.instruction import Instruction
    from cond_pdiff.conditions.texts import Text
    from cond_pdiff.models.causal_backbone import CausalBackbone

commands = typer.Typer()


@commands.command()
def ask(
    adapter: AdapterName,
    text: Annotated[str, typer.Argument(metavar="TEXT", help=f"What to answer; 'A {PAIR_SEPARATOR} B' for a pair.")],
    *,
    description: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to do with it (default: as the adapter records it; '': the text stands alone).")
    ] = None,
    label: Labels = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Stop an answer that is longer.")] = ANSWER_TOKENS,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Ask a language model with an adapter.

    The answer is written as it comes, the likeliest token each time; where the adapter has label names, it is the likeliest one of them.
    """
    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.conditions.instruction import Instruction
    from cond_pdiff.conditions.texts import check_labels, check_text
    from cond_pdiff.hub import Backbone
    from cond_pdiff.sampling import check_count

    check_count("max_tokens", max_tokens, 100_000)
    asked, labels = check_text(parse_text(text), "the text"), check_labels(label) if label else None
    found = LoraAdapter.load(adapter)
    if found.family is None or not found.family.writes:
        raise ConditionError(f"{adapter} is not an adapter for a language model (one for texts? `cond-pdiff classify` tries those)")
    recorded = Instruction.recorded(found.metadata)
    instruction = Instruction(recorded.description if description is None else description, recorded.labels if labels is None else labels)
    hide_loading_bars(of_transformers=True)
    model = found.family.load(Backbone(base) if base else found.base, found.spec)
    with found.attached(model):
        if instruction.labels:
            _choose(model, instruction, asked, int(found.metadata.get("max_length") or model.max_tokens), as_json)
            return
        prompt = model.prompt_tokens(instruction.prompt(asked))
        if as_json:
            report({"text": asked, "answer": "".join(model.stream(prompt, max_tokens))}, "", as_json)
        else:
            for piece in model.stream(prompt, max_tokens):
                print(piece, end="", flush=True)
            print()


def _choose(model: CausalBackbone, instruction: Instruction, asked: Text, limit: int, as_json: bool) -> None:
    """Report the likeliest label of a text, which is cut where it was in training."""
    shares, read = model.shares(instruction, asked, limit)
    if read != asked:
        note(f"the prompt is longer than {limit} tokens; the end of the text is not read")
    best = max(shares, key=lambda name: shares[name])
    report({"text": asked, "answer": best, "probabilities": shares}, f"{best:<24} {shares[best]:>4.0%}", as_json)
