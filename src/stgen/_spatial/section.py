"""From SpatialData and AnnData to arrays, and back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData, get_centroids

from stgen._checks import listed, only_key
from stgen._spatial.coordinates import choose_system, systems_of
from stgen._spatial.counts import check_not_empty
from stgen._spatial.identity import check_element_ids, check_row_names, position_of
from stgen._spatial.image import (
    Histology,
    affine_to,
    element_of,
    histology_of,
    is_micrometers,
    micrometers_per_unit,
    slide_mpp,
)
from stgen._spatial.kinds import check_histology
from stgen._spatial.library import as_xy, coordinates_of, library_of
from stgen._spatial.platforms import mpp_from_pitch, spot_diameter, um_per_unit_of_bins

__all__ = [
    "Section",
    "check_sdata",
    "find_image",
    "get_section",
    "get_table",
]

logger = logging.getLogger("stgen")

OUT_OF_FOLD = "out of fold"  # what the record of a table says that is never taken unless it is named


@dataclass
class Section:
    """One section as arrays, with the user's own table by reference."""

    table: AnnData
    """The table, not a copy: what is written into it is written into the user's object."""
    image: Histology | None
    """The image, if one was asked for."""
    xy_px: np.ndarray
    """Locations ``(n_obs, 2)`` as x, y in pixels of the image's finest level (coordinate units without an image)."""
    mpp: float | None
    """µm per unit of ``xy_px``; None if it is not known and no image was asked for."""
    spot_diameter_um: float | None
    """Diameter of a spot, if the locations are circles of one size."""
    image_key: str | None = None
    table_key: str | None = None

    @property
    def histology(self) -> Histology:
        """The image, of a section that was found with ``need_image=True``."""
        if self.image is None:
            raise ValueError("There is no image to read; pass image_key=<one of the object's images>.")
        return self.image

    @property
    def xy_um(self) -> np.ndarray:
        """Locations in µm, from the image's upper left corner."""
        if self.mpp is None:
            raise ValueError("The µm per pixel of this section are not known; pass mpp=<µm per pixel>.")
        return self.xy_px * self.mpp


def get_section(
    data: SpatialData | AnnData,
    *,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    mpp: float | None = None,
    coordinate_system: str | None = None,
    need_image: bool = False,
) -> Section:
    """Find table, image and locations, and bring the locations into pixels of the image.

    A section is one region: a table with rows in several, or several libraries, is refused.

    Parameters
    ----------
    data
        SpatialData, or AnnData that follows the scanpy/squidpy Visium convention (``obsm["spatial"]`` in
        full-resolution pixels, images and scale factors in ``uns["spatial"][library]``).
    image_key
        Image to use. SpatialData: None if there is exactly one. AnnData: ``"hires"`` unless given.
    table_key
        Table to use (SpatialData); None if there is exactly one that fits.
    shapes_key
        Element that the table annotates; chooses among tables.
    mpp
        µm per pixel: of the image's finest level (SpatialData) or of the full-resolution image that ``obsm["spatial"]``
        refers to (AnnData). None: from a micrometer coordinate system, from the names of Visium HD's bins
        (``square_016um``), or from the 100 µm pitch of Visium spots.
    coordinate_system
        The one in which image and locations meet; None: a micrometer one if there is one, else "global", else the
        only one.
    need_image
        Whether a missing image is an error.
    """
    if mpp is not None and not (isinstance(mpp, Real) and np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"`mpp` must be a positive number of µm per pixel, found {mpp!r}.")
    if isinstance(data, AnnData):
        return _section_from_anndata(data, image_key=image_key, mpp=mpp, need_image=need_image)
    if isinstance(data, SpatialData):
        return _section_from_spatialdata(
            data,
            image_key=image_key,
            table_key=table_key,
            shapes_key=shapes_key,
            mpp=mpp,
            coordinate_system=coordinate_system,
            need_image=need_image,
        )
    raise TypeError(f"Expected a SpatialData or AnnData object, found {type(data).__name__}.")


def get_table(data: SpatialData | AnnData, *, table_key: str | None = None, shapes_key: str | None = None) -> AnnData:
    """The table of ``data``, by reference; ``data`` itself if it is one."""
    if isinstance(data, AnnData):
        if table_key is not None:
            raise ValueError(
                "`table_key` names a table of a SpatialData object, and the data is a table; leave it out."
            )
        return data
    if isinstance(data, SpatialData):
        return data.tables[_find_table(data, table_key, shapes_key)]
    raise TypeError(f"Expected a SpatialData or AnnData object, found {type(data).__name__}.")


