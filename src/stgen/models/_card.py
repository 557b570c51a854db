"""What a model says of itself: in a line, in a notebook, and on the card that is saved with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stgen import _html
from stgen._checks import listed
from stgen.transforms import unit

if TYPE_CHECKING:
    from stgen.models._base import Model

__all__ = ["CARD", "facts", "line", "markup", "text", "write"]

CARD = "README.md"
WRITTEN = "<!-- Written by stgen; a card without this line is not replaced. -->"


def line(model: Model[Any]) -> str:
    """A model in a line: ``Stem(50 genes, fitted on 4 sections, 1,234,567 weights)``."""
    fitted = _sections(model)
    parts = [_count(len(model.genes), "gene"), f"fitted on {fitted}" if model.fitted else "not fitted"]
    n_weights = sum(weights.numel() for weights in model.parameters())
    parts += [_count(n_weights, "weight")] if n_weights else []
    return f"{type(model).__name__}({', '.join(parts)})"


def facts(model: Model[Any]) -> dict[str, str]:
    """What is known of a model, by name."""
    config, record = model.config, model.record
    found = {
        "family": type(model).__name__,
        "genes": f"{_count(len(model.genes), 'gene')}: {listed(model.genes, 8)}",
        "takes": "histology embeddings of locations" if model.takes == "locations" else "maps and their histology",
        "gives": unit(model.transform),
    }
    if "bin_um" in config:
        found["bins"] = f"{config['bin_um']:g} µm"
    if config.get("factor"):
        found["factor"] = f"{config['factor']} times finer than the low-resolution data"
    if not model.fitted:
        return {**found, "fitted": "no"}
    names = record.get("sections") or []
    found["fitted on"] = _sections(model) + (f": {listed(names, 8)}" if names else "")
    embedding = record.get("embedding")
    if isinstance(embedding, Mapping):
        found["embedding"] = f"{embedding.get('model', embedding.get('key'))}, {embedding.get('n_features')} features"
    found |= _training(record.get("history") or {})
    n_weights = sum(weights.numel() for weights in model.parameters())
    found["size"] = _count(n_weights, "weight") if n_weights else "no weights that are trained"
    if "version" in record:
        found["stgen"] = str(record["version"])
    return found


def markup(model: Model[Any]) -> str:
    """A model for notebooks."""
    return _html.tag("div", _html.tag("b", line(model)), _html.mapping(facts(model)))


def text(model: Model[Any]) -> str:
    """The card, Markdown in the form of the Hugging Face Hub."""
    name, known = type(model).__name__, facts(model)
    rows = "\n".join(f"| {key} | {value.replace('|', '/')} |" for key, value in known.items())
    function = "tl.predict_expression" if model.takes == "locations" else "tl.superresolve"
    genes = ", ".join(f"`{gene}`" for gene in model.genes)
    return f"""---
library_name: stgen
tags:
- spatial-transcriptomics
- histology
- {name.lower()}
---
{WRITTEN}
# {name} for {_count(len(model.genes), "gene")}

Gene expression from histology, fitted with [stgen](https://pypi.org/project/stgen). The weights are in
`model.safetensors`, all else is in `config.json`; nothing is pickled.

```python
import stgen as sg

model = sg.models.load("<this folder, or its name on the Hub>")
sg.{function}(data, model=model)
```

## What it is

| | |
| --- | --- |
{rows}

SHA-256 of the weights: `{model.weights_sha256()}`

## Scores

{_scores(model.record.get("scores"))}

## Limits

- It knows the tissue, stain, scanner and platform of the sections that it was fitted on, and may be wrong without a
  sign elsewhere.
- Genes that histology says little of come out close to their mean; `stgen.tl.evaluate` says which, on sections of your
  own.
- Not for clinical decisions.

## Genes

{genes}
"""


def write(folder: Path, model: Model[Any]) -> None:
    """Put the card beside a model's files, unless somebody has written one by hand."""
    path = folder / CARD
    if not path.exists() or WRITTEN in path.read_text(encoding="utf-8"):
        path.write_text(text(model), encoding="utf-8")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _sections(model: Model[Any]) -> str:
    n = len(model.record.get("sections") or [])
    places = model.record.get("n_locations")
    return (_count(n, "section") if n else "data of your own") + (f", {places:,} locations" if places else "")


def _training(history: Mapping[str, Any]) -> dict[str, str]:
    """Steps and losses of a fit in steps."""
    if not history.get("step"):
        return {}
    found = {"trained for": _count(int(history["step"][-1]), "step")}
    validation = history.get("validation") or []
    if validation:
        found["validation loss"] = f"{validation[0]:.4g} at first, {min(validation):.4g} at best"
    return found


def _scores(scores: object) -> str:
    """Scores of models by name, as a table, where ``record["scores"]`` holds some."""
    if not isinstance(scores, Mapping) or not scores:
        return (
            "None were recorded. Score it on patients whom it has not seen, beside the simple models: "
            "`stgen.tl.compare` "
            'does, and `model.record["scores"] = {"model": {"PCC": ...}, "LinearProbe": {...}}` before `model.save` '
            "puts them here."
        )
    columns = list(dict.fromkeys(name for of in scores.values() for name in of))
    rows = [f"| {name} | {' | '.join(_html.number(of.get(key)) for key in columns)} |" for name, of in scores.items()]
    return "\n".join([f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns), *rows])
