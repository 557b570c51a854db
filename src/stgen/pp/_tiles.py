"""Locations on tissue where nothing was measured."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.transformations import Affine, get_transformation

from stgen._checks import check_positive, check_types
from stgen._spatial.image import Histology, image_of
from stgen._spatial.records import check_new_key, made_by, provenance, record, shallow_copy, write_circles, write_table
from stgen._spatial.section import find_image
from stgen._spatial.tissue import tissue_mask

__all__ = ["tile_grid"]

logger = logging.getLogger("stgen")

MOST_TILES = 1e7
MOST_MASK_PX = 5e7  # of the mask of the tissue


@check_types
def tile_grid(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    spacing_um: float = 100.0,
    diameter_um: float = 55.0,
    min_tissue: float = 0.5,
    mpp: float | None = None,
    key_added: str = "tiles",
    table_key_added: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | None:
    """Lay a hexagonal grid of locations over the tissue of an image.

    For slides that have histology only: the tiles take the place of spots in :func:`stgen.pp.embed` and
    :func:`stgen.tl.predict_expression`.

    Parameters
    ----------
    sdata
        Object with the image.
    image_key
        Image to cover; None if there is one.
    spacing_um
        Distance between neighboring tiles in µm.
    diameter_um
        Diameter of a tile in µm, that of the spots the model was trained on.
    min_tissue
        Least share of a tile's surroundings (one spacing wide) that is tissue.
    mpp
        µm per pixel of the image's finest level; None takes it from a micrometer coordinate system.
    key_added
        Name of the shapes.
    table_key_added
        Name of their table; default ``f"{key_added}_table"``.
    overwrite
        Whether existing elements may be replaced.
    copy
        Whether to return a new object and leave ``sdata`` alone.

    Returns
    -------
    None, or the copy. Writes:

    - ``sdata.shapes[key_added]``: circles in pixels of the image, with all transformations of the image.
    - ``sdata.tables[table_key_added]``: a table of the tiles, without genes; ``obsm["spatial"]`` is x, y in µm from the
      upper left corner of the image, ``obs["tissue"]`` the share of tissue.
    - ``sdata.attrs["stgen"][key_added]``: ``"image_key"``, ``"spacing_um"``, ``"diameter_um"``, ``"min_tissue"``,
      ``"image_mpp"`` (µm per pixel of the image), ``"n_tiles"``, ``"function"``, ``"version"``;
      ``"image_full_scale"``, the value that was read as 1, where the type of the image does not say it, and
      ``"image_alpha"`` where it has opacity.

    Raises
    ------
    KeyError, ValueError
        If there is no such image, its µm per pixel are not known, it shows nothing, a number is out of its range, tiles
        would be more than memory holds, none lies on tissue, or a key exists.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.tile_grid(sdata, spacing_um=50)
    >>> stgen.pp.embed(sdata, table_key="tiles_table")
    """
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Expected a SpatialData object, found {type(sdata).__name__}.")
    check_positive("spacing_um", spacing_um)
    check_positive("diameter_um", diameter_um)
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"`min_tissue` must lie in [0, 1], found {min_tissue!r}.")
    image_key = find_image(sdata, image_key)
    table_key_added = f"{key_added}_table" if table_key_added is None else table_key_added
    ours = made_by(sdata, key_added, "pp.tile_grid")
    check_new_key(sdata.shapes, key_added, overwrite=overwrite, what="sdata.shapes", ours=ours)
    ours = ours and table_key_added in sdata.tables and sdata.tables[table_key_added].n_vars == 0
    check_new_key(sdata.tables, table_key_added, overwrite=overwrite, what="sdata.tables", ours=ours)
    image = image_of(sdata, image_key, mpp=mpp)
    _check_number(image, spacing_um)

    xy_um = _hexagonal(image.width * image.mpp, image.height * image.mpp, spacing_um)
    share = _tissue_share(image, xy_um / image.mpp, spacing_um)
    kept = share >= min_tissue
    if not kept.any():
        raise ValueError(
            f"No tile lies on tissue: of {len(xy_um)} tiles, the highest share of tissue is "
            f"{share.max(initial=0):.2f}. Lower min_tissue or spacing_um, or check mpp."
        )
    xy_um, share = xy_um[kept], share[kept]
    if copy:
        sdata = shallow_copy(sdata)
    if overwrite and table_key_added in sdata.tables:
        del sdata.tables[table_key_added]
    write_circles(
        sdata,
        key_added,
        xy_um / image.mpp,
        radius=diameter_um / 2 / image.mpp,
        transformations=_planar(get_transformation(sdata.images[image_key], get_all=True)),
        overwrite=overwrite,
    )
    table = AnnData(
        sparse.csr_matrix((len(xy_um), 0), dtype=np.float32),
        obs=pd.DataFrame({"tissue": share.astype(np.float32)}, index=[f"{key_added}_{i}" for i in range(len(xy_um))]),
    )
    table.obsm["spatial"] = xy_um
    write_table(sdata, table_key_added, table, region=key_added, overwrite=overwrite)
    entry = provenance(
        "pp.tile_grid",
        image_key=image_key,
        spacing_um=spacing_um,
        diameter_um=diameter_um,
        min_tissue=min_tissue,
        image_mpp=image.mpp,
        **image.record(),
        n_tiles=len(xy_um),
    )
    record(sdata, key_added, entry)
    logger.info("Laid %d tiles: shapes[%r] and tables[%r].", len(xy_um), key_added, table_key_added)
    return sdata if copy else None


def _check_number(image: Histology, spacing_um: float) -> None:
    """Refuse a grid whose tiles, or the mask that they are chosen by, would not fit in memory."""
    width_um, height_um = image.width * image.mpp, image.height * image.mpp
    n_tiles = width_um * height_um / (spacing_um**2 * np.sqrt(0.75))
    if n_tiles > MOST_TILES:
        raise ValueError(
            f"Tiles {spacing_um:.4g} µm apart on an image of {width_um:.4g} x {height_um:.4g} µm would be "
            f"{n_tiles:.2g}, more than the {MOST_TILES:.2g} that can be held. Pass a larger spacing_um, or check "
            f"mpp={image.mpp:.4g}."
        )


def _planar(transformations: dict) -> dict:
    """The same transformations over x and y only, for shapes."""
    axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
    return {name: Affine(t.to_affine_matrix(**axes), **axes) for name, t in transformations.items()}


def _hexagonal(width: float, height: float, spacing: float) -> np.ndarray:
    """Centers (n, 2) of a hexagonal grid, half a spacing away from the border, in the middle of the rectangle."""
    row_step = spacing * np.sqrt(3) / 2
    n_rows = int((height - spacing) / row_step) + 1 if height >= spacing else 1
    n_columns = int((width - 1.5 * spacing) / spacing) + 1 if width >= 1.5 * spacing else 1
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    x = (column + 0.5 * (row % 2)) * spacing
    y = row * row_step
    center = np.array([width / 2, height / 2])
    return np.column_stack([x, y]) - [(x.min() + x.max()) / 2, (y.min() + y.max()) / 2] + center


def _tissue_share(image: Histology, xy_px: np.ndarray, spacing_um: float) -> np.ndarray:
    """Share of tissue within a square of one spacing around each center."""
    wanted = min(spacing_um / 4, image.mpp * max(image.width, image.height) / 64)
    least = image.mpp * max(1.0, np.sqrt(image.width * image.height / MOST_MASK_PX))
    mask, pixel = tissue_mask(image, mpp=max(least, wanted))
    total = np.pad(np.cumsum(np.cumsum(mask, 0, dtype=np.int64), 1), ((1, 0), (1, 0)))
    half = spacing_um / image.mpp / 2
    x0, y0 = (np.clip(np.floor((xy_px[:, i] - half) / pixel).astype(int), 0, mask.shape[1 - i] - 1) for i in (0, 1))
    x1, y1 = (np.clip(np.ceil((xy_px[:, i] + half) / pixel).astype(int), 1, mask.shape[1 - i]) for i in (0, 1))
    x1, y1 = np.maximum(x1, x0 + 1), np.maximum(y1, y0 + 1)
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0))
