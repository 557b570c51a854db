"""Pictures: they take axes and return them, and neither show nor save."""

from __future__ import annotations

from ._history import history
from ._maps import maps
from ._scores import scores

__all__ = ["history", "maps", "scores"]
