"""Data to try things on: a simulated tissue with a known answer, and readers of public sections."""

from __future__ import annotations

from ._public import her2st, mouse_olfactory_bulb, xenium_pancreas
from ._simulated import simulated_section

__all__ = ["her2st", "mouse_olfactory_bulb", "simulated_section", "xenium_pancreas"]
