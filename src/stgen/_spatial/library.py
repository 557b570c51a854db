"""What an AnnData in the convention of scanpy and squidpy says of itself: its library, its images, its coordinates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import cKDTree
from xarray import DataArray

from stgen._checks import listed, only_key

__all__ = ["Library", "as_xy", "coordinates_of", "library_of"]

logger = logging.getLogger("stgen")

COORDINATES = (
    ("x", "y"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("imagecol", "imagerow"),
    ("x_centroid", "y_centroid"),
    ("x_location", "y_location"),
    ("center_x", "center_y"),
    ("pixel_x", "pixel_y"),
    ("spatial_x", "spatial_y"),
)
"""Names under which tables hold x and y, in lower case."""

SAMPLES = ("sample", "sample_id", "sample_name", "batch", "section", "section_id", "slide", "slide_id", "donor",
           "donor_id", "patient", "patient_id", "orig.ident", "library", "dataset")  # fmt: skip
"""Columns of ``obs`` that often name the sample, in lower case."""

FULL = ("fullres", "full")  # images that are the full-resolution one, without a scale factor of their own


@dataclass(frozen=True)
class Library:
    """One entry of ``uns["spatial"]``."""

    name: str | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def diameter(self) -> float | None:
        """Of the spots, in full-resolution pixels; None where it is not known."""
        return self._known("spot_diameter_fullres")

    @property
    def mpp(self) -> float | None:
        """µm per full-resolution pixel; None where it is not known."""
        return self._known("microns_per_pixel")

    @property
    def scales(self) -> dict[str, float]:
        """Pixels of each image per full-resolution pixel, as far as they are numbers."""
        keys = {key: str(key).removeprefix("tissue_").removesuffix("_scalef") for key in self.factors}
        found = {name: _number(self.factors[key]) for key, name in keys.items() if str(key).endswith("_scalef")}
        return {name: factor for name, factor in found.items() if factor is not None}

    def _known(self, key: str) -> float | None:
        """A factor that may be missing; one that is no positive number is as good as that."""
        if self.factors.get(key) is None:
            return None
        number = _number(self.factors[key])
        if number is None:
            logger.warning(
                'uns["spatial"][%r]["scalefactors"][%r] is %r, which is no positive number: taken as not known.',
                self.name, key, self.factors[key],
            )  # fmt: skip
        return number

    def scale(self, key: str) -> float:
        """Pixels of an image per full-resolution pixel.

        Raises
        ------
        KeyError
            If it is not stated.
        ValueError
            If it is no positive number, or the sizes of two images contradict their factors.
        """
        name = f"tissue_{key}_scalef"
        if self.factors.get(name) is None:
            if key in FULL:
                return 1.0
            raise KeyError(
                f'uns["spatial"][library]["scalefactors"] has no "{name}" (found {listed(self.factors)}); set '
                "it to image pixels per full-resolution pixel (1 if the image is the full-resolution one)."
            )
        factor = _number(self.factors[name])
        if factor is None:
            raise ValueError(
                f'uns["spatial"][{self.name!r}]["scalefactors"]["{name}"] must be a positive number, found '
                f"{self.factors[name]!r}; set it to image pixels per full-resolution pixel."
            )
        self._check_sizes(key, factor)
        return factor

    def _check_sizes(self, key: str, factor: float) -> None:
        """Refuse an image that another one of the library shows to be cropped, or of another resolution than stated."""
        scales = self.scales
        for other in self.images:
            if other == key or scales.get(other) is None:
                continue
            shapes = [np.shape(self.images[name])[:2] for name in (key, other)]
            if any(len(shape) < 2 for shape in shapes):
                continue
            (here, there), (own, its) = np.array(shapes, float), (factor, scales[other])
            apart = np.abs(here / own - there / its)
            allowed = 0.02 * np.maximum(here / own, there / its) + 2 / own + 2 / its
            if (apart > allowed).any():
                raise ValueError(
                    f"The images {key!r} and {other!r} do not show the same area: by their scale factors, {own:.6g} "
                    f"and {its:.6g}, {key!r} covers {here[1] / own:.0f} x {here[0] / own:.0f} full-resolution pixels "
                    f"and {other!r} {there[1] / its:.0f} x {there[0] / its:.0f}. One of them was cropped or resized. "
                    "Correct its "
                    '"tissue_<image>_scalef", put the whole image back, or remove the other one: del '
                    'adata.uns["spatial"]'
                    f"[{self.name!r}]['images'][{other!r}]."
                )

    def image(self, image_key: str | None) -> tuple[str, DataArray]:
        """An image ``(y, x, c)``, the one named ``"hires"`` unless another is asked for, and its name.

        Raises
        ------
        KeyError
            If there is none.
        ValueError
            If it holds no pixels, or not in this order.
        """
        if not self.images:
            raise KeyError(
                'There is no image: uns["spatial"][library]["images"] is missing or empty. Read the section with '
                "squidpy.read.visium, or pass a SpatialData object and image_key=."
            )
        key = image_key or ("hires" if "hires" in self.images else None)
        key = only_key(self.images, key, argument="image_key", what="image")
        found = self.images[key]
        if isinstance(found, DataArray) and {"y", "x"} <= set(found.dims):
            found = found.transpose("y", "x", ...)
        array = found if hasattr(found, "dask") and not isinstance(found, DataArray) else np.asarray(found)
        array = array[..., None] if array.ndim == 2 else array
        of = f'uns["spatial"][{self.name!r}]["images"][{key!r}]'
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise ValueError(
                f"The image {key!r} holds no pixels but {type(found).__name__}; read it first: {of} = "
                "skimage.io.imread(<path>)."
            )
        if array.ndim == 3 and array.shape[2] > 4 and array.shape[0] in (1, 3, 4):
            raise ValueError(
                f"The image {key!r} must have the shape (y, x, channels), found {array.shape}, whose channels come "
                f"first. Move them: {of} = np.moveaxis({of}, 0, -1)."
            )
        if array.ndim != 3:
            raise ValueError(f"The image {key!r} must have the shape (y, x, channels), found {array.shape}.")
        n = array.shape[2]
        names = list("rgba")[:n] if n in (3, 4) else [str(i) for i in range(n)]
        return key, DataArray(array, dims=("y", "x", "c"), coords={"c": names})

    def check_coordinates(self, xy: np.ndarray, mpp: float | None) -> None:
        """Refuse coordinates in pixels of one of the images, where a regular grid of spots of a stated size tells.

        Raises
        ------
        ValueError
            If spots of the stated size would lie on each other, and would not in the pixels of an image.
        """
        stated = self.diameter
        pitch = _regular_pitch(xy)
        if pitch is None or (stated is None and mpp is None):
            return
        # how many pitches a spot is wide, or 100 µm are: at most about 1 where spots lie side by side, and where Visium is
        size = stated / pitch if stated is not None else 65.0 / (pitch * float(mpp or 1))
        for name, scale in self.scales.items():
            if scale < 0.95 and size > 1.5 and 0.4 < size * scale < 1.1:
                raise ValueError(
                    f'obsm["spatial"] is in pixels of the image {name!r}, not in full-resolution pixels: the '
                    f"locations are {pitch:.4g} apart and {size * pitch:.4g} wide. Divide them by the scale factor: "
                    f'adata.obsm["spatial"] = adata.obsm["spatial"] / {scale:.6g}.'
                )


def _number(value: Any) -> float | None:
    """A positive finite number, however a file carries it: text, a NumPy scalar, an array of one; None if it is none."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        number = float(np.asarray(value).reshape(-1)[0]) if np.size(value) == 1 else float("nan")
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None


