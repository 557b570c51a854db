"""From the elements of a section to what its maps are made from: found, checked and placed once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stgen._checks import listed, only_key
from stgen._spatial.coordinates import systems_of
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import Grid, ImageWindow, apply_affine, get_map
from stgen._spatial.image import Histology, affine_to, histology_of
from stgen._spatial.labels import LabelsWindow, labels_window
from stgen._spatial.measured import check_on_grid, footprints_of, measured_bins
from stgen._spatial.platforms import spot_pitch
from stgen._spatial.section import Locations, annotated_region, image_mpp, locate, shared_system
from stgen._spatial.tissue import check_some_tissue, known_bins, tissue_near, tissue_of_image, with_tissue_around
from stgen.data import MapInputs
from stgen.measurement import Footprints, Measurement
from stgen.models import MapMaker

__all__ = ["MapElements"]

logger = logging.getLogger("stgen")


@dataclass(frozen=True)
class MapElements:
    """The elements of a section from which its maps are made, and the coordinate system in which they meet.

    This is the one place that knows of the object and its keys: what it resolves (:meth:`inputs`) is arrays, functions
    and numbers.
    """

    sdata: SpatialData
    system: str
    image_key: str | None
    low_res: str | None
    layer: str | None
    """Of the table ``low_res``, with the counts."""
    labels_key: str | None
    map_key: str | None
    """A map whose bins are the grid's."""
    mpp: float | None
    """µm per pixel of the image's finest level, where it was given."""
    spots: Locations | None
    """Where the rows of ``low_res`` lie, if it is a table."""

    @classmethod
    def find(
        cls,
        sdata: SpatialData,
        *,
        image_key: str | None = None,
        low_res: str | None = None,
        layer: str | None = None,
        labels_key: str | None = None,
        map_key: str | None = None,
        mpp: float | None = None,
        coordinate_system: str | None = None,
    ) -> MapElements:
        """Find the elements, and where they meet.

        Raises
        ------
        KeyError
            If there is no element of a name, or they do not share the coordinate system that is wanted.
        ValueError
            If they share none, a layer of a map is asked for, or rows of a table cannot be located.
        """
        if image_key is not None:
            only_key(sdata.images, image_key, argument="image_key", what="image")
        if labels_key is not None:
            only_key(sdata.labels, labels_key, argument="labels_key", what="mask in sdata.labels")
        if map_key is not None:
            get_map(sdata, map_key)
        placed = [image_key, map_key]
        region = None
        if low_res is not None:
            if low_res in sdata.images:
                get_map(sdata, low_res)
                placed.append(low_res)
            elif low_res in sdata.tables:
                region, _ = annotated_region(sdata, sdata.tables[low_res], low_res, None)
                placed.append(region)
            else:
                raise KeyError(
                    f"There is no map or table {low_res!r}; found the images "
                    f"{listed(map(repr, sdata.images))} and the tables {listed(map(repr, sdata.tables))}."
                )
            if layer is not None and region is None:
                raise ValueError(f"layer={layer!r} is for tables, and {low_res!r} is a map: leave it out.")
        names = list(dict.fromkeys(name for name in placed if name is not None))
        system = shared_system(sdata, names, coordinate_system)
        spots = None if region is None else locate(sdata, str(low_res), system)
        return cls(sdata, system, image_key, low_res, layer, labels_key, map_key, mpp, spots)

    # ---- what is measured in µm ----------------------------------------------------------------------------------

    @cached_property
    def _in_pixels(self) -> Histology:
        """The image, with pixels as its unit."""
        return histology_of(self.sdata, str(self.image_key), mpp=1.0)

    @cached_property
    def image(self) -> Histology:
        """The image, whose µm per pixel are known."""
        mpp = image_mpp(self.sdata, str(self.image_key), self.system, self.spots) if self.mpp is None else self.mpp
        return self._in_pixels.with_mpp(mpp)

    @cached_property
    def image_record(self) -> dict[str, Any]:
        """How the values of the image are read, for the record of a result; says what is in doubt about them, once."""
        return {} if self.image_key is None else self._in_pixels.record()

    def spot_um(self) -> float | None:
        """Diameter of the spots of ``low_res`` in µm; None if it is no table of circles of one size, or nothing tells."""
        if self.spots is None or self.spots.diameter is None:
            return None
        um_per_unit = self._um_per_unit()
        return None if um_per_unit is None else self.spots.diameter * um_per_unit

    def spot_pitch_um(self) -> float:
        """Distance between neighboring spots of ``low_res`` in µm; NaN if nothing tells."""
        um_per_unit = self._um_per_unit()
        if self.spots is None or um_per_unit is None:
            return np.nan
        return spot_pitch(self.spots.xy)[0] * um_per_unit

    def _um_per_unit(self) -> float | None:
        if self.image_key is not None:
            return self.image.mpp / affine_to(self.sdata.images[self.image_key], self.system)[1]
        return self.mpp if self.mpp is not None or self.spots is None else self.spots.um_per_unit()

    # ---- grids ---------------------------------------------------------------------------------------------------

    def grid_of_image(self, bin_um: float) -> Grid:
        """Whole bins over the image."""
        transformations = get_transformation(self.sdata.images[self.image_key], get_all=True)
        return Grid.over(self.image, str(self.image_key), transformations, bin_um=bin_um)

    def grid_of_spots(self, bin_um: float) -> Grid:
        """Bins around the spots."""
        if self.spots is None:
            raise ValueError("there are no spots to lay bins around; name an image, or a map as like=.")
        return Grid.around(self.spots, str(self.low_res), bin_um=bin_um, mpp=self.mpp)

    # ---- what maps are made from ---------------------------------------------------------------------------------

    def footprints(self, grid: Grid) -> Footprints:
        """What ``low_res`` measured, on a grid, without counts."""
        if self.spots is None:
            first = str(get_map(self.sdata, str(self.low_res)).coords["c"].values[0])
            return measured_bins(self.sdata, str(self.low_res), grid, [first], self.system).footprints
        return footprints_of(self.spots, str(self.low_res), grid)

    def measurement(self, grid: Grid, genes: Sequence[str] | None) -> Measurement:
        """What ``low_res`` measured, on a grid; of all genes by default, then sparse if it is a table.

        Raises
        ------
        KeyError
            If a gene or the layer is missing.
        ValueError
            If bins or spots do not fit the grid, nothing was measured on it, or values are no counts.
        """
        if self.spots is None:
            measurement = measured_bins(self.sdata, str(self.low_res), grid, genes, self.system)
        else:
            table = self.sdata.tables[self.low_res]
            footprints = footprints_of(self.spots, str(self.low_res), grid)
            names = [str(name) for name in (table.var_names if genes is None else genes)]
            if genes is None:
                counts = get_counts(table, layer=self.layer, dense=False).tocsc()
            else:
                counts = get_counts(table, genes=genes, layer=self.layer)
            measurement = Measurement(footprints, counts, tuple(names))
        check_on_grid(measurement.footprints, str(self.low_res), grid)
        return measurement

    def inputs(
        self, grid: Grid, model: MapMaker[Any], *, text: np.ndarray | None = None, truth: Any = None
    ) -> MapInputs:
        """What the maps of the section are made from, for a model.

        Parameters
        ----------
        grid
            The bins.
        model
            Says what it looks at, and of which genes.
        text
            What a prompt says.
        truth
            The counts of a fine map on the grid, for training; then tissue is where it is known.

        Raises
        ------
        KeyError
            If a gene is missing.
        ValueError
            If image, mask and measurement do not fit the model or one another.
        """
        to_pixels = None
        if self.image_key is not None:
            to_pixels = grid.to_element(self.sdata, self.image_key, self.system)
        image = self._image_window(grid, model, to_pixels) if model.needs_image and to_pixels is not None else None
        measurement = None
        if self.low_res is not None:
            measurement = self.measurement(grid, None if model.needs_all_genes else model.genes)
        labels: LabelsWindow | None = None
        if model.needs_labels:
            of_labels = systems_of(self.sdata.labels[self.labels_key])
            labels = labels_window(
                self.sdata,
                str(self.labels_key),
                grid,
                px_per_bin=model.config["px_per_bin"],
                coordinate_system=self.system if self.system in of_labels else None,
            )
        if truth is not None:
            tissue = np.isfinite(np.asarray(truth[0]))
        else:
            tissue = self._tissue(grid, measurement, to_pixels, model.tissue_reach)
        seen = None if measurement is None else self._seen(grid, measurement.footprints, to_pixels)
        return MapInputs(tissue, grid.bin_um, image, measurement, labels, text, truth, seen)

    def reader(self, grid: Grid, *, px_per_bin: int) -> ImageWindow:
        """A reader of the image on a grid."""
        return ImageWindow(self._in_pixels, grid.to_element(self.sdata, str(self.image_key), self.system), px_per_bin)

    def _image_window(self, grid: Grid, model: MapMaker[Any], to_pixels: np.ndarray) -> ImageWindow:
        """A reader of the image on the grid, if it fits."""
        name = type(model).__name__
        image = self._in_pixels
        _ = self.image_record  # refuses an image of nothing
        window = self.reader(grid, px_per_bin=model.config["px_per_bin"])
        expected = model.config["image_channels"]
        if expected is not None and window.n_channels != expected:
            raise ValueError(
                f"this {name} takes images of {expected} channels, and {self.image_key!r} has {window.n_channels} "
                f"({listed(window.channels)}). Name another image_key=, or construct a model with "
                f"image_channels={window.n_channels}."
            )
        covered = grid.covered_by(to_pixels, image.width, image.height)
        other = self.map_key or self.low_res or "the grid"
        if covered <= 0:
            raise ValueError(
                f"the image {self.image_key!r} and {other!r} do not overlap in the coordinate system {self.system!r}. "
                "Correct the transformation of one of them: spatialdata.transformations.set_transformation."
            )
        if covered < 0.9:
            logger.warning(
                "the image %r covers %.0f %% of the map; beyond it, its edge is repeated.",
                self.image_key,
                100 * covered,
            )
        return window

    def _tissue(
        self, grid: Grid, measurement: Measurement | None, to_pixels: np.ndarray | None, reach: float
    ) -> np.ndarray:
        """Which bins get a result: where something was measured (nearby), a map is known, or the image shows tissue."""
        if measurement is None and self.map_key is not None:
            tissue, where = (
                np.isfinite(np.asarray(get_map(self.sdata, self.map_key).data[0])),
                f"the map {self.map_key!r}",
            )
        elif measurement is None:
            if to_pixels is None:
                raise ValueError("nothing says where the tissue is; name an image, a map or low-resolution data.")
            tissue, where = tissue_of_image(self.image, to_pixels, grid), f"the image {self.image_key!r}"
        else:
            tissue, where = tissue_near(measurement.footprints, grid), "the low-resolution data"
            if to_pixels is not None and (reach or self.spots is not None):
                mpp = float(grid.bin_um / np.sqrt(abs(np.linalg.det(to_pixels[:2, :2]))))
                image = self._in_pixels.with_mpp(mpp)
                shown = tissue_of_image(image, to_pixels, grid)
                if image.n_channels == 3 and shown.any():  # bare glass is not dark, as other images may be
                    tissue &= shown | measurement.footprints.covers(grid.height, grid.width)
                if reach:
                    tissue = with_tissue_around(tissue, shown, measurement.footprints, reach)
        if to_pixels is not None:
            tissue = tissue & known_bins(self._in_pixels, to_pixels, grid)
        check_some_tissue(tissue, where)
        return tissue

    def _seen(self, grid: Grid, footprints: Footprints, to_pixels: np.ndarray | None) -> np.ndarray:
        """Which footprints have their center on the grid, and on the image if there is one."""
        centers = footprints.centers
        seen = np.all((centers >= 0) & (centers <= np.array([grid.height, grid.width])), axis=1)
        if to_pixels is not None:
            seen &= self._in_pixels.covers(apply_affine(to_pixels, centers[:, ::-1]))
        return seen
