"""What the conventions of the platforms say of sizes: spots of Visium, bins of Visium HD."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from stgen._spatial.image import affine_to

__all__ = ["mpp_from_pitch", "named_bins", "spot_diameter", "spot_pitch", "um_per_unit_of_bins"]

logger = logging.getLogger("stgen")

_VISIUM_PITCH_UM = 100.0
_VISIUM_SPOT_UM = 55.0
_SPACE_RANGER_UM = 65.0  # spot_diameter_fullres is that of "a theoretical 65 µm spot"


def spot_pitch(xy: np.ndarray) -> tuple[float, bool]:
    """Distance between neighboring spots, and whether they lie on a hexagonal grid, as those of Visium do."""
    if len(xy) < 7:
        return float("nan"), False
    distance, _ = cKDTree(xy).query(xy, k=7)
    pitch = float(np.median(distance[:, 1]))
    if not pitch > 0:
        return float("nan"), False
    six = (distance[:, 1:] < 1.15 * pitch).all(1) & (distance[:, 1:] > 0.85 * pitch).all(1)
    return pitch, bool(six.mean() > 0.3)


def named_bins(key: str) -> int | None:
    """Side in µm of the bins of Visium HD, from the name of their element (``square_016um``); None for other names."""
    named = re.search(r"square_(\d{3})um$", key)
    return None if named is None else int(named[1])


def um_per_unit_of_bins(element: Any, key: str, system: str) -> float | None:
    """µm per unit of a coordinate system, from bins named after their side, as those of Visium HD (``square_016um``)."""
    um = named_bins(key)
    if um is None or not hasattr(element, "geometry"):
        return None
    side = 2 * element["radius"] if "radius" in element.columns else np.sqrt(element.area)
    return float(um / (side.median() * affine_to(element, system)[1]))


def spot_diameter(xy: np.ndarray, stated: float | None) -> float | None:
    """Diameter within which spots capture: 55 µm where it is stated as the 65 µm that Space Ranger writes for Visium."""
    if stated is None:
        return None
    pitch, hexagonal = spot_pitch(xy)
    visium = hexagonal and abs(stated / pitch - _SPACE_RANGER_UM / _VISIUM_PITCH_UM) < 0.02
    return stated * _VISIUM_SPOT_UM / _SPACE_RANGER_UM if visium else stated


def mpp_from_pitch(xy: np.ndarray, diameter: float | None) -> float | None:
    """µm per unit where spots lie as those of Visium do, 100 µm apart on a hexagonal grid; None elsewhere."""
    pitch, hexagonal = spot_pitch(xy)
    if not hexagonal or (diameter is not None and not 0.45 < diameter / pitch < 0.75):
        return None
    logger.info(
        "µm per pixel %.4g taken from the spots: hexagonal grid with a pitch of %.4g pixels = 100 µm (Visium). "
        "Pass mpp= if this is not Visium.",
        _VISIUM_PITCH_UM / pitch,
        pitch,
    )
    return _VISIUM_PITCH_UM / pitch
