"""Readers of public sections, from a local folder or from their public source."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale
from xarray import DataTree

from stgen._checks import check_types

logger = logging.getLogger("stgen")

_HER2ST = "https://raw.githubusercontent.com/almaan/her2st/85df7411b987a7dec3feff9718b869a7a82091ec/data"
_STUTILITY = (
    "https://raw.githubusercontent.com/jbergenstrahle/STUtility/"
    "9a8f421499e58b13340ee386db07b0eba923c88c/inst/extdata/counts"
)

# section -> name of the image at its source; sha256 of image, counts and spots
_HER2ST_SECTIONS = {
    "B4": (
        "BT10737_D2_HE",
        "3cb165614ce2a13426381e450220dccac980cc9bda6a90fb041c28ca0e2c753d",
        "e38231c2a38c9bc7e6d550eec0e527c1869ee0e525fc913e708d1323c34f5ebb",
        "192b46f3ca414c85753a01a4fb5760a697ca6c0a1aadb949c4687cc6efa9faa0",
    ),
    "C2": (
        "5714_HE_BT_C2",
        "26e2f73ae840cdd46c5bba405aae181f13a56a376b9848dff23f7a9c5de7f19e",
        "c1c59ea6cffae36b9ecb561b8e2a97e3aa5f4085f748e991a0e330ed9d09773d",
        "235b5f4306b3b57c628ffc82c98c7109602474fbcc79a917b9c50517f99b6b1c",
    ),
    "C3": (
        "5714_HE_BT_D1",
        "0005a92674014d473040a28f0afca89ce5fa5c44019b479b638ceb3272ceb568",
        "e00c55a3eb9caac5d9c71b8906aae8be8b38f93e23938f4a0ebee17683ef6a2a",
        "7fd76c13370b7804ac3bb377b846d22485cf9223f9dd8dfc25be06e5aaf65755",
    ),
    "C4": (
        "5714_HE_BT_D2",
        "f40607eb1d5f0d125decd71c48b0c5d29cf6776ad92297fd185631208c82d6f2",
        "33201f76d41d7131dc600a0f87d9a70383af3503e81698b4d11e6f2e8d73e9da",
        "47e79f3b9dbfa3a8c18af9e948ba7ba4bf0a75ea1b4c292bc714ced7d0917d4c",
    ),
    "C5": (
        "5714_HE_BT_E1",
        "34028ea41e376396b50c42b0a11a7e689c85be4a8022e668d0a09cc128c04c65",
        "c0f310315ca6110d74dbdf7011e5b42432ba0b8eb5f001824764911988f39338",
        "2114cc3b4da759772112897f1e247d5443c9f8c808e6a9a952eb4fda379a194c",
    ),
}
# section -> sha256 of image, counts and alignment (the two tables unpacked)
_MOB_SECTIONS = {
    "MOB1": (
        "c1c292187221bab077ac1b15e95cf665db35684c98d6193af56d2e8b7772fe20",
        "82c0691f800355369fd8a72ff44ba1e3112d4e44a790f490a9fa267876a9352e",
        "91ade06cf93bc0b3cd728846c34e310a8365200d1ad33498e6a0eb6951a92164",
    ),
    "MOB2": (
        "1079fe52f600ec212a6a59cef76b8697fcd776d0cdb10461ad3bb738eaa5c0b6",
        "449dcc351ede5c63f9afe313479dbb830ba32c6e86b56b258276304102d1f7e9",
        "6d86b226386b0a08f825b3bff4b5c359f00fd52d3f53d77db0376b0f7e0ec30d",
    ),
    "MOB3": (
        "0ac2c820ca6614e3ebc7fef3004a85c4623093b10741858e5c5328d7310606ca",
        "f0b9601a10d627d372c412cad4a4dde2a1dee9f2433e51f07ca26d534be015ea",
        "da0ce26ad12b94b6d0784ddc1c0c76e998d3bbd2579bad6aa8c4ac2c4f7f2e33",
    ),
}
_PANCREAS_FILES = ("dapi.jpg", "bound.jpg", "rna.jpg", "prot.jpg", "transcripts.parquet", "cells.h5ad")
_PANCREAS_MPP = 0.85


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """One file: its name in the local layout, and where it can be had. The sha256 is that of the unpacked content."""

    name: str
    url: str | None = None
    sha256: str | None = None


def _her2st_files(section: str) -> list[_File]:
    """Image, counts and spots of a section."""
    source, image, counts, spots = _HER2ST_SECTIONS[section]
    return [
        _File(f"{section}.jpg", f"{_HER2ST}/ST-imgs/{section[0]}/{section}/{source}.jpg", image),
        _File(f"{section}.tsv.gz", f"{_HER2ST}/ST-cnts/{section}.tsv.gz", counts),
        _File(f"{section}_selection.tsv", f"{_HER2ST}/ST-spotfiles/{section}_selection.tsv", spots),
    ]


def _mob_files(section: str) -> list[_File]:
    """Image, counts and alignment of a section. The tables are packed in the local layout, plain at their source."""
    image, counts, alignment = _MOB_SECTIONS[section]
    return [
        _File(f"{section}.jpg", f"{_STUTILITY}/{section}.jpg", image),
        _File(f"{section}.tsv.gz", f"{_STUTILITY}/{section}.tsv", counts),
        _File(f"{section}_alignment.tsv.gz", f"{_STUTILITY}/alignment_table_{section}.tsv", alignment),
    ]


def _find(call: str, folder: str, files: list[_File], path: str | os.PathLike | None) -> list[Path]:
    """Find the files below `path`, below ``STGEN_DATA``, or download them.

    `folder` is the place of the files in the local layout, such as ``her2st/C4``; `path` may be the root of the
    layout or any of the folders on the way.
    """
    names = [f.name for f in files]
    root = path if path is not None else os.environ.get("STGEN_DATA")
    if root:
        parts = folder.split("/")
        places = [Path(root).expanduser().joinpath(*parts[k:]) for k in range(len(parts) + 1)]
        for place in places:
            if all((place / name).is_file() for name in names):
                return [place / name for name in names]
        missing = [name for name in names if not (places[0] / name).is_file()]
        origin = f"path={os.fspath(path)!r}" if path is not None else f"STGEN_DATA={root!r}"
        if path is not None or any(f.url is None for f in files):
            raise FileNotFoundError(
                f"{origin} has no complete {folder}: {places[0]} lacks {', '.join(missing)}. "
                f"Pass the folder that holds {folder}/{names[0]}: {call.format(path='path=...')}"
                + ("." if any(f.url is None for f in files) else ", or leave path out to download the section.")
            )
        logger.info("%s has no complete %s; looking for it at its public source.", origin, folder)
    sources = [(f.url, f.sha256) for f in files if f.url is not None and f.sha256 is not None]
    if len(sources) < len(files):
        raise FileNotFoundError(
            f"{folder} was put together from tiles and cannot be downloaded. It needs a folder with "
            f"{', '.join(names)}: {call.format(path='path=...')}, or set the environment variable STGEN_DATA to the "
            f"folder that holds {folder}."
        )
    return [_download(url, sha256, folder, call) for url, sha256 in sources]


def _download(url: str, sha256: str, folder: str, call: str) -> Path:
    """Fetch one file into the cache, and verify its checksum."""
    import pooch

    cache = Path(pooch.os_cache("stgen")) / folder
    try:
        got = pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=url.rsplit("/", 1)[1], path=cache)
    except OSError as error:
        raise ConnectionError(
            f"Could not download {url} ({error}). Download it by hand, and pass the folder: "
            f"{call.format(path='path=...')}."
        ) from error
    return Path(got)


def _known(section: str, known: list[str], function: str) -> None:
    if section not in known:
        raise KeyError(
            f"Unknown section {section!r}; the known ones are {', '.join(known)}. "
            f"Call stgen.datasets.{function}({known[0]!r}), for example."
        )


# ---- elements -------------------------------------------------------------------------------------------------------


def _read_jpeg(path: Path) -> np.ndarray:
    """Decode to uint8 ``(h, w)`` or ``(h, w, 3)``; scans are large, and trusted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            return np.asarray(image)


