"""Colors that color-blind readers can tell apart (Okabe and Ito)."""

from __future__ import annotations

import matplotlib as mpl

from stgen._checks import shown

__all__ = ["BLUE", "CATEGORIES", "GRAY", "GREEN", "ORANGE", "PURPLE", "SERIES", "SKY", "VERMILION", "check_cmaps"]

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"

SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)

GRAY = "#D0D0D0"  # of what is not in question

_DARK = ("#003A5C", "#7A3100", "#004D39", "#7D4464", "#7A5400", "#256A8C", "#8A8100")
CATEGORIES = (
    *SERIES,
    "#F0E442",
    "#000000",
    *_DARK,
)  # the first eight can be told apart by all; the rest by their brightness


def check_cmaps(**cmaps: str) -> None:
    """Refuse names of color maps that matplotlib does not know."""
    for name, cmap in cmaps.items():
        if cmap not in mpl.colormaps:
            raise ValueError(
                f'`{name}` must be the name of a color map of matplotlib, such as "viridis"; found {shown(cmap)}.'
            )
