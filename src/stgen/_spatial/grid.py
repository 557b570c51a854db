"""The grid of bins on which gene maps live, and images read on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates
from shapely import Polygon, box
from spatialdata import SpatialData
from spatialdata.models import PointsModel, ShapesModel, get_model
from spatialdata.transformations import BaseTransformation, Scale, Translation, get_transformation
from spatialdata.transformations import Sequence as Chain
from xarray import DataArray

from stgen._checks import check_positive, listed, only_key
from stgen._spatial.coordinates import choose_system, systems_of
from stgen._spatial.image import (
    Histology,
    affine_to,
    check_not_indexed,
    element_of,
    histology_of,
    image_levels,
    image_of,
    is_micrometers,
)
from stgen._spatial.kinds import check_gene_map
from stgen._spatial.platforms import spot_pitch
from stgen._spatial.section import Locations, annotated_region, centroids, locate, shared_system

__all__ = [
    "TOLERANCE",
    "Grid",
    "ImageWindow",
    "apply_affine",
    "corners_of",
    "get_map",
    "map_counts_checked",
    "scaled",
]

TOLERANCE = 1e-3  # bins by which grids that belong together may be apart


@dataclass(frozen=True)
class Grid:
    """Square bins over a section.

    Bin coordinates are those of the map as an image: bin (row i, column j) covers ``[j, j + 1) x [i, i + 1)`` as x, y.
    Arrays over the grid are ``(..., height, width)``, and a location is ``(y, x)``.
    """

    height: int
    width: int
    bin_um: float
    """Side of a bin in µm."""
    transformations: dict[str, BaseTransformation]
    """From bin coordinates to every coordinate system."""

    @classmethod
    def of_map(cls, sdata: SpatialData, map_key: str) -> Grid:
        """The grid of a map; ``bin_um`` from a micrometer system, else from the record of the map.

        Raises
        ------
        KeyError
            If there is no such image.
        ValueError
            If it is no map, or its µm per bin are not known.
        """
        element = get_map(sdata, map_key)
        transformations = get_transformation(element, get_all=True)
        bin_um = next((affine_to(element, name)[1] for name in transformations if is_micrometers(name)), None)
        if bin_um is None:
            bin_um = sdata.attrs.get("stgen", {}).get(map_key, {}).get("bin_um")
        if bin_um is None:
            raise ValueError(
                f"The µm per bin of the map {map_key!r} are not known: no coordinate system is named micrometers "
                f'({listed(transformations)}), and sdata.attrs["stgen"] has no record of it. Name a micrometer '
                f'coordinate system "um", or set sdata.attrs.setdefault("stgen", {{}})[{map_key!r}] = '
                '{"bin_um": <µm per bin>}.'
            )
        return cls(int(element.sizes["y"]), int(element.sizes["x"]), round(float(bin_um), 9), transformations)

    @classmethod
    def of_image(cls, sdata: SpatialData, image_key: str, *, bin_um: float, mpp: float | None = None) -> Grid:
        """Whole bins over an image, from its upper left corner.

        Raises
        ------
        KeyError
            If there is no such image.
        ValueError
            If the µm per pixel of the image are not known, or a bin is larger than the image.
        """
        only_key(sdata.images, image_key, argument="image_key", what="image")
        check_positive("bin_um", bin_um)
        return cls.over(
            image_of(sdata, image_key, mpp=mpp),
            image_key,
            get_transformation(sdata.images[image_key], get_all=True),
            bin_um=bin_um,
        )

    @classmethod
    def over(
        cls, image: Histology, image_key: str, transformations: dict[str, BaseTransformation], *, bin_um: float
    ) -> Grid:
        """As :meth:`of_image`, once the image is found."""
        height, width = (int(n * image.mpp / bin_um + TOLERANCE) for n in (image.height, image.width))
        if min(height, width) == 0:
            raise ValueError(
                f"Bins of {bin_um:g} µm are larger than the image {image_key!r}, which is "
                f"{image.width * image.mpp:.4g} x {image.height * image.mpp:.4g} µm. Pass a smaller bin_um, or check "
                "mpp."
            )
        return cls(height, width, float(bin_um), scaled(transformations, bin_um / image.mpp))

    @classmethod
    def of_spots(cls, sdata: SpatialData, table_key: str, *, bin_um: float, mpp: float | None = None) -> Grid:
        """Bins around the spots of a table, with a margin as wide as their pitch.

        Raises
        ------
        ValueError
            If the µm per unit of their coordinates are not known, or there are too few spots to know their pitch.
        """
        check_positive("bin_um", bin_um)
        region, _ = annotated_region(sdata, sdata.tables[table_key], table_key, None)
        return cls.around(locate(sdata, table_key, shared_system(sdata, [region])), table_key, bin_um=bin_um, mpp=mpp)

    @classmethod
    def around(cls, spots: Locations, table_key: str, *, bin_um: float, mpp: float | None = None) -> Grid:
        """As :meth:`of_spots`, once the spots are located."""
        um_per_unit = spots.um_per_unit() if mpp is None else mpp
        if um_per_unit is None:
            raise ValueError(
                f"The µm per unit of the locations of {table_key!r} are not known: no coordinate system is named "
                "micrometers, and they are not on a Visium grid of 100 µm pitch. Pass mpp=<µm per unit>."
            )
        unit, margin = bin_um / um_per_unit, spot_pitch(spots.xy)[0]
        if not np.isfinite(margin):
            raise ValueError(
                f"The pitch of the {len(spots.xy)} spots of {table_key!r} is not known: fewer than 7 lie in places of "
                "their own."
            )
        low, high = spots.xy.min(0) - margin, spots.xy.max(0) + margin
        width, height = np.ceil((high - low) / unit).astype(int)
        place = Chain([Scale([unit, unit], axes=("x", "y")), Translation(list(low), axes=("x", "y"))])
        return cls(int(height), int(width), float(bin_um), {spots.system: place})

    def refined(self, factor: int, shape: tuple[int, int] | None = None) -> Grid:
        """The same area in bins ``factor`` times finer; of ``shape``, where the last bins reach beyond what was measured."""
        height, width = (self.height * factor, self.width * factor) if shape is None else shape
        return Grid(height, width, self.bin_um / factor, scaled(self.transformations, 1 / factor))

    def shared_system(self, sdata: SpatialData, key: str, coordinate_system: str | None = None) -> str:
        """A coordinate system that the grid and an element share: a micrometer one, else "global", else the first.

        Raises
        ------
        KeyError
            If there is no such element, or ``coordinate_system`` is not shared.
        ValueError
            If they share none.
        """
        systems = {"the grid": list(self.transformations), repr(key): systems_of(_element(sdata, key))}
        return choose_system(systems, coordinate_system)

    def to_system(self, system: str) -> np.ndarray:
        """The 3 x 3 matrix over x, y from bin coordinates to a coordinate system."""
        return self.transformations[system].to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))

    def to_element(self, sdata: SpatialData, key: str, coordinate_system: str | None = None) -> np.ndarray:
        """The 3 x 3 matrix over x, y from bin coordinates to an element's own coordinates (pixels of an image)."""
        system = self.shared_system(sdata, key, coordinate_system)
        return np.linalg.inv(affine_to(element_of(sdata, key), system)[0]) @ self.to_system(system)

    def locate(self, sdata: SpatialData, element_key: str, coordinate_system: str | None = None) -> np.ndarray:
        """Points, or centroids of shapes, as y, x in bins: ``(n, 2)``, in the element's order."""
        system = self.shared_system(sdata, element_key, coordinate_system)
        if get_model(sdata[element_key]) not in (PointsModel, ShapesModel):
            raise TypeError(f"{element_key!r} is neither points nor shapes.")
        return self.from_system(centroids(sdata[element_key], system)[["x", "y"]].to_numpy(), system)

    def image_window(
        self, sdata: SpatialData, image_key: str, *, px_per_bin: int, coordinate_system: str | None = None
    ) -> ImageWindow:
        """A reader of an image on this grid, ``px_per_bin`` pixels along each side of a bin."""
        only_key(sdata.images, image_key, argument="image_key", what="image")
        if isinstance(px_per_bin, bool) or px_per_bin != int(px_per_bin) or px_per_bin < 1:
            raise ValueError(f"`px_per_bin` must be a whole number of at least 1, found {px_per_bin!r}.")
        matrix = self.to_element(sdata, image_key, coordinate_system)
        image = histology_of(sdata, image_key, mpp=1.0)  # everything here is in pixels of the image
        return ImageWindow(image, matrix, int(px_per_bin))

    def overlap(self, sdata: SpatialData, image_key: str, coordinate_system: str | None = None) -> float:
        """Share of the grid's area that an image covers."""
        only_key(sdata.images, image_key, argument="image_key", what="image")
        sizes = image_levels(sdata.images[image_key])[0].sizes
        return self.covered_by(self.to_element(sdata, image_key, coordinate_system), sizes["x"], sizes["y"])

    def covered_by(self, to_pixels: np.ndarray, width: float, height: float) -> float:
        """Share of the grid's area that an image of a size in pixels covers; ``to_pixels`` is the matrix from bins to these."""
        image = Polygon(apply_affine(np.linalg.inv(to_pixels), corners_of(width, height)))
        return float(image.intersection(box(0, 0, self.width, self.height)).area / (self.width * self.height))

    def from_system(self, xy: np.ndarray, system: str) -> np.ndarray:
        """Locations ``(n, 2)`` as x, y in a coordinate system, as y, x in bins."""
        return apply_affine(np.linalg.inv(self.to_system(system)), xy)[:, ::-1]