def _image(pixels: np.ndarray, names: list[str], mpp: float, n_scales: int) -> DataTree:
    """Make a multiscale image element from ``(c, y, x)``; each scale is the 2 x 2 mean of the one before.

    The few rows and columns at the lower and right edge that would leave a remainder are cut, so that scales are exact.
    """
    chunks = (len(names), 1024, 1024)
    whole = 2 ** (n_scales - 1)
    pixels = pixels[:, : pixels.shape[1] // whole * whole, : pixels.shape[2] // whole * whole]
    tree = Image2DModel.parse(
        da.from_array(pixels, chunks=chunks, name=False),
        dims=("c", "y", "x"),
        c_coords=names,
        transformations={"um": Scale([mpp, mpp], axes=("x", "y"))},
        scale_factors=[2] * (n_scales - 1),
        chunks=chunks,
    )
    for k in range(1, n_scales):  # held in memory: a lazy pyramid would read the full image for every thumbnail
        total = np.full((len(names), pixels.shape[1] // 2, pixels.shape[2] // 2), 2, np.uint16)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            total += pixels[:, i::2, j::2]
        pixels = (total // 4).astype(np.uint8)
        level = tree[f"scale{k}"]["image"]
        tree[f"scale{k}"]["image"] = level.copy(data=da.from_array(pixels, chunks=chunks, name=False))
    Image2DModel().validate(tree)
    return tree


def _circles(xy_um: np.ndarray, radius_um: float | np.ndarray):
    return ShapesModel.parse(xy_um, geometry=0, radius=radius_um, transformations={"um": Identity()})


def _link(table: ad.AnnData, xy_um: np.ndarray, region: str, instance_key: str) -> ad.AnnData:
    """Tie a table to the shapes `region`, row by row."""
    table.obs["region"] = pd.Categorical([region] * table.n_obs)
    table.obs[instance_key] = np.arange(table.n_obs, dtype=np.int64)
    table.obsm["spatial"] = xy_um
    return TableModel.parse(table, region=region, region_key="region", instance_key=instance_key)


def _read_counts(path: Path) -> pd.DataFrame:
    """Spots x genes from a tab-separated table whose rows are called ``"10x21"``."""
    counts = pd.read_csv(path, sep="\t", index_col=0, low_memory=False)
    counts.index, counts.columns = counts.index.astype(str), counts.columns.astype(str)
    return counts


def _spot_table(counts: pd.DataFrame, spots: pd.DataFrame) -> tuple[ad.AnnData, np.ndarray]:
    """Join counts with positions; keep what has both. Returns the table and the centers in pixels, ``(n, 2)``."""
    spots = spots.set_index(spots["x"].astype(str) + "x" + spots["y"].astype(str))
    names = counts.index[counts.index.isin(spots.index)]
    spots = spots.loc[names]
    obs = pd.DataFrame({"array_col": spots["x"].to_numpy(), "array_row": spots["y"].to_numpy()}, index=names)
    table = ad.AnnData(
        sp.csr_matrix(counts.loc[names].to_numpy(np.float32)), obs=obs, var=pd.DataFrame(index=counts.columns)
    )
    table.var_names_make_unique()
    return table, spots[["pixel_x", "pixel_y"]].to_numpy(float)


def _spot_section(files: list[Path], spots: pd.DataFrame, mpp: float, radius_um: float, record: dict) -> SpatialData:
    table, xy_px = _spot_table(_read_counts(files[1]), spots)
    xy_um = xy_px * mpp
    image = np.moveaxis(_read_jpeg(files[0]), -1, 0)
    sdata = SpatialData.init_from_elements(
        {
            "he": _image(image, ["r", "g", "b"], mpp, 4 if max(image.shape) > 4096 else 2),
            "spots": _circles(xy_um, radius_um),
            "spot_counts": _link(table, xy_um, "spots", "spot_id"),
        }
    )
    record |= {"mpp": float(mpp), "unit": "counts", "version": version("stgen")}
    sdata.attrs["stgen"] = {"source": record}
    return sdata


# ---- public ---------------------------------------------------------------------------------------------------------


def _array_pitch(spots: pd.DataFrame) -> float:
    """Pixels between neighboring positions of the array, from positions in array units and in pixels."""
    steps = [np.polyfit(spots[f"new_{axis}"], spots[f"pixel_{axis}"], 1)[0] for axis in "xy"]
    return float(np.sqrt(np.prod(steps)))


@check_types
def her2st(section: str, *, path: str | os.PathLike | None = None) -> SpatialData:
    """A section of HER2-positive breast cancer: H&E and Spatial Transcriptomics with 100 µm spots.

    Sections B4 and C2 to C5 of the her2st study (Andersson et al. 2021, github.com/almaan/her2st); C2 to C5 are one
    block of one patient, and B4 is another patient with a tenth of the depth. The repository states no license for the
    data.

    Parameters
    ----------
    section
        One of ``"B4"``, ``"C2"``, ``"C3"``, ``"C4"``, ``"C5"``.
    path
        Folder with ``her2st/<section>/<section>.jpg``, ``<section>.tsv.gz`` and ``<section>_selection.tsv`` (or one of
        the folders within). By default the environment variable ``STGEN_DATA``, else the files (about 6 MB per
        section) are downloaded, checked and kept in pooch's cache.

    Returns
    -------
    SpatialData
        In the coordinate system ``"um"`` (micrometers; x to the right, y down):

        - ``images["he"]``: uint8 ``(3, y, x)``, about 9,300 x 9,900 pixels, four scales (up to 7 pixels at the lower
          and right edge are cut so that scales are exact).
        - ``shapes["spots"]``: circles of radius 50 µm.
        - ``tables["spot_counts"]``: ``X`` counts (float32 CSR) of all genes, for the spots that have counts and a
          position; ``obs_names`` such as ``"10x21"``; ``obs``: ``array_col``, ``array_row``; ``obsm["spatial"]`` in µm.
        - ``attrs["stgen"]["source"]``: where it comes from, and ``mpp``.

    Raises
    ------
    KeyError
        If the section is unknown.
    FileNotFoundError
        If `path` lacks a file.
    ConnectionError
        If the download fails.

    Notes
    -----
    ``pixel_x`` and ``pixel_y`` of the spot file are column and row of the spot's center in the full-size image. They
    are an exact linear function of the positions in units of the array, whose pitch is 200 µm; this gives about
    0.688 µm per pixel in each section. (The median distance to the nearest spot is 7 % less than the pitch, because
    spots are printed with scatter.)

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.her2st("C4")  # doctest: +SKIP
    """
    _known(section, list(_HER2ST_SECTIONS), "her2st")
    call = f"stgen.datasets.her2st({section!r}, {{path}})"
    files = _find(call, f"her2st/{section}", _her2st_files(section), path)
    spots = pd.read_csv(files[2], sep="\t")
    mpp = 200.0 / _array_pitch(spots)
    record = {"function": "datasets.her2st", "section": section, "url": "https://github.com/almaan/her2st"}
    return _spot_section(files, spots, mpp, 50.0, record)


@check_types
def mouse_olfactory_bulb(
    section: str, *, path: str | os.PathLike | None = None, mpp: float = 141.0 / 31.75
) -> SpatialData:
    """A section of mouse olfactory bulb: H&E and Spatial Transcriptomics, 1,000 genes.

    Sections MOB1 to MOB3 as distributed with STUtility (github.com/jbergenstrahle/STUtility, MIT license of the
    package).

    Parameters
    ----------
    section
        One of ``"MOB1"``, ``"MOB2"``, ``"MOB3"``.
    path
        Folder with ``st_mouse_olfactory_bulb/<section>.jpg``, ``<section>.tsv.gz`` and
        ``<section>_alignment.tsv.gz`` (or that folder itself). By default the environment variable ``STGEN_DATA``, else
        the files (about 1 MB) are downloaded, checked and kept in pooch's cache.
    mpp
        µm per pixel of the image. **Not stated by the source and not verified:** the default of 4.4 assumes that the
        nearest spots, 31.75 pixels apart, are 141 µm apart (a staggered grid of 200 µm). Everything in µm scales
        with it.

    Returns
    -------
    SpatialData
        In the coordinate system ``"um"`` (micrometers under the assumption above; x to the right, y down):

        - ``images["he"]``: uint8 ``(3, 1904, 1904)``, two scales (one pixel cut at the lower and right edge).
        - ``shapes["spots"]``: circles of radius 50 µm (assumed, as for other arrays of this kind).
        - ``tables["spot_counts"]``: ``X`` counts (float32 CSR) of the spots under tissue; ``var_names`` are Ensembl
          ids with version; ``obs``: ``array_col``, ``array_row``; ``obsm["spatial"]`` in µm.
        - ``attrs["stgen"]["source"]``: where it comes from, and ``mpp``.

    Raises
    ------
    KeyError
        If the section is unknown.
    ValueError
        If `mpp` is not positive.
    FileNotFoundError
        If `path` lacks a file.
    ConnectionError
        If the download fails.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.mouse_olfactory_bulb("MOB1")  # doctest: +SKIP
    """
    _known(section, list(_MOB_SECTIONS), "mouse_olfactory_bulb")
    if not mpp > 0:
        raise ValueError(f"mpp has to be positive, found {mpp!r}. Leave it out to use {141 / 31.75:.3f} µm per pixel.")
    call = f"stgen.datasets.mouse_olfactory_bulb({section!r}, {{path}})"
    files = _find(call, "st_mouse_olfactory_bulb", _mob_files(section), path)
    spots = pd.read_csv(files[2], sep="\t")
    record = {
        "function": "datasets.mouse_olfactory_bulb",
        "section": section,
        "url": "https://github.com/jbergenstrahle/STUtility",
    }
    return _spot_section(files, spots[spots["selected"] == 1], float(mpp), 50.0, record)


@check_types
def xenium_pancreas(*, path: str | os.PathLike | None = None) -> SpatialData:
    """A section of human pancreas measured with Xenium: 377 genes, 5.5 million molecules, four stains. Not H&E.

    The left 5.7 x 2.9 mm of 10x Genomics' FFPE human pancreas with the multimodal segmentation stains, put together
    from the tiles in github.com/broadinstitute/celldega_Xenium_human_Pancreas_FFPE (Broad Academic Software License;
    the data are 10x Genomics'). It cannot be downloaded from here.

    Parameters
    ----------
    path
        Folder with ``xenium_pancreas_if/`` (or that folder itself), which holds ``dapi.jpg``, ``bound.jpg``,
        ``rna.jpg``, ``prot.jpg``, ``transcripts.parquet`` and ``cells.h5ad``. By default the environment variable
        ``STGEN_DATA``.

    Returns
    -------
    SpatialData
        In the coordinate system ``"um"`` (micrometers; x to the right, y down):

        - ``images["stains"]``: uint8 ``(4, 3440, 6700)`` at 0.85 µm per pixel, channels ``dapi``, ``bound`` (membrane),
          ``rna`` (18S) and ``prot`` (SMA/vimentin), three scales.
        - ``points["transcripts"]``: ``x``, ``y``, ``gene``. Stored pixel ``(column, row)`` becomes
          ``0.85 * (column + 0.5)``, ``0.85 * (row + 0.5)``, the center of the pixel; precision 0.85 µm.
        - ``shapes["cells"]``: circles with the area of the segmented cell; ``tables["cell_counts"]``: ``X`` counts
          (float32 CSR); ``obs``: ``cluster`` (10x's graph clusters, made from expression), ``area_um2``;
          ``obsm["spatial"]`` in µm. The cells hold 66 % of the molecules.
        - ``attrs["stgen"]["source"]``: where it comes from, and ``mpp``.

    Raises
    ------
    FileNotFoundError
        If the folder or a file is missing.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.xenium_pancreas(path="data")  # doctest: +SKIP
    """
    names = [_File(name) for name in _PANCREAS_FILES]
    *stains, molecules, cells = _find("stgen.datasets.xenium_pancreas({path})", "xenium_pancreas_if", names, path)
    image = np.stack([_read_jpeg(p) for p in stains])

    points = pd.read_parquet(molecules, columns=["x", "y", "gene"])
    for axis in "xy":
        points[axis] = (np.float32(_PANCREAS_MPP) * (points[axis].to_numpy(np.float32) + 0.5)).astype(np.float32)
    read = ad.read_h5ad(cells)
    obs = pd.DataFrame(
        {"cluster": read.obs["cluster"], "area_um2": read.obs["area_px"] * _PANCREAS_MPP**2}, index=read.obs_names
    )
    table = ad.AnnData(sp.csr_matrix(read.X, dtype=np.float32), obs=obs, var=pd.DataFrame(index=read.var_names))
    xy_um = read.obs[["x_px", "y_px"]].to_numpy(float) * _PANCREAS_MPP
    radius = np.sqrt(obs["area_um2"].to_numpy(float) / np.pi)
    sdata = SpatialData.init_from_elements(
        {
            "stains": _image(image, [Path(name).stem for name in _PANCREAS_FILES[:4]], _PANCREAS_MPP, 3),
            "transcripts": PointsModel.parse(points, feature_key="gene", transformations={"um": Identity()}),
            "cells": _circles(xy_um, radius),
            "cell_counts": _link(table, xy_um, "cells", "cell_id"),
        }
    )
    sdata.attrs["stgen"] = {
        "source": {
            "function": "datasets.xenium_pancreas",
            "url": "https://github.com/broadinstitute/celldega_Xenium_human_Pancreas_FFPE",
            "mpp": _PANCREAS_MPP,
            "unit": "counts",
            "version": version("stgen"),
        }
    }
    return sdata
