"""Do the locations lie on the image?"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stgen import _html
from stgen._checks import check_types
from stgen._spatial.image import Histology
from stgen._spatial.library import library_of
from stgen._spatial.platforms import spot_pitch
from stgen._spatial.section import Section, get_section
from stgen._spatial.tissue import tissue_mask

__all__ = ["AlignmentReport", "check_alignment", "check_section"]

logger = logging.getLogger("stgen")

_MPP_RANGE = (0.02, 100.0)
_SIDE_UM_RANGE = (20.0, 2e5)


@dataclass(frozen=True, repr=False)
class AlignmentReport:
    """What :func:`stgen.pp.check_alignment` found.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=300)
    >>> report = stgen.pp.check_alignment(sdata, table_key="spot_counts")
    >>> report.inside, report.mpp
    (1.0, 1.0)
    >>> print(report)  # doctest: +ELLIPSIS
    AlignmentReport
        locations: ...; 100 % inside the image
        ...
        no warnings
    """

    n_locations: int
    inside: float
    """Share of the locations inside the image."""
    on_tissue: float
    """Share of the locations on tissue."""
    on_tissue_swapped: float
    """The same with x and y exchanged."""
    tissue_fraction: float
    """Share of the image that is tissue."""
    mpp: float
    """µm per pixel of the image's finest level."""
    image_um: tuple[float, float]
    """Width and height of the image in µm."""
    pitch_um: float
    """Median distance to the nearest neighbor in µm (NaN below seven locations)."""
    warnings: tuple[str, ...]
    """What looks suspicious; empty if nothing does."""

    def __repr__(self) -> str:
        width, height = self.image_um
        pitch = "" if np.isnan(self.pitch_um) else f", {self.pitch_um:.4g} µm apart"
        lines = (
            "AlignmentReport",
            f"locations: {self.n_locations:,}{pitch}; {100 * self.inside:.0f} % inside the image",
            f"on tissue: {100 * self.on_tissue:.0f} %; with x and y exchanged, {100 * self.on_tissue_swapped:.0f} %",
            f"image: {width:,.0f} x {height:,.0f} µm, {self.mpp:.4g} µm per pixel; {100 * self.tissue_fraction:.0f} % "
            "tissue",
            *([f"warning: {warning}" for warning in self.warnings] or ["no warnings"]),
        )
        return "\n    ".join(lines)

    def _repr_html_(self) -> str:
        name, *lines = repr(self).splitlines()
        rows = [line.strip().split(": ", 1) if ": " in line else ("", line.strip()) for line in lines]
        return _html.tag("div", _html.tag("b", name), _html.table(rows))


@check_types
def check_alignment(
    data: SpatialData | AnnData,
    *,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    mpp: float | None = None,
    coordinate_system: str | None = None,
) -> AlignmentReport:
    """Check that locations and image belong together.

    Looks for locations outside the image, implausible µm per pixel, exchanged x and y, coordinates of another
    resolution (full-resolution pixels against the ``hires`` image), and locations that miss the tissue. Every function
    that reads image and locations together makes this check first.

    Parameters
    ----------
    data
        SpatialData, or AnnData that follows the scanpy/squidpy Visium convention.
    image_key, table_key, shapes_key
        Which image, table and shapes; None where there is one candidate.
    mpp
        µm per pixel, if the data do not say: of the image's finest level (SpatialData) or of the full-resolution image
        (AnnData).
    coordinate_system
        Where image and locations meet; None picks a micrometer one, then "global".

    Returns
    -------
    The report; ``data`` is left alone. What looks suspicious is also logged as a warning.

    Raises
    ------
    ValueError
        Image and locations cannot belong together as they are; the message says why and how to mend it.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.check_alignment(sdata, table_key="spot_counts").inside
    1.0
    """
    section = get_section(
        data,
        image_key=image_key,
        table_key=table_key,
        shapes_key=shapes_key,
        mpp=mpp,
        coordinate_system=coordinate_system,
        need_image=True,
    )
    report = check_section(section, scales=known_scales(data))
    if not report.warnings:
        logger.info(
            "%d locations on the image: %.0f %% inside, %.0f %% on tissue, %.4g µm per pixel.",
            report.n_locations,
            100 * report.inside,
            100 * report.on_tissue,
            report.mpp,
        )
    return report


def known_scales(data: SpatialData | AnnData) -> list[float]:
    """Factors by which coordinates of this object are off if they are of another resolution."""
    scales: list[float] = []
    if isinstance(data, AnnData):
        scales += library_of(data).scales.values()
    else:
        for image in data.images.values():
            for transformation in get_transformation(image, get_all=True).values():
                matrix = transformation.to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))
                scales.append(float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))))
    return sorted({round(s, 9) for scale in scales if scale > 0 for s in (scale, 1 / scale) if abs(np.log(s)) > 0.3})