# -- AnnData ----------------------------------------------------------------------------------------------------------
def _section_from_anndata(table: AnnData, *, image_key: str | None, mpp: float | None, need_image: bool) -> Section:
    check_not_empty(table)
    xy = coordinates_of(table)
    check_row_names(table)
    _region_of(table, "The object")
    library = library_of(table)
    library.check_coordinates(xy, mpp or library.mpp)
    diameter = spot_diameter(xy, library.diameter)
    if mpp is None and library.factors:
        mpp = library.mpp or mpp_from_pitch(xy, diameter)
    if not need_image and image_key is None:
        return Section(table, None, xy, mpp, None if mpp is None or diameter is None else float(diameter * mpp))
    key, level = library.image(image_key)
    factor = library.scale(key)
    if mpp is None:
        raise ValueError(
            'The µm per pixel are not known: obsm["spatial"] is not a Visium grid of 100 µm pitch whose spots are '
            "spot_diameter_fullres wide. Pass mpp=<µm per full-resolution pixel>; if the coordinates are in pixels of "
            f'the image {key!r}, first divide them: adata.obsm["spatial"] /= {factor:.6g}.'
        )
    image = Histology([level], mpp=float(mpp) / factor, name=key)
    spot_um = None if diameter is None else float(diameter * mpp)
    return Section(table, image, xy * factor, image.mpp, spot_um, image_key=key)


# -- SpatialData ------------------------------------------------------------------------------------------------------
def _section_from_spatialdata(
    sdata: SpatialData,
    *,
    image_key: str | None,
    table_key: str | None,
    shapes_key: str | None,
    mpp: float | None,
    coordinate_system: str | None,
    need_image: bool,
) -> Section:
    table_key = _find_table(sdata, table_key, shapes_key)
    table = sdata.tables[table_key]
    check_not_empty(table)
    if need_image or image_key is not None:
        image_key = find_image(sdata, image_key)
    region, _ = annotated_region(sdata, table, table_key, shapes_key)
    system = shared_system(sdata, [region] if image_key is None else [image_key, region], coordinate_system)
    spots = locate(sdata, table_key, system)
    xy, diameter = spots.xy, spots.diameter
    if image_key is None:
        scale = mpp if mpp is not None else spots.um_per_unit()
        spot_um = None if scale is None or diameter is None else diameter * scale
        return Section(table, None, xy, scale, spot_um, table_key=table_key)
    matrix, scale = affine_to(sdata.images[image_key], system)
    mpp = image_mpp(sdata, image_key, system, spots) if mpp is None else mpp
    xy_px = (np.column_stack([xy, np.ones(len(xy))]) @ np.linalg.inv(matrix).T)[:, :2]
    image = histology_of(sdata, image_key, mpp=mpp)
    spot_um = None if diameter is None else diameter * mpp / scale
    return Section(table, image, xy_px, image.mpp, spot_um, image_key=image_key, table_key=table_key)


@dataclass(frozen=True)
class Locations:
    """Where the rows of a table lie, in a coordinate system."""

    region: str
    """The element that the table annotates."""
    element: Any
    system: str
    xy: np.ndarray
    """Shape ``(n, 2)``."""
    diameter: float | None
    """Of the spots, if they are circles of one size."""

    def um_per_unit(self) -> float | None:
        """µm per unit of the coordinate system, by its name, by those of Visium HD's bins, or by the pitch of Visium spots."""
        if is_micrometers(self.system):
            return 1.0
        return um_per_unit_of_bins(self.element, self.region, self.system) or mpp_from_pitch(self.xy, self.diameter)


def locate(sdata: SpatialData, table_key: str, system: str) -> Locations:
    """Where the rows of a table lie."""
    table = sdata.tables[table_key]
    region, _ = annotated_region(sdata, table, table_key, None)
    element = sdata[region]
    check_row_names(table, f"The table {table_key!r}")
    centers = centroids(element, system)
    ids = table.obs[table.uns["spatialdata_attrs"]["instance_key"]]
    position = position_of(ids, element, centers.index, region=region, table_key=table_key)
    xy = as_xy(centers[["x", "y"]].to_numpy()[position], f"the locations of the table {table_key!r}")
    radii = element["radius"].to_numpy() if "radius" in getattr(element, "columns", ()) else np.empty(0)
    one_size = radii.size > 0 and np.ptp(radii) <= 0.01 * radii.mean()
    diameter = spot_diameter(xy, float(2 * radii.mean() * affine_to(element, system)[1]) if one_size else None)
    return Locations(region, element, system, xy, diameter)


def image_mpp(sdata: SpatialData, image_key: str, system: str, spots: Locations | None = None) -> float:
    """µm per pixel of an image: by a micrometer system, by what a slide says of itself, or by the spots that lie on it.

    Raises
    ------
    ValueError
        If nothing tells.
    """
    image = sdata.images[image_key]
    scale = affine_to(image, system)[1]
    um_per_unit = 1.0 if is_micrometers(system) else micrometers_per_unit(image, scale)
    if um_per_unit is not None:
        return scale * um_per_unit
    of_slide = slide_mpp(sdata, image_key)
    if of_slide is not None:
        return of_slide
    um_per_unit = None if spots is None else spots.um_per_unit()
    if um_per_unit is None:
        raise ValueError(
            f"The µm per pixel of the image {image_key!r} are not known: no coordinate system is named "
            f"micrometers ({listed(systems_of(image))}) and "
            + (
                "there are no locations on it"
                if spots is None
                else "the locations are not on a Visium grid of 100 µm pitch"
            )
            + ". Pass mpp=<µm per image pixel> (0.2125 for a full-resolution Xenium image), or add a micrometer coordinate "
            "system: stgen.pp.name_micrometers(...)."
        )
    return scale * um_per_unit


