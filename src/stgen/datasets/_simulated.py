"""The simulated section: gene programs, molecules, and the SpatialData object."""

from __future__ import annotations

from importlib.metadata import version

import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from stgen._checks import check_types

from ._render import LARGE, Stain, render
from ._tissue import CELL_TYPES, Tissue, at_points, draw_tissue

_TU, _LU, _MY, _FI, _TC, _BC, _MA, _EN, _AD = range(len(CELL_TYPES))

# gene -> (program, molecules in an average cell of each type; types that are left out get BACKGROUND)
_BACKGROUND = 0.5
_ALL = dict.fromkeys(range(len(CELL_TYPES)), 1.0)
_GENES: dict[str, tuple[str, dict[int, float]]] = {
    "EPCAM": ("epithelium", {_TU: 32, _LU: 22}),
    "COL1A1": ("stroma", {_FI: 90, _MY: 8, _TU: 1.5}),
    "CD3E": ("T cell", {_TC: 24}),
    "PLIN1": ("fat", {_AD: 60}),
    "ERBB2": ("tumor", {_TU: 48, _LU: 6}),
    "ACTB": ("housekeeping", dict.fromkeys(_ALL, 26.0)),
    "MS4A1": ("B cell", {_BC: 26}),
    "CD68": ("macrophage", {_MA: 34, _TC: 1}),
    "PECAM1": ("vessel", {_EN: 38, _MA: 2}),
    "KRT5": ("myoepithelium", {_MY: 46, _TU: 1, _LU: 4}),
    "SCGB2A2": ("duct", {_LU: 70, _TU: 5}),
    "MKI67": ("proliferation", {_TU: 9}),
    "CA9": ("hypoxia", {_TU: 22}),
    "FAP": ("tumor stroma", {_FI: 16}),
    "FOS": ("position", dict.fromkeys(_ALL, 9.0)),
    "ESR1": ("hidden clone", {_TU: 22, _LU: 10}),
    "KRT8": ("epithelium", {_TU: 55, _LU: 45}),
    "COL3A1": ("stroma", {_FI: 80, _MY: 4, _EN: 3}),
    "ACTA2": ("myoepithelium", {_MY: 55, _FI: 9, _EN: 12}),
    "CD74": ("antigen presentation", {_BC: 60, _MA: 75, _EN: 14, _TU: 4, _TC: 6}),
    "GAPDH": ("housekeeping", dict.fromkeys(_ALL, 18.0) | {_TU: 42}),
    "KRT18": ("epithelium", {_TU: 44, _LU: 36}),
    "COL1A2": ("stroma", {_FI: 70, _MY: 6}),
    "CD3D": ("T cell", {_TC: 18}),
    "ADIPOQ": ("fat", {_AD: 48}),
    "GATA3": ("duct", {_LU: 24, _TU: 12, _TC: 2}),
    "PTPRC": ("immune", {_TC: 26, _BC: 22, _MA: 14}),
    "LYZ": ("macrophage", {_MA: 60}),
    "VWF": ("vessel", {_EN: 44}),
    "KRT14": ("myoepithelium", {_MY: 50, _LU: 2}),
    "IFI6": ("hidden interferon", dict.fromkeys(_ALL, 10.0) | {_TU: 18}),
    "KRT19": ("epithelium", {_TU: 40, _LU: 30}),
    "DCN": ("stroma", {_FI: 55, _AD: 4}),
    "TRAC": ("T cell", {_TC: 28}),
    "CD79A": ("B cell", {_BC: 24}),
    "FABP4": ("fat", {_AD: 70, _EN: 8, _MA: 4}),
    "MUC1": ("epithelium", {_TU: 20, _LU: 24}),
    "LUM": ("stroma", {_FI: 42}),
    "C1QA": ("macrophage", {_MA: 36}),
    "PIP": ("duct", {_LU: 52, _TU: 3}),
    "TOP2A": ("proliferation", {_TU: 8}),
    "VEGFA": ("hypoxia", {_TU: 18, _MA: 4}),
    "POSTN": ("tumor stroma", {_FI: 38}),
    "JUN": ("position", dict.fromkeys(_ALL, 8.0)),
    "CD24": ("tumor", {_TU: 38, _LU: 12, _BC: 3}),
    "B2M": ("housekeeping", dict.fromkeys(_ALL, 30.0)),
    "SPARC": ("stroma", {_FI: 50, _EN: 22}),
    "IGKC": ("B cell", {_BC: 70}),
    "IL7R": ("T cell", {_TC: 16}),
    "LPL": ("fat", {_AD: 44, _MA: 3}),
    "CLDN5": ("vessel", {_EN: 24}),
    "TAGLN": ("myoepithelium", {_MY: 48, _FI: 14, _EN: 10}),
    "CD163": ("macrophage", {_MA: 24}),
    "ELF3": ("duct", {_LU: 16, _TU: 8}),
    "CLDN4": ("tumor", {_TU: 22, _LU: 10}),
    "FN1": ("tumor stroma", {_FI: 40, _MA: 8, _TU: 2}),
    "CXCL13": ("B cell", {_BC: 10, _TC: 8}),
    "TYROBP": ("macrophage", {_MA: 30, _TC: 1}),
    "MYLK": ("myoepithelium", {_MY: 30, _FI: 5}),
    "EEF1A1": ("housekeeping", dict.fromkeys(_ALL, 34.0)),
    # beyond the default 60: what gene selection has to leave out
    "MT-CO1": ("mitochondrial", dict.fromkeys(_ALL, 55.0) | {_TU: 80}),
    "MT-ND4": ("mitochondrial", dict.fromkeys(_ALL, 40.0) | {_TU: 60}),
    "RPL13": ("ribosomal", dict.fromkeys(_ALL, 40.0)),
    "RPS27": ("ribosomal", dict.fromkeys(_ALL, 36.0)),
}


