"""HTML for reports and notebooks: text is escaped, numbers are short."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from numbers import Real
from typing import Any

__all__ = ["Markup", "figure", "mapping", "number", "page", "table", "tag"]


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element; what it contains is escaped unless it is :class:`Markup`. ``class_`` stands for ``class``."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    inner = "".join(part if isinstance(part, Markup) else html.escape(number(part)) for part in content)
    return Markup(f"<{name}{given}>{inner}</{name}>")


def number(value: object) -> str:
    """A value as text: whole numbers with commas, others with four digits."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "" if value is None else str(value)
    real = float(value)
    if real != real:
        return ""
    return f"{int(real):,}" if real.is_integer() and abs(real) < 1e15 else f"{real:.4g}"


def table(rows: Iterable[Sequence[object]], header: Sequence[object] | None = None) -> Markup:
    """Rows of cells; numbers stand on the right."""
    parts = []
    if header is not None:
        parts.append(tag("thead", tag("tr", *(tag("th", cell) for cell in header))))
    body = [
        tag("tr", *(tag("td", cell, style=f"text-align:{'right' if is_number(cell) else 'left'}") for cell in row))
        for row in rows
    ]
    parts.append(tag("tbody", *body))
    return tag("table", *parts)


def is_number(value: object) -> bool:
    """Whether a cell is a number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def mapping(values: Mapping[str, Any]) -> Markup:
    """A table of names and values, mappings within as ``name: value``."""
    return table((name, number(_flat(value))) for name, value in values.items())


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {number(item)}" for name, item in value.items())
    return value


def figure(drawn: Any, caption: str, *, dpi: int = 130) -> Markup:
    """A matplotlib figure, embedded as a picture, with a caption."""
    buffer = BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return tag("figure", Markup(f'<img alt="{html.escape(caption)}" src="{source}">'), tag("figcaption", caption))


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1b1f24; background: #fff;
  max-width: 1080px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem;
  border-bottom: 1px solid #d7dbe0; padding-bottom: .2rem; }
p.lead { font-size: 1.05rem; } p.note, figcaption { color: #59636e; font-size: .9rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #d7dbe0; vertical-align: bottom; }
th, td { padding: .22rem .8rem .22rem 0; } td { border-bottom: 1px solid #eceff2; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
ul.warnings { background: #fff6e0; border-left: 4px solid #d99a00; padding: .7rem 1rem .7rem 2.1rem; }
p.fine { background: #eef7ee; border-left: 4px solid #3c8c40; padding: .7rem 1rem; }
td:first-child { white-space: nowrap; padding-right: 1.4rem; }
.bars { display: inline-block; width: 64px; }
.bar { display: inline-block; height: .7em; background: #2a6fb0; margin-right: .5em; }
.bars.no .bar { background: #b7bec6; } summary { cursor: pointer; color: #2a6fb0; } i { font-style: italic; }
footer { margin-top: 3rem; color: #59636e; font-size: .85rem; }
@media print { body { margin: 0; max-width: none; } details > * { display: block; } }
"""


def page(title: str, *content: object) -> str:
    """A whole document that refers to nothing outside itself."""
    head = tag("head", Markup('<meta charset="utf-8">'), tag("title", title), tag("style", Markup(STYLE)))
    return "<!doctype html>\n" + tag("html", head, tag("body", *content), lang="en") + "\n"
