"""Colors that color-blind readers can tell apart (Okabe and Ito)."""

from __future__ import annotations

__all__ = ["BLUE", "GREEN", "ORANGE", "PURPLE", "SERIES", "SKY", "VERMILION"]

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"

SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
