"""What the page tells of a request and of answers, in HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from cond_pdiff.conditions.condition import Condition
from cond_pdiff.models.condition_index import ConditionIndex
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.text_to_image import encode_png

INSIDE, OUTSIDE = ("near", "in distribution"), ("far", "out of distribution: expect less")

CSS = """
.report .badge {color: white; border-radius: 6px; padding: 2px 8px; margin-right: 6px; display: inline-block}
.report .near {background: #1a7f37} .report .far {background: #9a6700}
.report h4 {margin: 12px 0 4px} .report p, .report dl {margin: 6px 0}
.report .neighbour {display: inline-flex; align-items: center; gap: 8px; margin: 4px 12px 4px 0; max-width: 210px; overflow-wrap: anywhere}
.report .neighbour img {width: 72px; height: 72px; margin: 0; image-rendering: pixelated}
.report dt {float: left; font-weight: 600; margin-right: 6px} .report dt::first-letter {text-transform: uppercase}
.report dt::after {content: ":"} .report dd {margin: 0}
.answers table {width: 100%; table-layout: fixed; border-collapse: collapse} .answers table, .answers tr {border: 0}
.answers th, .answers td {text-align: left; vertical-align: top; padding: 6px 8px; overflow-wrap: anywhere; border: 0;
  border-bottom: 1px solid var(--border-color-primary)}
.answers th:first-child {width: 46%} .answers tbody th {font-weight: 400}
"""


def told(out: CondPDiffPipelineOutput, condition: Condition, index: ConditionIndex, heading: str = "") -> str:
    """Say how near a request is to what was trained, with a small picture of each neighbour that has one, and what was done."""
    report = out.report
    sign, words = INSIDE if report.in_distribution else OUTSIDE
    neighbours = []
    for neighbour in report.nearest:
        picture = index.preview(neighbour.task)
        data = base64.b64encode(encode_png(picture)).decode() if picture else ""
        shown = f'<img alt="" src="data:image/png;base64,{data}">' if data else ""
        name = html.escape(neighbour.task.replace("_", " "))
        neighbours.append(f'<span class="neighbour">{shown}<span><b>{name}</b> {neighbour.similarity:.2f}</span></span>')
    facts = report.facts() | out.refinement(condition)
    listed = "".join(f"<div><dt>{title}</dt><dd>{html.escape(fact)}</dd></div>" for title, fact in facts.items())
    return (
        f"{f'<h4>{html.escape(heading)}</h4>' if heading else ''}"
        f'<p><span class="badge {sign}">{words}</span> nearest (threshold {report.threshold:.2f}):</p>'
        f"<p>{''.join(neighbours)}</p>{f'<dl>{listed}</dl>' if listed else ''}"
    )


def likeliest(shares: Mapping[str, float]) -> str:
    """Write the likeliest label with its probability."""
    best = max(shares, key=lambda label: shares[label])
    return f"{best} {shares[best]:.0%}"


def answer_table(texts: Sequence[str], base: Sequence[Mapping[str, float]], adapted: Sequence[Mapping[str, float]]) -> str:
    """Lay out the likeliest labels of texts, the base model's beside those with the adapter, with their probabilities."""
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Text", "Base model", "With the adapter"))
    rows = "".join(
        f'<tr><th scope="row">{html.escape(text)}</th><td>{html.escape(likeliest(one))}</td><td>{html.escape(likeliest(other))}</td></tr>'
        for text, one, other in zip(texts, base, adapted, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
