"""Commands that try an adapter on texts: `classify`, `test`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cond_pdiff.cli.options import AdapterName, AsJson, Base, Force, LabelColumn, Labels, TextColumns
from cond_pdiff.cli.output import note, report, table
from cond_pdiff.cli.texts import read_labelled
from cond_pdiff.errors import ConditionError, OutputExistsError
from cond_pdiff.notation import PAIR_SEPARATOR, parse_text

if TYPE_CHECKING:
    from cond_pdiff.classifier import PrototypeClassifier
    from cond_pdiff.conditions.texts import Text
    from cond_pdiff.scores import Comparison, Estimate
    from cond_pdiff.tables import Table

commands = typer.Typer()

ANSWER_COLUMNS = ("predicted", "probability")
"""The columns that are added to a table of texts."""
SHOWN_LABELS = 12
"""The most labels of a confusion matrix that is printed."""


@commands.command()
def classify(
    adapter: AdapterName,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help=f"Texts; 'A {PAIR_SEPARATOR} B' for pairs; after --, they may begin with a dash."),
    ] = None,
    *,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="CSV, TSV or JSON Lines with texts; - reads them from stdin.")] = None,
    text_column: TextColumns = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="CSV to write: the file's columns, label and probability.")] = None,
    label: Labels = None,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Classify texts with an adapter."""
    if bool(text) == (file is not None):
        raise ConditionError("give texts, or --file FILE with texts, one of the two")
    if out is not None:
        _check_out(out, file, force)

    from cond_pdiff.conditions.texts import check_text

    texts: list[Text | None]
    if file is None:
        texts, given = [parse_text(one) for one in text or ()], None
    else:
        given, texts = _read(file, text_column or [], ANSWER_COLUMNS if out else ())
    texts = [one if one is None else check_text(one, f"text {index}") for index, one in enumerate(texts, 1)]
    facts = _classified(_load(adapter, label, base), texts)
    for fact, one in zip(facts, text or (), strict=not file):
        fact["text"] = one
    if out is not None and given is not None:
        _write(out, given, facts)
        counts = Counter(fact["label"] for fact in facts if fact["label"] is not None)
        lines = [f"{count:>7}  {name}" for name, count in counts.most_common()] + [f"written    {out}"]
    else:
        lines = [
            f"{fact['label']:<24} {fact['probabilities'][fact['label']]:>4.0%}  {_shown(fact['text'])[:100]}"
            for fact in facts if fact["label"] is not None
        ]  # fmt: skip
    report(facts, "\n".join(lines), as_json)


