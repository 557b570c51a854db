"""Where a predicted map has the structure of the true one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen._spatial.grid import Grid
from stgen.metrics import ssim_map
from stgen.pl._colors import check_cmaps
from stgen.pl._map_images import _window
from stgen.pl._panels import Column, Picture, Pixels, checked_axes, color_bar, new_axes, scale_bar
from stgen.tl.comparison.compared import MapsCompared, known_genes
from stgen.transforms import TransformName

__all__ = ["local_ssim"]


@check_types
def local_ssim(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    keys: str | Sequence[str] = "superresolved",
    truth_key: str,
    data_range: float | None = None,
    transform: TransformName = "log1p_raw",
    bounds_um: tuple[float, float, float, float] | None = None,
    coordinate_system: str | None = None,
    cmap: str = "PRGn",
    axes: np.ndarray | Sequence[Axes] | Axes | None = None,
) -> np.ndarray:
    """Draw the local structural similarity of predicted maps and the true one. HaDM-ST, Figure 2.

    Green where the structure around a bin agrees with the truth, white where they have nothing in common, purple where
    one rises as the other falls. One row per gene, one column per prediction.

    Parameters
    ----------
    sdata
        Object with the maps.
    genes
        Genes to draw, one row each.
    keys
        Predicted maps, such as :func:`stgen.tl.superresolve` makes, one column each.
    truth_key
        Map of the true counts, on the same grid.
    data_range
        Range of the values on the scale of ``transform``, the same for all genes; by default the largest true value of
        each gene, as in :func:`stgen.tl.evaluate`.
    transform
        Scale on which maps are compared: ``"log1p_raw"``, ``"log2p1_raw"`` or ``"none"`` (counts).
    bounds_um
        Part to draw as ``(x_min, y_min, x_max, y_max)``, in µm from the origin of the coordinate system. By default
        all.
    coordinate_system
        The one to draw in; by default one in micrometers that all maps share, else ``"global"``.
    cmap
        Color map from -1 to 1; the default can be told apart by color-blind readers.
    axes
        Axes to draw into, ``(genes, keys)``; by default a new figure.

    Returns
    -------
    Array of Axes, ``(genes, keys)``. The image on each holds the similarity of all bins, NaN where either map is
    unknown and within 5 bins of the border, where the window does not lie on the map. Below each stands its mean: the
    SSIM of :func:`stgen.tl.evaluate`.

    Raises
    ------
    KeyError
        If a map or gene does not exist.
    ValueError
        If maps are on different grids, ``data_range`` is not positive, or ``axes`` has the wrong shape.

    Notes
    -----
    Where both maps are flat and alike, similarity is 1 whatever the gene: empty regions look green.

    Examples
    --------
    >>> from stgen import datasets, pl, pp
    >>> sdata = datasets.simulated_section(size_um=500)
    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM"], bin_um=10)
    >>> axes = pl.local_ssim(sdata, "EPCAM", keys="counts", truth_key="counts")
    >>> axes[0, 0].get_title(), axes[0, 0].get_xlabel()
    ('counts', 'SSIM 1.00')
    """
    check_cmaps(cmap=cmap)
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Expected a SpatialData object, found {type(sdata).__name__}.")
    genes = [genes] if isinstance(genes, str) else list(genes)
    keys = [keys] if isinstance(keys, str) else list(keys)
    if data_range is not None and not data_range > 0:
        raise ValueError(f"`data_range` must be positive, found {data_range!r}.")
    for key in [*keys, truth_key]:
        if key not in sdata.images:
            raise KeyError(
                f"`keys` or `truth_key`: there is no map {key!r}; sdata.images has "
                f"{', '.join(map(repr, sdata.images))}."
            )
    if not keys:
        raise ValueError("`keys` is empty; name at least one predicted map.")
    compared = {key: MapsCompared.find(sdata, key, truth_key, transform) for key in keys}
    for key in keys:
        known_genes(compared[key].genes, genes, key)
    axes = checked_axes(axes, (len(genes), len(keys)))
    grid = Grid.of_map(sdata, truth_key)
    system = grid.shared_system(sdata, keys[0], coordinate_system)
    matrix = grid.to_system(system)
    um_per_unit = grid.bin_um / np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    window = _window({truth_key: grid}, system, bounds_um, um_per_unit)
    picture = Picture([Column(key, "error") for key in keys], {}, window, um_per_unit)

    axes = new_axes(len(genes), picture) if axes is None else axes
    for column, key in zip(axes.T, keys, strict=True):
        maps = replace(compared[key].maps, n_samples=0)
        for ax, gene in zip(column, genes, strict=True):
            prediction, truth, _ = maps.read(gene, compared[key].scale)
            similarity = ssim_map(prediction, truth, data_range or max(np.nanmax(truth, initial=0), 1e-6))
            drawn = Pixels(matrix).draw(ax, similarity, cmap=cmap, vmin=-1, vmax=1)
            left, right, top, bottom = window
            ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
            ax.spines[:].set(color="0.8", linewidth=0.6)
            mean = similarity[np.isfinite(similarity)].mean() if np.isfinite(similarity).any() else np.nan
            ax.set_xlabel(f"SSIM {mean:.2f}", fontsize="small")
        column[0].set_title(key, fontsize="medium")
    for ax, gene in zip(axes[:, 0], genes, strict=True):
        ax.set_ylabel(gene, fontsize="large", fontstyle="italic")
    color_bar(drawn, list(axes.ravel()), "local structural similarity\n(SSIM)", "neither")
    scale_bar(axes[-1, 0], picture)
    return axes
