"""Preparation: genes to predict, histology embeddings, and whether image and locations belong together."""

from __future__ import annotations

from ._alignment import AlignmentReport, check_alignment
from ._embed import embed
from ._genes import select_genes
from ._tiles import tile_grid

__all__ = ["AlignmentReport", "check_alignment", "embed", "select_genes", "tile_grid"]
