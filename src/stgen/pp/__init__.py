"""Preparation: genes to predict, histology embeddings, alignment, and maps of counts at high and low resolution."""

from __future__ import annotations

from ._alignment import AlignmentReport, check_alignment
from ._degrade import degrade
from ._embed import embed
from ._genes import select_genes
from ._micrometers import name_micrometers
from ._nuclei import segment_nuclei
from ._rasterize import rasterize
from ._spots import simulate_spots, spots_to_map
from ._tiles import tile_grid
from ._to_spatialdata import to_spatialdata

__all__ = [
    "AlignmentReport",
    "check_alignment",
    "degrade",
    "embed",
    "name_micrometers",
    "rasterize",
    "segment_nuclei",
    "select_genes",
    "simulate_spots",
    "spots_to_map",
    "tile_grid",
    "to_spatialdata",
]
