"""A coordinate system in micrometers for all elements of a section."""

from __future__ import annotations

import logging

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import Affine, Sequence, get_transformation, set_transformation

from stgen._checks import check_positive, check_types, listed
from stgen._spatial.image import affine_to, is_micrometers
from stgen._spatial.section import check_sdata

__all__ = ["name_micrometers"]

logger = logging.getLogger("stgen")


@check_types
def name_micrometers(
    sdata: SpatialData,
    *,
    points_key: str | None = None,
    mpp: float | None = None,
    coordinate_system: str = "global",
    key_added: str = "um",
) -> None:
    """Add a coordinate system in micrometers to all elements, from one that they share.

    Every function then knows the µm per pixel of every element, and distances are in µm in the whole section. Sections
    of Xenium and MERSCOPE need it once: their molecules are stored in µm, but the readers' "global" coordinates are
    pixels.

    Parameters
    ----------
    sdata
        Object whose elements share ``coordinate_system``.
    points_key
        Molecules that are stored in µm: their transformation to ``coordinate_system`` tells the scale, and where 0 is.
    mpp
        Instead, µm per unit of ``coordinate_system``: µm per pixel where it is in pixels of an image.
    coordinate_system
        What the elements share. Those that are not in it are left alone.
    key_added
        Name of the new coordinate system; it must be one that says micrometers, such as ``"um"``, ``"µm"`` or
        ``"microns"``.

    Returns
    -------
    None. Writes a transformation to ``key_added`` into every image, mask, points and shapes element that has one to
    ``coordinate_system``. In memory only: ``sdata.write_transformations()`` updates a store.

    Raises
    ------
    KeyError
        If the points do not exist, or no element (or not the points) is in ``coordinate_system``.
    ValueError
        If not exactly one of ``points_key`` and ``mpp`` is given, ``mpp`` is not a positive number, a transformation
        stretches x and y differently, ``key_added`` does not say micrometers, or an element has a transformation of
        that name.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=300)
    >>> sdata.rename_coordinate_systems({"um": "pixels"})  # as if the scale were not known
    >>> stgen.pp.name_micrometers(sdata, points_key="transcripts", coordinate_system="pixels")
    >>> "um" in sdata.coordinate_systems
    True
    """
    check_sdata(sdata)
    if (points_key is None) == (mpp is None):
        raise ValueError(
            f"Pass either points_key=<molecules that are stored in µm> or mpp=<µm per unit of {coordinate_system!r}>; "
            f"found points_key={points_key!r} and mpp={mpp!r}."
        )
    if not is_micrometers(key_added):
        raise ValueError(
            f"`key_added`: {key_added!r} does not say that it is in micrometers; take a name such as 'um'."
        )
    elements = {name: element for kind, name, element in sdata.gen_elements() if kind != "tables"}
    systems = {name: get_transformation(element, get_all=True) for name, element in elements.items()}
    shared = [name for name in elements if coordinate_system in systems[name]]
    if not shared:
        raise KeyError(
            f"no element is in the coordinate system {coordinate_system!r}; found {listed(sdata.coordinate_systems)}"
        )
    taken = [name for name in shared if key_added in systems[name]]
    if taken:
        raise ValueError(
            f"{listed(taken)} have a transformation to {key_added!r} already; pass another key_added=, or remove it: "
            "spatialdata.transformations.remove_transformation(element, key_added)."
        )
    if points_key is None:
        um_per_unit = check_positive("mpp", mpp)
        to_um = np.diag([um_per_unit, um_per_unit, 1.0])
    else:
        if points_key not in sdata.points:
            raise KeyError(f"`points_key`: no points {points_key!r}; sdata.points has {listed(sdata.points)}")
        if points_key not in shared:
            raise KeyError(
                f"the points {points_key!r} are not in the coordinate system {coordinate_system!r}; they are in "
                f"{listed(systems[points_key])}"
            )
        matrix, scale = affine_to(sdata.points[points_key], coordinate_system)
        um_per_unit, to_um = 1 / scale, np.linalg.inv(matrix)
    last = Affine(to_um, input_axes=("x", "y"), output_axes=("x", "y"))
    for name in shared:
        set_transformation(elements[name], Sequence([systems[name][coordinate_system], last]), key_added)
    logger.info(
        "A unit of %r is %.4g µm: added the coordinate system %r to %s.",
        coordinate_system,
        um_per_unit,
        key_added,
        listed(shared),
    )