@commands.command("test")
def try_adapter(
    adapter: AdapterName,
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="CSV, TSV or JSON Lines with texts and labels, or a task folder.")],
    *,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    label: Labels = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Test an adapter on labelled texts.

    Its base model stands beside it, on the same texts: of a task folder, the test split. The adapter's own examples are left out.
    """
    labelled = read_labelled(texts, "test", text_column or (), label_column)

    from cond_pdiff.scores import INTERVALS, compare

    classifier = _load(adapter, label, base)
    own = _own_examples(classifier)
    rows = [row for row in labelled.rows if row[0] not in own]
    if len(rows) < len(labelled.rows):
        note(f"{len(labelled.rows) - len(rows)} of {len(labelled.rows)} rows left out, which are examples that the adapter was made from")
    result = compare(classifier, rows)
    if unseen := [name for name, row in zip(result.labels, result.adapter.confusion, strict=True) if not sum(row)]:
        note(f"no row has the label {', '.join(map(repr, unseen))}")
    report(result.to_json(), f"{_told(result)}\nintervals  {INTERVALS}", as_json)


def _load(adapter: str, labels: list[str] | None, base: str | None) -> PrototypeClassifier:
    from cond_pdiff.classifier import PrototypeClassifier

    return PrototypeClassifier.load(adapter, labels or None, base)


# --- classify ----------------------------------------------------------------------------------------------------------------


def _check_out(out: Path, file: Path | None, force: bool) -> None:
    """Refuse a place to write to before anything is read."""
    if file is None:
        raise ConditionError("--out writes the answers beside the rows of --file; give one")
    if out.suffix.lower() != ".csv":
        raise ConditionError(f"answers are written as CSV; name a file that ends in .csv, got {out} (or use --json)")
    if out.exists() and not force:
        raise OutputExistsError(f"{out} is already there; choose another name, or --force to replace it")


def _read(file: Path, text_columns: list[str], added: tuple[str, ...]) -> tuple[Table, list[Text | None]]:
    """Read a table and its texts, one a row, and note what was taken for granted."""
    from cond_pdiff.tables import read_table, text_rows

    given = read_table(file)
    if taken := [column for column in added if column in given.columns]:
        raise ConditionError(f"{given.source} has a column {taken[0]!r} already, which --out adds; rename it")
    rows = text_rows(given, text_columns, labelled=False)
    for told in rows.notes:
        note(told)
    return given, list(rows.texts)


def _classified(classifier: PrototypeClassifier, texts: list[Text | None]) -> list[dict[str, Any]]:
    """Return text, likeliest label and probabilities of each; without a text there is no label."""
    known = [text for text in texts if text is not None]
    limit = classifier.max_length
    if cut := sum(classifier.backbone.count_tokens(one) > limit for one in known):
        note(f"{cut} of {len(known)} texts longer than {limit} tokens; the rest of them is not read")
    rows = iter(classifier.probabilities(known))
    facts = []
    for text in texts:
        probabilities = next(rows) if text is not None else {}
        best = max(probabilities, key=lambda name: probabilities[name]) if probabilities else None
        facts.append({"text": text, "label": best, "probabilities": probabilities})
    return facts


def _shown(text: Text) -> str:
    return text if isinstance(text, str) else f" {PAIR_SEPARATOR} ".join(text)


def _write(out: Path, given: Table, facts: list[dict[str, Any]]) -> None:
    """Write a table with the answers beside its rows; rows without a text have none."""
    import csv
    import io

    from cond_pdiff.atomic import write_text

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*given.columns, *ANSWER_COLUMNS])
    for row, fact in zip(given.rows, facts, strict=True):
        best = fact["label"]
        writer.writerow([*row, *([best, f"{fact['probabilities'][best]:.4f}"] if best is not None else ["", ""])])
    write_text(out, text.getvalue())


# --- test --------------------------------------------------------------------------------------------------------------------


def _own_examples(classifier: PrototypeClassifier) -> set[Text]:
    """Return the texts that the adapter records as examples it was made, chosen or refined with."""
    metadata = classifier.adapter.metadata if classifier.adapter else {}
    condition = metadata.get("condition")
    recorded = condition.get("examples", ()) if isinstance(condition, dict) else ()
    texts = [example[0] for example in (*recorded, *metadata.get("prototype_examples", ()))]
    return {tuple(text) if isinstance(text, list) else text for text in texts}


def _told(result: Comparison) -> str:
    """Lay a comparison out for people."""

    def share(estimate: Estimate, sign: str = "") -> str:
        return f"{100 * estimate.value:{sign}.1f} ({100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f})"

    lines = [
        [f"{result.rows} rows, in %", "base model", "with the adapter", "difference"],
        ["accuracy", share(result.base.accuracy), share(result.adapter.accuracy), share(result.accuracy_difference, "+")],
        ["macro F1", share(result.base.macro_f1), share(result.adapter.macro_f1), share(result.macro_f1_difference, "+")],
    ]
    if len(result.labels) > SHOWN_LABELS:
        return f"{table(lines)}\n\nconfusion  of {len(result.labels)} labels: see --json"
    right = [f"{name} ({sum(row)})" for name, row in zip(result.labels, result.adapter.confusion, strict=True)]
    answers = [
        [name, *map(str, row)] for name, row in zip(right, result.adapter.confusion, strict=True)
    ]
    confusion = table([["right label ↓, answer with the adapter →", *result.labels], *answers])
    return f"{table(lines)}\n\n{confusion}\n"
