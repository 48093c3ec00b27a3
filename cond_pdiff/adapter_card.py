"""The card of an adapter: what it is for, how to load it, how it was made, as far as its metadata say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cond_pdiff.conditions.condition import Condition, condition_kind
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.errors import ConditionError, CondPDiffError
from cond_pdiff.families.family import Family
from cond_pdiff.gguf import GGUF_SUFFIX
from cond_pdiff.hub import hub_name
from cond_pdiff.model_cards import fill_card

if TYPE_CHECKING:
    from cond_pdiff.adapter import LoraAdapter

CARD_FILE = "README.md"
MAX_NAMED = 16
"""The number of modules that a card names."""


def adapter_card(adapter: LoraAdapter, preview: str | None = None) -> str:
    """Return the card as Markdown with the Hub's YAML header.

    Metadata that are missing, or not as this package writes them, are left out.

    Args:
        preview: name of a picture in the repository that shows what the adapter does.
    """
    metadata, fields = adapter.metadata, _fields(adapter)
    fields |= {
        "labels": "" if metadata.get("labels") else ', ["first label", "second label"]',
        "prompt": "\n".join("    " + " ".join(line.split()) for line in Instruction.recorded(metadata).prompt("…").split("\n")),
        "max_length": metadata.get("max_length", "an unknown number of"),
        "num_labels": len(metadata["labels"]) if isinstance(metadata.get("labels"), list) else 2,  # transformers' own default
        "story": fields["story"] + (f"\n\n![What the adapter does]({preview})" if preview else ""),
    }
    return fill_card(_family(adapter).adapter_card, fields)


def merged_card(adapter: LoraAdapter, scale: float) -> str:
    """Return the card of a base model with an adapter merged in.

    Args:
        scale: the adapter's strength in it.
    """
    tag, library = adapter.family.merged_card if adapter.family else Family.merged_card
    fields = _fields(adapter) | base_fields(adapter.spec.base_model, "merge")
    return fill_card("merged_model.md", {**fields, "tag": tag, "library": library, "scale": f"{scale:g}"})


def base_fields(base: str | None, relation: str = "adapter") -> dict[str, str]:
    """Return what cards say of a base model: never a path of this machine, and to the Hub only a name that it can know.

    Args:
        base: Hub id, path of a folder, or None if it is unknown.
        relation: of what the card is of to the base model, by the Hub's word.
    """
    name, folder = hub_name(base), _line(re.split(r"[/\\]", (base or "").rstrip("/\\"))[-1])
    place = json.dumps(name or f"path/to/{folder or 'the-base-model'}")
    if folder.endswith(GGUF_SUFFIX):  # transformers is told the folder and the file, and to make plain numbers of its weights
        options = {"gguf_file": json.dumps(folder), "quantization_config": '{"quant_method": "gguf", "dequantize": True}'}
        place = ", ".join([json.dumps(name or "path/to"), *(f"{option}={value}" for option, value in options.items())])
    return {
        # JSON's strings are YAML's and Python's.
        "base_yaml": f"base_model: {json.dumps(name)}\nbase_model_relation: {relation}\n" if name else "",
        "base_string": place,
        "base_model": _line((base if name else folder) or "an unknown base model"),
    }


def shareable_card(card: str, base: str | None) -> str:
    """Return a card, whoever wrote it, as it is published: without `base_model` where the Hub cannot know it, and without its path."""
    if hub_name(base):
        return card
    found = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
    header = found[0] if found else ""
    text = card.removeprefix(header)
    # A value, on its line or as a list below it; and the tags that peft makes of it.
    header = re.sub(r"^base_model(_relation)?:.*\n(( +|- ).*\n)*|^ *- *[\"']?base_model:.*\n", "", header, flags=re.MULTILINE)
    return header + (text.replace(base, base_fields(base)["base_model"]) if base else text)


def _family(adapter: LoraAdapter) -> type[Family]:
    """Return the adapter's family; where it is not known here, or only guessed, `Family` itself, whose cards claim nothing."""
    try:
        family = adapter.family
    except CondPDiffError:
        return Family
    return type(family) if family and family.is_certain(adapter) else Family


def _fields(adapter: LoraAdapter) -> dict[str, Any]:
    """Return the fields that both cards have."""
    facts = (*_use(adapter), *_making(adapter.metadata), *_verdict(adapter.metadata))
    rows = [f"| {name} | {value} |" for name, value in facts if value]
    return {
        **base_fields(adapter.spec.base_model),
        "story": _story(adapter.metadata),
        "facts": "\n".join(["| | |", "|---|---|", *rows]),
    }