def check_sdata(sdata: Any) -> None:
    """Refuse anything but a SpatialData object."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Expected a SpatialData object, found {type(sdata).__name__}.")


def find_image(sdata: SpatialData, image_key: str | None) -> str:
    """``image_key``, or the only image there is that is not a result of this package."""
    if not sdata.images and hasattr(sdata, "properties"):  # a WSIData
        raise KeyError("The slide has no image attached; open it by wsidata.open_wsi(path, attach_images=True).")
    results = sdata.attrs.get("stgen", {})
    keys = sdata.images if image_key is not None else [key for key in sdata.images if key not in results]
    key = only_key(keys, image_key, argument="image_key", what="image")
    check_histology(sdata, key)
    return key


def _find_table(sdata: SpatialData, table_key: str | None, shapes_key: str | None) -> str:
    results = sdata.attrs.get("stgen", {})
    keys = [key for key in sdata.tables if key == table_key or results.get(key, {}).get("statistic") != OUT_OF_FOLD]
    if table_key is not None or shapes_key is None:
        return only_key(keys, table_key, argument="table_key", what="table")
    linked = [key for key in keys if shapes_key in _region_names(sdata.tables[key])]
    if not linked:
        raise KeyError(
            f"`shapes_key`: no table annotates {shapes_key!r}; the tables are {listed(sdata.tables)}. Link one with "
            "spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)."
        )
    return only_key(linked, None, argument="table_key", what=f"table of {shapes_key!r}")


def _region_names(table: AnnData) -> list[str]:
    region = table.uns.get("spatialdata_attrs", {}).get("region", [])
    return [region] if isinstance(region, str) else list(region or [])


def _region_of(table: AnnData, name: str) -> str | None:
    """The one element in which the rows lie, None if the table annotates none; an error if there are several."""
    attrs = table.uns.get("spatialdata_attrs")
    if not attrs or attrs.get("region_key") not in table.obs:
        return None
    key = attrs["region_key"]
    regions = table.obs[key].astype(str).unique()
    if len(regions) > 1:
        names = ", ".join(map(repr, regions[:3])) + (", ..." if len(regions) > 3 else "")
        raise ValueError(
            f"{name} has rows in {len(regions)} regions ({listed(regions)}), and a section is one region on one image. "
            f"Split it and pass the parts, several as a mapping: {{name: sdata.subset([name, <its image>]) for name in "
            f"[{names}]}} (SpatialData), or {{name: adata[adata.obs[{key!r}] == name].copy() for name in "
            f"[{names}]}} (AnnData)."
        )
    return regions[0]


def annotated_region(
    sdata: SpatialData, table: AnnData, table_key: str, shapes_key: str | None
) -> tuple[str, np.ndarray]:
    """The element that the table annotates, whose ids are checked, and the instance of every row."""
    region = _region_of(table, f"The table {table_key!r}")
    if region is None:
        raise ValueError(
            f"The table {table_key!r} annotates no element, so its rows have no spatial coordinates. Link it with "
            "spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)."
        )
    if shapes_key not in (None, region):
        raise KeyError(
            f"The table {table_key!r} does not annotate {shapes_key!r}; it annotates {region}: leave shapes_key out."
        )
    if region not in sdata:
        raise KeyError(f"The table {table_key!r} annotates {region!r}, which is not in the object.")
    check_element_ids(sdata[region], region)
    key = table.uns["spatialdata_attrs"]["instance_key"]
    if key not in table.obs:
        raise KeyError(
            f"The table {table_key!r} annotates {region!r} by obs[{key!r}], which is not there; found "
            f"{listed(table.obs)}. Link it with spatialdata.models.TableModel.parse(table, region=..., region_key=..., "
            "instance_key=...)."
        )
    return region, table.obs[key].to_numpy()


def shared_system(sdata: SpatialData, keys: Sequence[str], wanted: str | None = None) -> str:
    """The coordinate system in which elements meet, see :func:`stgen._spatial.coordinates.choose_system`."""
    return choose_system({repr(key): systems_of(element_of(sdata, key)) for key in keys}, wanted)


def centroids(element: Any, system: str) -> pd.DataFrame:
    """Columns x, y in ``system``, indexed by instance."""
    if hasattr(element, "geometry"):
        matrix, _ = affine_to(element, system)
        points = element.geometry.centroid
        xy = np.column_stack([points.x, points.y, np.ones(len(points))]) @ matrix.T
        return pd.DataFrame({"x": xy[:, 0], "y": xy[:, 1]}, index=element.index)
    centers = get_centroids(element, coordinate_system=system)
    return centers.compute() if hasattr(centers, "compute") else centers
