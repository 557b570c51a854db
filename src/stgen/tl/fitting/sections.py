"""From sections to what a model learns from: their spots, with the histology around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatialdata import SpatialData

from stgen._checks import check_enough_spots, only_key
from stgen._spatial.grid import get_map
from stgen._spatial.map_inputs import MapElements
from stgen._spatial.records import made_by, provenance
from stgen._spatial.result_grid import result_grid
from stgen._spatial.section import find_image
from stgen.data import MapInputs
from stgen.models import MapMaker
from stgen.tl.fitting.maps import in_section
from stgen.tl.superresolution.result import FUNCTION as SUPERRESOLVED

__all__ = ["gather_sections", "spots_of"]


def gather_sections(
    model: MapMaker[Any],
    sections: Mapping[str, SpatialData],
    *,
    image_key: str | None,
    low_res: str | Mapping[str, str] | None,
    layer: str | None,
) -> tuple[list[MapInputs], dict[str, Any]]:
    """All sections on bins of the model, and a record of what they are."""
    if not sections:
        raise ValueError("`data` is an empty mapping; give at least one section.")
    gathered = []
    for name, sdata in sections.items():
        with in_section(name, sections):
            named = low_res.get(name) if isinstance(low_res, Mapping) else low_res
            gathered.append(_section(model, sdata, image_key, named, layer))
    record = {
        "sections": list(sections),
        "n_spots": sum(len(inputs.measurement.footprints) for inputs in gathered if inputs.measurement is not None),
        "image_key": image_key,
        "low_res": dict(low_res) if isinstance(low_res, Mapping) else low_res,
        **({} if layer is None else {"layer": layer}),
        "version": provenance("tl.fit")["version"],
    }
    return gathered, record


def spots_of(sdata: SpatialData, low_res: str | None) -> str:
    """The measurement that is named, or the only table of spots."""
    if low_res is not None and low_res in sdata.images:
        get_map(sdata, low_res)
        return low_res
    tables = [key for key in sdata.tables if key == low_res or not made_by(sdata, key, SUPERRESOLVED)]
    low_res = only_key(tables, low_res, argument="low_res", what="table of spots")
    check_enough_spots(sdata.tables[low_res].n_obs, f"{sdata.tables[low_res].n_obs} in {low_res!r}")
    return low_res


def _section(
    model: MapMaker[Any], sdata: SpatialData, image_key: str | None, low_res: str | None, layer: str | None
) -> MapInputs:
    """One section on bins of the model."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"a section is a SpatialData object, found {type(sdata).__name__}.")
    elements = MapElements.find(
        sdata,
        image_key=find_image(sdata, image_key) if model.needs_image else None,
        low_res=spots_of(sdata, low_res),
        layer=layer,
    )
    grid = result_grid(elements, bin_um=None, factor=None, fitted_um=model.config["bin_um"])
    return elements.inputs(grid, model)