def _regular_pitch(xy: np.ndarray) -> float | None:
    """Distance of neighbors on a regular grid; None where the locations are on none."""
    if len(xy) < 7:
        return None
    distance = cKDTree(xy).query(xy, k=2)[0][:, 1]
    pitch = float(np.median(distance))
    regular = pitch > 0 and (np.abs(distance - pitch) < 0.15 * pitch).mean() > 0.8
    return pitch if regular else None


# -- the library ------------------------------------------------------------------------------------------------------
def _is_library(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(entry.get(key), Mapping) for key in ("images", "scalefactors"))


def library_of(table: AnnData) -> Library:
    """The only library of ``uns["spatial"]``; an empty one if there is none.

    Keys that hold no library, such as ``"is_single"`` of CELLxGENE, are no libraries.

    Raises
    ------
    ValueError
        If there are several, or several samples that share the one that is there.
    """
    spatial = table.uns.get("spatial")
    if not isinstance(spatial, Mapping):
        return Library()
    if _is_library(spatial) and not any(_is_library(spatial[key]) for key in spatial):
        spatial = {"library": spatial}  # without a name
    libraries = {str(name): entry for name, entry in spatial.items() if _is_library(entry)}
    if len(libraries) > 1:
        raise ValueError(
            f'uns["spatial"] holds several libraries: {listed(libraries)}. Pass one section at a time, several as a '
            'mapping (stgen.tl.fit): {name: adata[adata.obs["library_id"] == name].copy() for name in libraries}, with '
            'only its own entry in uns["spatial"] of each.'
        )
    if not libraries:
        return Library()
    name, entry = next(iter(libraries.items()))
    _check_one_sample(table, name)
    parts = [entry.get(key) for key in ("images", "scalefactors")]
    images, factors = (part if isinstance(part, Mapping) else {} for part in parts)
    return Library(name, {str(k): v for k, v in images.items() if v is not None}, dict(factors))