class ImageWindow:
    """Reads an image on a grid: ``window(y0, x0, height, width)`` in bins.

    Returns float32 ``(c, height * px_per_bin, width * px_per_bin)``, in [0, 1] in transmitted light. Beyond its pixels
    its edge is repeated. A bin has the same pixels in whatever window it is read.

    An image that lies along the grid, perhaps turned by right angles or mirrored, is resampled once, at its exact
    fractional position. Any other is first read on a raster of its own with the pixel size asked for, and then
    interpolated linearly.

    Parameters
    ----------
    image
        The image.
    matrix
        From bin coordinates to pixels of the image's finest level, 3 x 3 over x, y.
    px_per_bin
        Pixels along each side of a bin.
    """

    def __init__(self, image: Histology, matrix: np.ndarray, px_per_bin: int) -> None:
        self.px_per_bin = px_per_bin
        self._image = image
        self._matrix = matrix
        scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        self.finest_px_per_bin = float(scale)
        """Pixels along a bin that the image itself has."""
        self._step = scale / px_per_bin  # pixels of the image per pixel that is read
        turn = matrix[:2, :2] / scale
        self._turn = np.round(turn) if np.abs(turn - np.round(turn)).max() < 1e-6 else None

    @property
    def channels(self) -> list[str]:
        """Names of the image's channels, alpha left out."""
        return self._image.channels

    @property
    def n_channels(self) -> int:
        """Number of channels, alpha not counted."""
        return self._image.n_channels

    def record(self) -> dict[str, Any]:
        """What was decided about the values, for the record of a result; doubts are logged as warnings."""
        return self._image.record()

    def __call__(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """The image in ``height`` x ``width`` bins from row ``y0`` and column ``x0`` on."""
        corners = apply_affine(self._matrix, corners_of(width, height) + [x0, y0])
        low, high = corners.min(0), corners.max(0)
        if self._turn is None:
            return self._interpolated(y0, x0, height, width, low, high)
        pixels = self._image.read(*low, *(high - low), mpp=self._step * self._image.mpp)
        if self._turn[0, 0] == 0:  # the image's x runs along the grid's y
            pixels = pixels.transpose(0, 2, 1)
        flipped = np.flatnonzero(self._turn.sum(0)[::-1] < 0) + 1
        return np.ascontiguousarray(np.flip(pixels, tuple(flipped)))

    def _interpolated(self, y0: int, x0: int, height: int, width: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Read a raster that starts at the image's corner, so that it is the same one for every window."""
        low, high = np.floor(low / self._step).astype(int) - 2, np.ceil(high / self._step).astype(int) + 2
        raster = self._image.read(*(low * self._step), *((high - low) * self._step), mpp=self._step * self._image.mpp)
        y = y0 + (np.arange(height * self.px_per_bin) + 0.5) / self.px_per_bin
        x = x0 + (np.arange(width * self.px_per_bin) + 0.5) / self.px_per_bin
        centers = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)
        at = (apply_affine(self._matrix, centers) / self._step - low - 0.5)[..., ::-1]
        return np.stack(
            [map_coordinates(channel, at.transpose(2, 0, 1), order=1, mode="nearest") for channel in raster]
        )


# -- maps -------------------------------------------------------------------------------------------------------------
def get_map(sdata: SpatialData, map_key: str, genes: Sequence[str] | None = None) -> DataArray:
    """A map ``(c, y, x)`` of ``sdata``, with the channels ``genes`` in this order; nothing is computed.

    Raises
    ------
    KeyError
        If there is no such image, or it has no channel for a gene.
    ValueError
        If the image is no map: several scales, other dimensions, or channels of one name.
    """
    only_key(sdata.images, map_key, argument="map_key", what="map in sdata.images")
    element = sdata.images[map_key]
    if not isinstance(element, DataArray) or set(element.dims) != {"c", "y", "x"}:
        found = f"dimensions {tuple(element.dims)}" if isinstance(element, DataArray) else "several scales"
        raise ValueError(
            f"The image {map_key!r} is no map of genes: a map has one scale and the dimensions c, y, x, found {found}. "
            "Make one with stgen.pp.rasterize."
        )
    check_gene_map(element, map_key)
    check_not_indexed(element)
    element = element.transpose("c", "y", "x")
    names = [str(name) for name in element.coords["c"].values] if "c" in element.coords else []
    if len(set(names)) < element.sizes["c"]:
        raise ValueError(
            f"The channels of the map {map_key!r} must be genes with one name each; found {listed(names)}."
        )
    if genes is None:
        return element
    missing = [gene for gene in genes if gene not in names]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(genes)} genes are not in the map {map_key!r} ({listed(missing)}); its channels "
            f"are {listed(names)}."
        )
    position = {name: i for i, name in enumerate(names)}
    return element.isel(c=[position[gene] for gene in genes])