def _story(metadata: Mapping[str, Any]) -> str:
    """Say where the adapter comes from."""
    condition = metadata.get("condition")
    if not isinstance(condition, Mapping):
        if isinstance(file := metadata.get("imported_from"), str):
            return f"Imported from `{_line(file)}`, with its updates as they were, in another form of their factors."
        task = metadata.get("task")
        return f"Fine-tuned on the task `{_line(task)}`." if isinstance(task, str) else "Fine-tuned, or computed from other adapters."
    kind = _kind(metadata)
    return kind.describe(condition) if kind else "Generated by a diffusion model over network weights."


def _kind(metadata: Mapping[str, Any]) -> type[Condition] | None:
    """Return the kind of the recorded condition; None where there is none that is known here."""
    condition = metadata.get("condition")
    try:
        return condition_kind(condition) if isinstance(condition, Mapping) else None
    except ConditionError:
        return None


def _use(adapter: LoraAdapter) -> Iterator[tuple[str, str]]:
    """Yield the names and values that say what the adapter is, and how it is used."""
    spec, metadata = adapter.spec, adapter.metadata
    base = metadata.get("base")
    if isinstance(base, Mapping):
        revision = f" at revision `{_line(base['revision'])}`" if base.get("revision") else ""
        yield "base model", f"`{base_fields(adapter.spec.base_model)['base_model']}`{revision}"
    targets = ", ".join(_first([f"`{_line(name)}`" for name in spec.target_modules]))
    heads = "".join(f", {head}" for head in _first([f"head `{_line(name)}`" for name in spec.modules_to_save]))
    yield "adapter", f"LoRA, rank {spec.rank}, alpha {spec.alpha:g}, on {targets}{heads}: {adapter.layout.num_adapter_params:,} parameters"
    if isinstance(metadata.get("max_length"), int) and _family(adapter).cuts_texts:
        yield "texts", f"read up to {metadata['max_length']} tokens, in training and in use"
    labels = metadata.get("labels")
    if isinstance(labels, list) and labels:
        yield "labels", ", ".join(f"`{_line(label)}`" for label in labels)


def _first(names: list[str]) -> list[str]:
    """Return the first of many names, and how many more there are."""
    return names if len(names) <= MAX_NAMED else [*names[:MAX_NAMED], f"{len(names) - MAX_NAMED} more"]


def _making(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and values that say how the adapter was made."""
    generator = metadata.get("generator")
    if isinstance(generator, Mapping):
        commit = f" at commit `{_line(generator['revision'])}`" if generator.get("revision") else ""
        yield "generator", f"`{_line(generator.get('name'))}`{commit}, sha256 `{_line(generator.get('sha256'))[:12]}`"
    if isinstance(metadata.get("seed"), int):
        kind = _kind(metadata)
        shown = kind.file_option if kind else ""
        again = "" if "refined" in metadata else f"; `cond-pdiff verify adapter{shown}` makes it again and compares the bytes"
        yield "seed", f"{metadata['seed']}{again}"
    if "scheduler" in metadata:
        steps, guidance = metadata.get("num_inference_steps"), metadata.get("guidance_scale")
        settings = _pairs(metadata.get("scheduler_config"))
        scheduler = _line(metadata["scheduler"]) + (f" ({settings})" if settings else "")
        yield "sampler", f"{scheduler}, {_line(steps)} steps, guidance {_line(guidance)}"
    if metadata.get("strength") == 0:
        yield "strength", "0, which is the base model: the examples do not show that the adapter is better"
    if isinstance(metadata.get("prototype_examples"), list):
        yield "class prototypes", f"of the label names and {len(metadata['prototype_examples'])} recorded examples"
    refined = metadata.get("refined")
    if isinstance(refined, Mapping):
        shown = f"the pictures ({_line(refined['pictures'])})" if "pictures" in refined else "labelled examples"
        yield "refined", f"{_line(refined.get('steps'))} steps on {shown}, learning rate {_line(refined.get('learning_rate'))}"


def _verdict(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and values that say how far the request was from what was trained, and where all that happened."""
    nearest = metadata.get("nearest")
    if isinstance(nearest, list):
        pairs = [pair for pair in nearest if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], (int, float))]
        yield "nearest trained", ", ".join(f"{_line(name)} {similarity:.2f}" for name, similarity in pairs)
    if isinstance(metadata.get("in_distribution"), bool):
        inside = "in distribution" if metadata["in_distribution"] else "**out of distribution**, unlike all that was trained on: test first"
        yield "request", inside
    yield "made on", _pairs(metadata.get("machine"))
    yield "versions", _pairs(metadata.get("versions"))


def _pairs(facts: Any) -> str:
    """Join names and values in one line; it is empty for what has none."""
    return ", ".join(f"{_line(name)} {_line(value)}" for name, value in facts.items()) if isinstance(facts, Mapping) else ""


def _line(value: Any) -> str:
    """Put a value on one line of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
