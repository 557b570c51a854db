"""From the scanpy and squidpy convention for Visium to SpatialData."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, Identity, Scale
from spatialdata.transformations import Sequence as Chain
from xarray import DataArray

from stgen._checks import check_positive, check_types, listed, only_key
from stgen._spatial.library import library_of
from stgen._spatial.records import write_circles, write_table
from stgen._spatial.section import Section, get_section

__all__ = ["to_spatialdata"]

logger = logging.getLogger("stgen")


@check_types
def to_spatialdata(
    adata: AnnData,
    *,
    image_keys: str | Sequence[str] | None = None,
    mpp: float | None = None,
    spot_um: float | None = None,
    table_key: str = "table",
    shapes_key: str = "spots",
) -> SpatialData:
    """Make a SpatialData object of a section that scanpy or squidpy has read.

    Image, spots and table are then elements that share a coordinate system in full-resolution pixels and one in
    micrometers, which is what :func:`stgen.tl.superresolve` and spatialdata-plot need.

    Parameters
    ----------
    adata
        One section in the convention of ``squidpy.read.visium`` and ``scanpy.read_visium``: ``obsm["spatial"]`` in
        full-resolution pixels, and ``uns["spatial"][library]`` with ``"images"`` and ``"scalefactors"``. It is not
        changed.
    image_keys
        Which of the images to take; by default the finest of them. Without images, spots and table are taken alone.
    mpp
        µm per full-resolution pixel; by default what the object says, or what the 100 µm pitch of Visium spots tells.
    spot_um
        Diameter of the spots in µm; by default from ``"spot_diameter_fullres"``. Visium's 65 µm, as Space Ranger states
        them, are the 55 µm in which spots capture.
    table_key, shapes_key
        Names of the table and of the spots. Images keep theirs, such as ``"hires"``.

    Returns
    -------
    The object, with

    - ``images[key]``: each image ``(c, y, x)``, unchanged
    - ``shapes[shapes_key]``: a circle per row, in its order, of the diameter of the spots
    - ``tables[table_key]``: a copy of ``adata`` that annotates the circles; without ``uns["spatial"]``, whose images
      would be stored twice
    - the coordinate systems ``"global"``, in full-resolution pixels, and ``"um"``, for all of them

    Raises
    ------
    KeyError
        If there are no coordinates, or no image of this name.
    TypeError
        If ``adata`` is no AnnData.
    ValueError
        If there are several libraries, the µm per pixel or the diameter of the spots are not known, or two names are
        one.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> from stgen import pp
    >>> row, column = np.mgrid[:8, :8].reshape(2, -1)
    >>> adata = AnnData(np.ones((64, 3), np.float32))
    >>> adata.obsm["spatial"] = np.column_stack([200 * column + 100 * (row % 2), 173.2 * row]) + 150
    >>> factors = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 130.0}
    >>> images = {"hires": np.full((180, 200, 3), 255, np.uint8)}
    >>> adata.uns["spatial"] = {"library": {"images": images, "scalefactors": factors}}
    >>> sdata = pp.to_spatialdata(adata)
    >>> sorted(name for _, name, _ in sdata.gen_elements())
    ['hires', 'spots', 'table']
    >>> round(2 * float(sdata["spots"].radius[0]))  # full-resolution pixels of 0.5 µm: 55 µm
    110
    """
    for name, value in (("mpp", mpp), ("spot_um", spot_um)):
        if value is not None:
            check_positive(name, value)
    section = get_section(adata, mpp=mpp)
    images = library_of(adata).images
    keys = _image_keys(images, image_keys)
    names = [*keys, table_key, shapes_key]
    if len({str(name).lower() for name in names}) < len(names):
        raise ValueError(
            f"images, spots and table need names of their own; found {listed(names)}. Pass another table_key= or "
            "shapes_key=."
        )
    sections = {key: get_section(adata, image_key=key, mpp=mpp) for key in keys}  # with their checks
    mpp, diameter = _sizes(section, spot_um)

    um = {"global": Identity(), "um": Scale([mpp, mpp], axes=("x", "y"))}
    sdata = SpatialData()
    for key, of_image in sections.items():
        sdata.images[key] = _image(images[key], float(of_image.mpp or mpp) / mpp, um)
    write_circles(sdata, shapes_key, section.xy_px, radius=diameter / 2, transformations=um)
    table = adata.copy()
    table.uns.pop("spatial", None)
    taken = set(table.obs)
    region_key, instance_key = (_free(name, taken) for name in ("region", "instance_id"))
    write_table(sdata, table_key, table, region=shapes_key, region_key=region_key, instance_key=instance_key)
    logger.info(
        "%d spots of %.4g µm at %.4g µm per full-resolution pixel; images: %s. sdata.write(path) saves the object.",
        table.n_obs, diameter * mpp, mpp, listed(keys),
    )  # fmt: skip
    return sdata


def _image_keys(images: Mapping[str, np.ndarray], wanted: str | Sequence[str] | None) -> list[str]:
    """The images that are asked for, or the finest."""
    if wanted is None:
        return [max(images, key=lambda key: np.asarray(images[key]).size)] if images else []
    return [only_key(images, key, argument="image_keys", what="image") for key in _as_list(wanted)]


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _sizes(section: Section, spot_um: float | None) -> tuple[float, float]:
    """µm per full-resolution pixel, and the diameter of the spots in such pixels."""
    if section.mpp is None:
        raise ValueError(
            'The µm per pixel are not known: the scale factors have no "microns_per_pixel", and the locations are not '
            "on a Visium grid of 100 µm pitch. Pass mpp=<µm per full-resolution pixel>."
        )
    diameter = section.spot_diameter_um if spot_um is None else spot_um
    if diameter is None:
        raise ValueError(
            'The diameter of the spots is not known: uns["spatial"][library]["scalefactors"] has no '
            '"spot_diameter_fullres". Pass spot_um=<diameter in µm>, 55 for Visium.'
        )
    return float(section.mpp), float(diameter) / float(section.mpp)


def _image(array: np.ndarray, px: float, systems: Mapping[str, BaseTransformation]) -> DataArray:
    """An image ``(y, x)`` or ``(y, x, c)`` as an element; its pixels are ``px`` full-resolution ones wide."""
    array = np.asarray(array)
    array = array[..., None] if array.ndim == 2 else array
    names = {1: ["gray"], 3: ["r", "g", "b"], 4: ["r", "g", "b", "a"]}.get(array.shape[2])
    wider = Scale([px, px], axes=("x", "y"))
    transformations = {name: Chain([wider, to_system]) for name, to_system in systems.items()}
    return Image2DModel.parse(
        array.transpose(2, 0, 1), dims=("c", "y", "x"), c_coords=names, transformations=transformations
    )


def _free(name: str, taken: set[str]) -> str:
    """``name``, with ``spot_`` before it until no column has it."""
    while name in taken:
        name = f"spot_{name}"
    return name