def _check_one_sample(table: AnnData, library: str) -> None:
    """Refuse a table of several samples with the image of one."""
    columns = {str(column).lower(): column for column in table.obs}
    ids = columns.get("library_id")
    if ids is not None:
        found = [str(value) for value in pd.unique(table.obs[ids].dropna())]
        if len(found) > 1:
            raise _several(ids, found, library)
        if found and found[0] != library and "library" != library:
            logger.warning(
                'obs[%r] is %r and the only library of uns["spatial"] %r: make sure that its images are those of this '
                'section.',
                ids, found[0], library,
            )  # fmt: skip
    for name in SAMPLES:
        if name not in columns or "spatial" not in table.obsm:
            continue
        values = table.obs[columns[name]]
        groups = [str(value) for value in pd.unique(values.dropna())]
        if 1 < len(groups) <= 1000 and _on_each_other(coordinates_of(table), values.astype(str).to_numpy()):
            raise _several(columns[name], groups, library)


def _several(column: str, found: list[str], library: str) -> ValueError:
    return ValueError(
        f'obs[{column!r}] names {len(found)} samples ({listed(found)}), and uns["spatial"] has one library, '
        f"{library!r}: its image "
        f"would be taken for all of them. Split the table, and give each part its own image: {{name: "
        f"adata[adata.obs[{column!r}] == "
        "name].copy() for name in "
        f'{found[:3]}}}, and in each part adata.uns["spatial"] = {{name: <the library of that sample>}}.'
    )


def _on_each_other(xy: np.ndarray, group: np.ndarray) -> bool:
    """Whether locations of different groups lie closer together than those of one group, as no parts of one section do."""
    own, other = np.full(len(xy), np.inf), np.full(len(xy), np.inf)
    for name in pd.unique(group):
        inside = group == name
        if inside.sum() > 1:
            own[inside] = cKDTree(xy[inside]).query(xy[inside], k=2)[0][:, 1]
        if not inside.all():
            other[inside] = cKDTree(xy[~inside]).query(xy[inside])[0]
    known = np.isfinite(own)
    # of one grid, cut in whatever way, none is closer than the next of its own; of two samples, nearly all are
    return bool(known.any() and (other[known] < 0.95 * own[known]).mean() > 0.25)


# -- coordinates ------------------------------------------------------------------------------------------------------
def coordinates_of(table: AnnData) -> np.ndarray:
    """``obsm["spatial"]`` as x, y ``(n, 2)`` in full-resolution pixels; columns of a DataFrame are taken by their names.

    Raises
    ------
    KeyError
        If there are none.
    ValueError
        If they are no finite numbers, or it is not known which column is x.
    """
    if "spatial" not in table.obsm:
        by_name = _columns_of(table.obs)
        advice = "x, y in full-resolution pixels"
        if by_name is not None:
            advice = f"adata.obs[{by_name}].to_numpy()"
        elif "X_spatial" in table.obsm:
            advice = 'adata.obsm["X_spatial"]'
        raise KeyError(
            'There are no spatial coordinates: obsm["spatial"] is missing (obsm has '
            f'{listed(table.obsm)}). Set adata.obsm["spatial"] to {advice}.'
        )
    values = table.obsm["spatial"]
    if isinstance(values, pd.DataFrame):
        names = _columns_of(values)
        if names is None and not all(str(column).isdigit() for column in values.columns):
            raise ValueError(
                f'obsm["spatial"] is a table with the columns {listed(values.columns)}, and it is not known which of '
                "them are "
                'x (column) and y (row) in full-resolution pixels. Name them: adata.obsm["spatial"] = '
                'adata.obsm["spatial"]'
                "[[<x>, <y>]].to_numpy()."
            )
        values = values if names is None else values[names]
    return as_xy(values, 'obsm["spatial"]')


def _columns_of(frame: pd.DataFrame) -> list[str] | None:
    """The columns that hold x and y by their names."""
    columns = {str(column).lower(): column for column in frame.columns}
    found = [[columns[x], columns[y]] for x, y in COORDINATES if x in columns and y in columns]
    return found[0] if found else None


def as_xy(values: Any, where: str) -> np.ndarray:
    """Finite coordinates ``(n, 2)``, the first two columns of what is given."""
    try:
        xy = np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must hold numbers as x, y; found {np.asarray(values).dtype} values.") from error
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ValueError(f"{where} must have the shape (n, 2) as x, y; found {xy.shape}.")
    xy = xy[:, :2]
    bad = ~np.isfinite(xy).all(1)
    if bad.any():
        raise ValueError(
            f"{where} has {int(bad.sum())} rows without finite coordinates (first: row {int(np.argmax(bad))}); drop "
            "them."
        )
    return xy
