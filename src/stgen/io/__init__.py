"""Exports for colleagues and programs without Python: QuPath, Fiji, R, spreadsheets."""

from __future__ import annotations

from ._geojson import write_geojson
from ._ome_tiff import write_ome_tiff
from ._tables import write_table

__all__ = ["write_geojson", "write_ome_tiff", "write_table"]
