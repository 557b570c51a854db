"""Outlines of nuclei, cells, spots and bins as GeoJSON, with what a table says of them."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import shapely
from geopandas import GeoDataFrame
from spatialdata import SpatialData

from stgen._checks import check_types, genes_of, listed, only_key
from stgen._spatial.files import checked_path, whole_file
from stgen._spatial.grid import apply_affine
from stgen._spatial.image import affine_to, element_of
from stgen._spatial.labels import finest_mask, outlines
from stgen._spatial.section import annotated_region, check_sdata, shared_system
from stgen.io._tables import as_frame

__all__ = ["write_geojson"]

logger = logging.getLogger("stgen")

QUARTER_SIDES = 8  # of a circle, per quarter
DECIMALS = 3  # of coordinates


@check_types
def write_geojson(
    sdata: SpatialData,
    key: str,
    path: str | os.PathLike,
    *,
    image_key: str | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    classification: str | None = None,
    object_type: Literal["annotation", "cell", "detection"] = "detection",
    coordinate_system: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write outlines with their expression as GeoJSON, in the form that QuPath imports.

    Parameters
    ----------
    sdata
        Object with the outlines.
    key
        Table whose rows to write, with the outlines that it annotates, such as :func:`stgen.tl.aggregate_cells` makes;
        or shapes, or a mask, such as :func:`stgen.pp.segment_nuclei` makes, for the outlines alone.
    path
        File to write; its name ends in ``.geojson`` or ``.json``.
    image_key
        Image in whose pixels, of its finest level, the coordinates are: QuPath needs those of the image that is open.
        None: the coordinates are those of the coordinate system.
    genes
        Genes of the table that become measurements, in this order; None for all.
    layer
        Layer of the table to take; ``X`` by default.
    classification
        Column of the table's ``obs`` that becomes the class of each object, such as its cell type.
    object_type
        What QuPath takes the objects for.
    coordinate_system
        The one in which outlines and image meet, or in which to write; None: a micrometer one if there is one, else
        "global", else the only one.
    overwrite
        Whether a file of this name may be replaced.

    Returns
    -------
    The path. The file is a FeatureCollection; a feature has a polygon (circles have 32 sides; of masks, along the
    sides of pixels), an ``id``, and ``properties``: ``objectType``, ``name``, ``measurements`` (genes and the numeric
    columns of ``obs``; what is not finite is left out) and ``classification``.

    Raises
    ------
    KeyError
        If an element, a gene, a layer or a column does not exist.
    TypeError
        If ``key`` is an image or points.
    ValueError
        If a table annotates nothing, outlines and image share no coordinate system, the name has another ending, or the
        file exists.
    FileNotFoundError
        If the folder does not exist.

    Examples
    --------
    >>> import geopandas
    >>> from stgen import datasets, io, pp, tl
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1"], bin_um=5)
    >>> tl.aggregate_cells(sdata, map_key="counts", shapes_key="cells")
    >>> path = io.write_geojson(sdata, "counts_cells", "cells.geojson", image_key="he")
    >>> len(geopandas.read_file(path)) == sdata["counts_cells"].n_obs
    True
    """
    check_sdata(sdata)
    region, names, frame = _measured(sdata, key, genes, layer, classification)
    keys = [region]
    if image_key is not None:
        keys.append(only_key(sdata.images, image_key, argument="image_key", what="image"))
    system = shared_system(sdata, keys, coordinate_system)
    matrix = affine_to(element_of(sdata, region), system)[0]
    if image_key is not None:
        matrix = np.linalg.inv(affine_to(sdata.images[image_key], system)[0]) @ matrix
    path = checked_path(path, (".geojson", ".json"), overwrite=overwrite)

    of_element, polygons = _polygons(sdata, region)
    if names is None:
        names = of_element
    position = pd.Index(of_element).get_indexer(names)
    if (position < 0).any():
        raise ValueError(f"{region!r} has no outlines of {listed(names[position < 0])}, which are rows of {key!r}.")
    moved = shapely.transform(polygons[position], lambda xy: np.round(apply_affine(matrix, xy), DECIMALS))
    classes = None if classification is None else sdata.tables[key].obs[classification]
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [\n')
        for i, feature in enumerate(_features(key, names, moved, frame, classes, object_type)):
            file.write((",\n" if i else "") + json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")
    logger.info("%d outlines of %r: %s.", len(names), key, path)
    return path


def _measured(
    sdata: SpatialData, key: str, genes: Sequence[str] | None, layer: str | None, classification: str | None
) -> tuple[str, np.ndarray | None, pd.DataFrame | None]:
    """The element with the outlines, and of a table the instance and the numbers of each row."""
    if key in sdata.tables:
        table = sdata.tables[key]
        genes = genes_of(genes, table.var_names, f"the table {key!r}")
        for name, container, what in ((layer, table.layers, "layer"), (classification, table.obs, "column of obs")):
            if name is not None and name not in container:
                raise KeyError(f"There is no {what} {name!r} in the table {key!r}; found {listed(container, 20)}.")
        region, instances = annotated_region(sdata, table, key, None)
        frame = as_frame(table, genes, layer).select_dtypes("number")
        return region, instances, frame.drop(columns=table.uns["spatialdata_attrs"]["instance_key"], errors="ignore")
    if key not in sdata:
        named = [name for kind, name, _ in sdata.gen_elements() if kind in ("tables", "shapes", "labels")]
        raise KeyError(f"There is no element {key!r}; tables, shapes and masks are {listed(named, 20)}.")
    if key not in sdata.shapes and key not in sdata.labels:
        raise TypeError(f"{key!r} is neither a table, nor shapes, nor a mask in sdata.labels: it has no outlines.")
    options = {"genes": genes, "layer": layer, "classification": classification}
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only for a table, and {key!r} is outlines alone; name its table.")
    return key, None, None


def _polygons(sdata: SpatialData, region: str) -> tuple[np.ndarray, np.ndarray]:
    """Name or number, and polygon, of each object of an element, in its own coordinates."""
    if region in sdata.labels:
        return outlines(finest_mask(sdata.labels[region], region))
    shapes: GeoDataFrame = sdata.shapes[region]
    geometry = shapes.geometry.to_numpy()
    if "radius" in shapes.columns:
        geometry = shapely.buffer(geometry, shapes["radius"].to_numpy(), quad_segs=QUARTER_SIDES)
    return shapes.index.to_numpy(), geometry


def _features(
    key: str,
    names: np.ndarray,
    polygons: np.ndarray,
    frame: pd.DataFrame | None,
    classes: pd.Series | None,
    object_type: str,
) -> Iterator[dict[str, Any]]:
    """A feature for each object."""
    columns = [] if frame is None else [str(name) for name in frame]
    values = np.empty((len(names), 0)) if frame is None else frame.to_numpy(np.float64)
    for i, (name, polygon, numbers) in enumerate(zip(names, polygons, values, strict=True)):
        properties: dict[str, Any] = {"objectType": object_type, "name": str(name)}
        if columns:
            known = np.isfinite(numbers)
            properties["measurements"] = {
                column: float(f"{value:.7g}")
                for column, value, there in zip(columns, numbers, known, strict=True)
                if there
            }
        if classes is not None and not pd.isna(classes.iloc[i]):
            properties["classification"] = {"name": str(classes.iloc[i])}
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{key}/{name}")),  # the same in every export
            "geometry": shapely.geometry.mapping(polygon),
            "properties": properties,
        }