def _gene_programs(n_genes: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Names, programs and dispersions of the genes, and the molecules per cell, ``(n_types, n_genes)``.

    Depends on `n_genes` only, never on a seed: the biology is the same in every section.
    """
    names, programs, dispersion = [], [], []
    levels = np.full((len(CELL_TYPES), n_genes), _BACKGROUND)
    curated = list(_GENES.items())
    for g in range(n_genes):
        rng = np.random.default_rng([20250, g])
        dispersion.append(rng.uniform(0.15, 0.7))
        if g < len(curated):
            name, (program, level) = curated[g]
            levels[list(level), g] = list(level.values())
        else:
            name, program = f"SIM{g:04d}", "random"
            levels[:, g] = rng.lognormal(0.2, 0.5)
            own = rng.choice(len(CELL_TYPES), rng.integers(1, 4), replace=False)
            levels[own, g] *= rng.lognormal(1.6, 0.6, len(own))
        names.append(name)
        programs.append(program)
    var = pd.DataFrame({"program": programs, "dispersion": dispersion}, index=pd.Index(names, name="gene"))
    return var, levels


def _cell_rates(tissue: Tissue, var: pd.DataFrame, levels: np.ndarray, capture: float) -> np.ndarray:
    """Expected number of captured molecules, ``(n_cells, n_genes)``."""
    cells, state = tissue.cells, tissue.states
    kind = cells["cell_type"].cat.codes.to_numpy()
    rate = levels[kind] * (cells["content"].to_numpy() * state["capture"] * capture)[:, None]
    hypoxia = 1 / (1 + np.exp(-(state["depth_um"] - 32) / 9))
    margin = np.exp(np.minimum(state["depth_um"], 0) / 45)
    modulation = {
        "proliferation": np.where(kind == _TU, np.where(state["cycling"], 5.0, 0.25), 1.0),
        "hypoxia": np.where(kind == _TU, 0.15 + 2.4 * hypoxia, 1.0),
        "tumor stroma": np.where(kind == _FI, 0.15 + 1.7 * margin, 1.0),
        "tumor": np.where(kind == _TU, 0.6 + 0.8 * state["clone"], 1.0),
        "position": np.exp(2.2 * state["gradient"]),
        "hidden clone": np.where(np.isin(kind, (_TU, _LU)), 0.1 + 1.9 * state["clone"], 1.0),
        "hidden interferon": np.exp(0.8 * state["interferon"]),
    }
    for program, factor in modulation.items():
        rate[:, (var["program"] == program).to_numpy()] *= factor[:, None]
    return rate


def _molecules(rng: np.random.Generator, tissue: Tissue, rate: np.ndarray, dispersion: np.ndarray):
    """Negative-binomial counts per cell, and the place of each molecule (float32, µm), its cell and its gene."""
    shape = 1 / dispersion
    counts = rng.poisson(rng.gamma(shape, rate / shape)).astype(np.int32)
    cell, gene = np.nonzero(counts)
    repeats = counts[cell, gene]
    cell, gene = np.repeat(cell, repeats), np.repeat(gene, repeats)
    outer, inner = _support(tissue)
    radius = np.sqrt(rng.uniform(inner[cell] ** 2, outer[cell] ** 2))
    phi = rng.uniform(0, 2 * np.pi, len(cell))
    center = tissue.cells[["x", "y"]].to_numpy()[cell]
    xy = (center + radius[:, None] * np.stack([np.cos(phi), np.sin(phi)], 1)).astype(np.float32)
    return counts, xy, cell, gene


def _support(tissue: Tissue) -> tuple[np.ndarray, np.ndarray]:
    """Outer and inner radius (µm) between which a cell's molecules are uniform; the RNA of fat lies at its rim."""
    outer = tissue.cells["radius"].to_numpy() * 0.998
    return outer, np.where(tissue.cells["cell_type"] == "adipocyte", 0.85 * outer, 0.0)


def _lens(d: np.ndarray, r: np.ndarray, big: float) -> np.ndarray:
    """Area shared by circles of radius `r` and `big` whose centers are `d` apart."""
    d, small = np.maximum(d, 1e-9), np.maximum(r, 1e-9)
    a = np.arccos(np.clip((d**2 + small**2 - big**2) / (2 * d * small), -1, 1))
    b = np.arccos(np.clip((d**2 + big**2 - small**2) / (2 * d * big), -1, 1))
    kite = np.maximum((-d + small + big) * (d + small - big) * (d - small + big) * (d + small + big), 0)
    return np.where(r > 0, small**2 * a + big**2 * b - 0.5 * np.sqrt(kite), 0.0)


def _overlap(spots: np.ndarray, tissue: Tissue, radius: float) -> sp.csr_matrix:
    """Fraction of each cell's molecules that is expected within each spot, ``(n_spots, n_cells)``."""
    outer, inner = _support(tissue)
    xy = tissue.cells[["x", "y"]].to_numpy()
    near = cKDTree(spots).sparse_distance_matrix(cKDTree(xy), radius + outer.max(), output_type="coo_matrix")
    r, q = outer[near.col], inner[near.col]
    share = (_lens(near.data, r, radius) - _lens(near.data, q, radius)) / (np.pi * (r**2 - q**2))
    share = np.clip(share, 0, 1) * (share > 1e-9)
    matrix = sp.csr_matrix((share, (near.row, near.col)), shape=near.shape)
    matrix.eliminate_zeros()
    return matrix


def _spot_grid(tissue: Tissue, pitch: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Centers (µm) and array positions of a hexagonal grid, where the tissue covers the spot's center."""
    step = pitch * np.sqrt(3) / 2
    rows, cols = int((tissue.size_um - 2 * radius) // step) + 1, int((tissue.size_um - 2 * radius) // pitch) + 1
    i, j = (a.ravel() for a in np.mgrid[:rows, :cols])
    xy = radius + np.stack([(j + 0.5 * (i % 2)) * pitch, i * step], 1)
    xy += np.maximum((tissue.size_um - 2 * radius - np.array([(cols - 1) * pitch, (rows - 1) * step])) / 2, 0)
    keep = (xy <= tissue.size_um - radius).all(1) & (at_points(tissue.outline, xy) > 0.3 * radius)
    return xy[keep], np.stack([i, 2 * j + i % 2], 1)[keep]


@check_types
def simulated_section(
    *,
    seed: int = 0,
    size_um: float = 1000.0,
    mpp: float = 1.0,
    n_genes: int = 60,
    patient: int | None = None,
    capture_efficiency: float = 0.2,
    spot_diameter_um: float = 55.0,
    spot_pitch_um: float = 100.0,
) -> SpatialData:
    """A simulated section of breast tumor whose truth is known: H&E image, molecules, cells and spots.

    **This is not real tissue.** Tumor nests, collagen with fibroblasts, ducts and acini, immune aggregates, vessels and
    fat are drawn at random, filled with cells of nine types, and rendered as an H&E image through the optical
    densities of hematoxylin, eosin and red blood cells. Each type has a gene program. Counts per cell are negative
    binomial, each molecule has a place inside its cell, and spots count the molecules within their disc.

    Morphology predicts expression, but not all of it: B and T cells differ by where they lie more than by how they
    look, ``ESR1`` follows a tumor clone and ``IFI6`` an interferon response which leave no trace in the image, ``FOS``
    and ``JUN`` depend on position alone, and the chance to capture a molecule drifts slowly across the section.

    Parameters
    ----------
    seed
        Layout, cells and molecules. The same arguments give the same section, bit for bit, on the same machine.
    size_um
        Side of the square section in µm, at least 300.
    mpp
        µm per pixel of the image, between 0.1 and 10. Tissue and counts do not depend on it.
    n_genes
        Number of genes. The first 60 are named after markers; then come two mitochondrial and two ribosomal genes,
        so that gene selection has something to leave out, then genes named ``SIM0064``, ... with random programs. A
        gene's program is the same for every `seed`, `patient` and `n_genes`, so that a model trained on one section
        can be tested on another.
    patient
        Seed of what differs between patients and slides: stain vectors and strengths, white point and sequencing
        depth (sd 25 %). By default every `seed` is another patient.
    capture_efficiency
        Probability that a molecule of a cell is seen, in (0, 1]. The default leaves 700 to 2,000 molecules of
        60 genes in the median spot, depending on the patient's depth.
    spot_diameter_um, spot_pitch_um
        Diameter of the spots, and distance between neighbors on the hexagonal grid, in µm.

    Returns
    -------
    SpatialData
        All elements share the coordinate system ``"um"`` (micrometers; x to the right, y down; the image's pixel
        ``(i, j)`` covers ``j * mpp <= x < (j + 1) * mpp``, ``i * mpp <= y < (i + 1) * mpp``):

        - ``images["he"]``: uint8 ``(3, y, x)``, channels ``r``, ``g``, ``b``; multiscale above 2048 pixels per side.
        - ``points["transcripts"]``: one row per molecule, ``x``, ``y``, ``gene``, ``cell_id``.
        - ``shapes["cells"]``: circles that do not overlap; ``shapes["spots"]``: circles where there is tissue.
        - ``tables["cell_counts"]``: ``X`` counts (float32 CSR) = molecules by ``cell_id``; ``layers["rate"]`` the
          noise-free expected counts (float32); ``obs["cell_type"]``; ``obsm["spatial"]`` in µm.
        - ``tables["spot_counts"]``: ``X`` counts = molecules within the spot; ``layers["rate"]`` the expected
          counts; ``obs``: ``array_row``, ``array_col``, ``n_cells`` (cells with more than half of their molecules
          in the spot); ``obsm["spatial"]`` in µm; ``obsm["cell_type_fractions"]``, a data frame. A spot over an empty
          lumen or fat can have few molecules.
        - ``var`` of both tables: ``program`` and ``dispersion`` (variance = mean + dispersion * mean**2 per cell).
        - ``attrs["stgen"]["simulated"]``: the arguments, and ``depth``, the patient's factor on all rates.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(seed=0, size_um=500)
    >>> sdata["spot_counts"].layers["rate"].shape == sdata["spot_counts"].shape
    True
    """
    _check(seed, size_um, mpp, n_genes, patient, capture_efficiency, spot_diameter_um, spot_pitch_um)
    patient = seed if patient is None else patient
    layout, molecules, pixels = (np.random.default_rng([seed, k]) for k in range(3))
    person = np.random.default_rng([patient, 77])
    stain, depth = Stain.draw(person), float(np.exp(person.normal(0, 0.25)))

    tissue = draw_tissue(layout, float(size_um))
    var, levels = _gene_programs(n_genes)
    cell_rate = _cell_rates(tissue, var, levels, capture_efficiency * depth)
    cell_counts, xy, cell, gene = _molecules(molecules, tissue, cell_rate, var["dispersion"].to_numpy())
    radius = spot_diameter_um / 2
    spots, array = _spot_grid(tissue, spot_pitch_um, radius)
    spot_counts = _pool(xy, cell, gene, tissue, spots, radius, n_genes)
    share = _overlap(spots, tissue, radius)
    image = render(tissue, stain, mpp, pixels)

    kinds = tissue.cells["cell_type"]
    centers = tissue.cells[["x", "y"]].to_numpy()
    by_type = share @ np.eye(len(CELL_TYPES))[kinds.cat.codes]
    by_type = by_type / np.maximum(by_type.sum(1, keepdims=True), 1e-12)
    n_cells = np.asarray((share > 0.5).sum(1)).ravel()
    spot_obs = {"array_row": array[:, 0], "array_col": array[:, 1], "n_cells": n_cells}
    cell_table = _table(cell_counts, cell_rate, var, centers, "cells", "cell_id", {"cell_type": kinds.to_numpy()})
    spot_table = _table(spot_counts, share @ cell_rate, var, spots, "spots", "spot_id", spot_obs)
    spot_table.obsm["cell_type_fractions"] = pd.DataFrame(by_type, spot_table.obs_names, list(CELL_TYPES))
    points = pd.DataFrame({"x": xy[:, 0], "y": xy[:, 1], "gene": pd.Categorical.from_codes(gene, var.index)})
    points["cell_id"] = cell.astype(np.int64)

    um = {"um": Identity()}
    sdata = SpatialData.init_from_elements(
        {
            "he": Image2DModel.parse(
                da.from_array(image, chunks=(3, 512, 512), name=False),
                dims=("c", "y", "x"),
                c_coords=["r", "g", "b"],
                transformations={"um": Scale([mpp, mpp], axes=("x", "y"))},
                scale_factors=[2, 2] if image.shape[1] > LARGE else None,
                chunks=(3, 512, 512),
            ),
            "transcripts": PointsModel.parse(points, feature_key="gene", instance_key="cell_id", transformations=um),
            "cells": ShapesModel.parse(
                centers, geometry=0, radius=tissue.cells["radius"].to_numpy(), transformations=um
            ),
            "spots": ShapesModel.parse(spots, geometry=0, radius=radius, transformations=um),
            "cell_counts": cell_table,
            "spot_counts": spot_table,
        }
    )
    sdata.attrs["stgen"] = {
        "simulated": {
            "function": "datasets.simulated_section",
            "seed": int(seed),
            "patient": int(patient),
            "size_um": float(size_um),
            "mpp": float(mpp),
            "n_genes": int(n_genes),
            "capture_efficiency": float(capture_efficiency),
            "spot_diameter_um": float(spot_diameter_um),
            "spot_pitch_um": float(spot_pitch_um),
            "depth": depth,
            "unit": "counts",
            "version": version("stgen"),
        }
    }
    return sdata


def _check(seed, size_um, mpp, n_genes, patient, capture_efficiency, spot_diameter_um, spot_pitch_um) -> None:
    """Refuse arguments out of range, before any work."""
    for name, value, least in (("seed", seed, 0), ("patient", patient, 0), ("n_genes", n_genes, 1)):
        if value is None and name == "patient":
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} has to be an integer, found {value!r}. Pass {name}={least}, for example.")
        if value < least:
            raise ValueError(f"{name} has to be at least {least}, found {value}. Pass {name}={least}, for example.")
    for name, value, low, high in (
        ("size_um", size_um, 300.0, 20000.0),
        ("mpp", mpp, 0.1, 10.0),
        ("capture_efficiency", capture_efficiency, 1e-4, 1.0),
        ("spot_pitch_um", spot_pitch_um, 2.0, size_um / 2),
        ("spot_diameter_um", spot_diameter_um, 1.0, spot_pitch_um),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} has to lie between {low:g} and {high:g}, found {value!r}.")


def _pool(xy, cell, gene, tissue: Tissue, spots: np.ndarray, radius: float, n_genes: int) -> np.ndarray:
    """Count the molecules within each spot's disc, ``(n_spots, n_genes)``."""
    tree = cKDTree(spots)
    centers = tissue.cells[["x", "y"]].to_numpy()
    touched = tree.query(centers)[0] <= radius + tissue.cells["radius"].to_numpy()
    touched = np.flatnonzero(touched[cell])
    places = xy[touched].astype(float)
    spot = tree.query(places)[1]
    inside = ((places - spots[spot]) ** 2).sum(1) <= radius**2
    flat = spot[inside] * n_genes + gene[touched[inside]]
    return np.bincount(flat, minlength=len(spots) * n_genes).reshape(len(spots), n_genes)


def _table(counts, rate, var: pd.DataFrame, xy: np.ndarray, region: str, instance: str, obs: dict) -> AnnData:
    """Make a table that annotates the shapes `region`."""
    names = pd.Index([f"{instance.removesuffix('_id')}{i}" for i in range(len(xy))])
    frame = pd.DataFrame(obs, index=names)
    frame["region"] = pd.Categorical([region] * len(xy))
    frame[instance] = np.arange(len(xy), dtype=np.int64)
    table = AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=frame, var=var.copy())
    table.layers["rate"] = np.asarray(rate, np.float32)
    table.obsm["spatial"] = np.asarray(xy, np.float64)
    return TableModel.parse(table, region=region, region_key="region", instance_key=instance)
