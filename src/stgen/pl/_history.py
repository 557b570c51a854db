"""How a training run went."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stgen._checks import check_types
from stgen.models import Model
from stgen.pl._colors import BLUE, CATEGORIES, VERMILION

__all__ = ["history"]

PARTS = [color for color in CATEGORIES if color not in (BLUE, VERMILION)]


@check_types
def history(model: Model, *, ax: Axes | None = None) -> Axes:
    """Draw the training and validation losses of a fitted model.

    Parameters
    ----------
    model
        A fitted model that trains in steps, such as :class:`stgen.models.Stem`.
    ax
        Axes to draw into; by default a new figure.

    Returns
    -------
    The Axes, with one line per loss, labeled by its name.

    Raises
    ------
    ValueError
        If the model has not been fitted, or has no history because it does not train in steps.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models, pl
    >>> from stgen.data import SpotData
    >>> data = SpotData(np.random.default_rng(0).normal(size=(32, 2)), np.ones((32, 3)))
    >>> model = models.Stem(["A", "B"], embedding_dim=3, transform="none", width=16, depth=1, heads=2)
    >>> model.record = {"history": model.fit(data, steps=4, evaluate_every=2, progress=False)}
    >>> ax = pl.history(model)
    >>> ax.get_xlabel(), [line.get_label() for line in ax.lines]
    ('step', ['training'])
    """
    if not model.fitted:
        raise ValueError(f"this {type(model).__name__} has not been fitted; call stgen.tl.fit(model, data) first.")
    losses = dict(model.record.get("history", {}))
    steps = losses.pop("step", None)
    if not steps:
        raise ValueError(
            f"this {type(model).__name__} has no history of losses: it was solved at once, not trained in steps."
        )
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if ax is None else {}
    if ax is None:
        ax = plt.subplots(figsize=(7, 3.2), layout="constrained")[1]
    validation, total = losses.pop("validation", None), losses.pop("loss")
    style: dict[str, Any] = {"marker": "o" if len(steps) < 40 else None, "ms": 6 if len(steps) < 6 else 3}
    ax.plot(steps, total, color=BLUE, label="training", **style)
    parts = {name: values for name, values in losses.items() if not np.allclose(values, total)}
    for number, (name, values) in enumerate(parts.items()):
        color, dashes = PARTS[number % len(PARTS)], ("--", ":", "-.")[number // len(PARTS) % 3]
        ax.plot(steps, values, color=color, lw=1, ls=dashes, label=f"training: {name}")
    if validation:
        best = int(np.argmin(validation))
        ax.plot(steps, validation, color=VERMILION, label="validation (averaged weights)", **style)
        ax.axvline(steps[best], color="0.4", lw=1, ls="--", zorder=0, label=f"weights kept, step {steps[best]}")
    ax.set(xlabel="step", ylabel="loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) == 1:  # nothing to see a trend in
        ax.set_xlim(0, 2 * steps[0])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", **beside)
    return ax
