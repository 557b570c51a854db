"""Locations predicted by what the image shows there, with a model that reads the image itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from stgen._spatial.grid import ImageWindow
from stgen._spatial.section import Section
from stgen.data import MapInputs
from stgen.measurement import Footprints
from stgen.models import KernelRegression, Model
from stgen.tl.prediction.target import Prediction

__all__ = ["by_looks", "check_looks"]


def check_looks(
    model: Model[Any], *, statistic: str, keep_samples: bool, embedding_key: str | None, layer: str | None
) -> None:
    """Refuse a model that is not fitted, and what one that reads the image itself has no use for."""
    name = type(model).__name__
    if not model.fitted:
        raise ValueError(
            f"this {name} has not been fitted; call stgen.tl.fit(model, sections) first. How well a section's own "
            "spots predict one another, stgen.tl.superresolve(sdata, ...) without a model says."
        )
    if embedding_key is not None or layer is not None:
        raise ValueError(f"{name} reads the image itself, and no counts: leave `embedding_key` and `layer` out.")
    if keep_samples or statistic != "mean":
        raise ValueError(
            f"{name} gives the mean and a spread in closed form: leave `statistic` and `keep_samples` out."
        )


def by_looks(
    model: KernelRegression, section: Section, genes: list[str], *, n_samples: int, seed: int, progress: bool
) -> Prediction:
    """Predict some genes at the locations of a section."""
    inputs, footprints = inputs_of(section, model.config["bin_um"], model.config["px_per_bin"], model.footprint_um)
    expected, std = model.predict_locations(inputs, footprints, n_samples=n_samples, seed=seed, progress=progress)
    columns = [model.genes.index(gene) for gene in genes]
    return Prediction(expected[:, columns], None if std is None else std[:, columns])


def inputs_of(section: Section, bin_um: float, px_per_bin: int, footprint_um: float) -> tuple[MapInputs, Footprints]:
    """The image of a section on bins, and its locations: discs of their own size, else of that which was learned from."""
    image = section.image
    if image is None:
        raise ValueError("there is no image to look at; pass image_key=<an image>.")
    outside = int((~image.covers(section.xy_px)).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(section.xy_px)} locations lie outside the image: there is nothing to look at. Leave "
            "them out, or check coordinates and scale with stgen.pp.check_alignment."
        )
    pixels = bin_um / image.mpp  # of a bin
    height, width = (max(1, int(np.ceil(n / pixels - 1e-6))) for n in (image.height, image.width))
    reader = ImageWindow(image, np.diag([pixels, pixels, 1.0]), px_per_bin)
    centers = np.ascontiguousarray(section.xy_px[:, ::-1] / pixels)
    diameter = (section.spot_diameter_um or footprint_um) / bin_um
    area = np.full(len(centers), np.pi * (diameter / 2) ** 2)
    inputs = MapInputs(np.ones((height, width), bool), bin_um, image=reader)
    return inputs, Footprints(centers, diameter, "disc", area)