def check_section(section: Section, *, scales: Iterable[float] = ()) -> AlignmentReport:
    """The check itself; see :func:`stgen.pp.check_alignment`."""
    image, xy = section.histology, section.xy_px
    width_um, height_um = image.width * image.mpp, image.height * image.mpp
    longest = max(width_um, height_um)
    if not _MPP_RANGE[0] <= image.mpp <= _MPP_RANGE[1] or not _SIDE_UM_RANGE[0] <= longest <= _SIDE_UM_RANGE[1]:
        raise ValueError(
            f"{image.mpp:.4g} µm per pixel is implausible: the image of {image.width} x {image.height} pixels would be "
            f"{width_um:.4g} x {height_um:.4g} µm. Pass mpp=<µm per pixel>, or correct the image's transformation."
        )
    mask, pixel = tissue_mask(image)
    inside, on_tissue, extent = _score(xy, image, mask, pixel)
    _, swapped, _ = _score(xy[:, ::-1], image, mask, pixel)
    known = image.covers(xy)
    inside, on_tissue = min(inside, float(known.mean())), float(on_tissue)
    informative = 0.001 < mask.mean() < 0.97
    where = (
        f"The locations span x {xy[:, 0].min():.0f} to {xy[:, 0].max():.0f} and y {xy[:, 1].min():.0f} to "
        f"{xy[:, 1].max():.0f} pixels, the image {image.width} x {image.height}"
    )
    n_outside = round((1 - inside) * len(xy))
    found = f"{where}; {100 * inside:.0f} % lie inside and {100 * on_tissue:.0f} % on tissue."

    if on_tissue < 0.9:
        _raise_if_swapped(on_tissue, swapped, len(xy), found)
    scaled = [(s, *_score(xy * s, image, mask, pixel)[1:]) for s in scales]
    factor, share, span = max(scaled, key=lambda found: found[1] * found[2], default=(1.0, 0.0, 0.0))
    fits = share >= 0.8 and span >= 0.4
    advice = ""
    if fits:
        advice = (
            f"Multiplied by {factor:.4g} (a scale factor of this object), {100 * share:.0f} % lie on tissue: the "
            "coordinates are of another resolution than assumed. Use the image that they were measured on, or correct "
            f'them: adata.obsm["spatial"] *= {factor:.6g} (AnnData), or set_transformation(shapes, Scale(...)).'
        )
    if n_outside > 0.01 * len(xy):
        raise ValueError(f"{n_outside} of {len(xy)} locations lie outside the image. {found} {advice or _MEND}")
    if informative and fits and share > on_tissue + 0.25:
        raise ValueError(f"The locations are at the wrong scale. {found} {advice}")
    if informative and on_tissue < 0.1:
        raise ValueError(f"The locations do not overlap with tissue. {found} {_MEND}")

    warnings = list(image.doubts)
    if n_outside:
        warnings.append(
            f"{n_outside} of {len(xy)} locations lie just outside the image; its edge is repeated for them."
        )
    if informative and on_tissue < 0.5:
        warnings.append(f"Only {100 * on_tissue:.0f} % of the locations lie on tissue. {_MEND}")
    if fits and extent < 0.05 and span > 0.5:
        warnings.append(f"The locations cover {100 * extent:.1f} % of the tissue's extent. {advice}")
    pitch, hexagonal = spot_pitch(xy)
    pitch_um = pitch * image.mpp
    diameter = section.spot_diameter_um
    if hexagonal and diameter is not None and 0.5 < diameter / pitch_um < 0.66 and not 80 < pitch_um < 125:
        warnings.append(
            f"The spots look like Visium, 100 µm apart, but at {image.mpp:.4g} µm per pixel they are {pitch_um:.4g} µm "
            f"apart. Check the scale, or pass mpp={image.mpp * 100 / pitch_um:.4g}."
        )
    for message in warnings:
        logger.warning(message)
    return AlignmentReport(
        n_locations=len(xy),
        inside=inside,
        on_tissue=on_tissue,
        on_tissue_swapped=swapped,
        tissue_fraction=float(mask.mean()),
        mpp=image.mpp,
        image_um=(width_um, height_um),
        pitch_um=pitch_um,
        warnings=tuple(warnings),
    )


_MEND = (
    "Check that image and coordinates are of the same section and resolution, that the coordinates are x (column), y "
    "(row) in that order, and the transformation between them."
)


def _raise_if_swapped(on_tissue: float, swapped: float, n: int, found: str) -> None:
    """Where exchanged coordinates fit well, and better by more than chance: a shift or a wrong scale is something else."""
    better = swapped - on_tissue
    if swapped >= 0.8 and better > 0.15 and better * np.sqrt(n) > 1.5:  # 1.5: three standard deviations of a share of n
        raise ValueError(
            f"x and y look exchanged. {found} With x and y exchanged, {100 * swapped:.0f} % lie on tissue. Exchange "
            "them: "
            'adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1] (AnnData), or swap the columns when the shapes are '
            "made (SpatialData)."
        )


def _score(xy: np.ndarray, image: Histology, mask: np.ndarray, pixel: float) -> tuple[float, float, float]:
    """Share inside the image, share on tissue, and how much of the tissue's extent the locations span."""
    x, y = xy.T
    inside = (x >= 0) & (y >= 0) & (x < image.width) & (y < image.height)
    if not inside.any() or not mask.any():
        return float(inside.mean()), 0.0, 0.0
    column = np.minimum((x[inside] / pixel).astype(int), mask.shape[1] - 1)
    row = np.minimum((y[inside] / pixel).astype(int), mask.shape[0] - 1)
    tissue = [np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)]
    span = [min(1.0, (np.ptp(v) / pixel + 1) / t) for v, t in zip((x[inside], y[inside]), tissue, strict=True)]
    return float(inside.mean()), float(mask[row, column].sum() / len(xy)), float(span[0] * span[1])