def map_counts_checked(values: np.ndarray, where: str) -> np.ndarray:
    """Float32 counts of a map, where NaN stands for unknown; negative or infinite values are refused."""
    values = np.asarray(values, dtype=np.float32)
    if np.isinf(values).any():
        raise ValueError(f"{where} holds infinite values; counts must be finite (NaN where they are unknown).")
    lowest = np.nanmin(values, initial=0.0)
    if lowest < 0:
        raise ValueError(
            f"{where} holds negative values (down to {lowest:.4g}); it must hold counts, not a transform of them."
        )
    return values


def scaled(
    transformations: dict[str, BaseTransformation], factor: float, origin: np.ndarray | None = None
) -> dict[str, BaseTransformation]:
    """Transformations of pixels ``factor`` times as large, that begin at ``origin`` (x, y in the old coordinates)."""
    first: list[BaseTransformation] = [Scale([factor, factor], axes=("x", "y"))]
    if origin is not None:
        first.append(Translation(list(origin), axes=("x", "y")))
    return {name: Chain([*first, t]) for name, t in transformations.items()}


def _element(sdata: SpatialData, key: str) -> Any:
    if key not in sdata and key not in sdata.images:
        names = [name for _, name, _ in sdata.gen_elements()]
        raise KeyError(f"There is no element {key!r}; found {listed(names)}.")
    return element_of(sdata, key)


def corners_of(width: float, height: float) -> np.ndarray:
    """Corners (4, 2) as x, y of a rectangle at the origin."""
    return np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])


def apply_affine(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Locations ``(..., 2)`` as x, y under a 3 x 3 matrix."""
    return np.asarray(xy) @ matrix[:2, :2].T + matrix[:2, 2]
