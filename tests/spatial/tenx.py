"""Small sections in the file formats of 10x Genomics, and the readers of spatialdata-io that read them.

Everything is written from a section of :func:`stgen.datasets.simulated_section`, so that counts and histology are
related and the truth is known; molecules, cells, spots and image are where they are in the section, x and y in µm.
What an instrument does that matters to whoever reads its files is kept: barcodes in another order than the spots, spots
off the tissue, control probes, pixels as the unit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import spatialdata_io
import tifffile
import zarr
from anndata import AnnData
from PIL import Image
from scipy import sparse
from scipy.ndimage import binary_dilation
from skimage.draw import polygon
from spatialdata import SpatialData
from spatialdata_io.readers.xenium import cell_id_str_from_prefix_suffix_uint32

from stgen._spatial.image import affine_to, image_levels

PIXEL_UM = 0.2125  # of Xenium
CONTROL = "NegControlProbe_00042"  # of Xenium, beside the genes
SMALLER = {"hires": 2, "lowres": 5}  # images of Space Ranger: how many times smaller they are
SPOT_UM = 65.0  # of which Space Ranger states the diameter, though spots capture what lies within 55 µm


# ---- Visium ----------------------------------------------------------------------------------------------------------


def write_visium(folder: str | Path, section: SpatialData, *, fullres: bool = True) -> None:
    """Write the spots of a simulated section as Space Ranger does (``outs``), with counts as they are.

    Written are ``filtered_feature_bc_matrix.h5`` (spots on tissue, by barcode) and, in ``spatial``,
    ``tissue_positions.csv`` (all spots), ``scalefactors_json.json``, ``tissue_hires_image.png`` (half the size) and
    ``tissue_lowres_image.png`` (a fifth).

    Parameters
    ----------
    folder
        New folder.
    section
        Of :func:`stgen.datasets.simulated_section`, with spots 100 µm apart. Pixels are those of its image.
    fullres
        Whether to write the image as ``tissue_image.tif`` too, which is input of Space Ranger, not output.
    """
    folder = Path(folder)
    image, mpp = _image(section)
    spots = section["spot_counts"]
    names = _barcodes(spots.n_obs)
    _write_matrix(folder / "filtered_feature_bc_matrix.h5", spots, names, library="section")
    _write_images(folder / "spatial", image)
    _write_scalefactors(
        folder / "spatial", image, spot_diameter_fullres=SPOT_UM / mpp, fiducial_diameter_fullres=105 / mpp
    )
    _all_spots(spots, names, mpp).to_csv(folder / "spatial" / "tissue_positions.csv")
    if fullres:
        tifffile.imwrite(folder / "tissue_image.tif", image, photometric="rgb")


def read_visium(folder: str | Path, *, dataset_id: str = "section") -> SpatialData:
    """What :func:`spatialdata_io.visium` makes of it, the full-resolution image included where there is one.

    Elements are ``<dataset_id>`` (spots), ``table`` and the images ``<dataset_id>_full_image``, ``..._hires_image`` and
    ``..._lowres_image``; the coordinate system ``<dataset_id>`` is in pixels of the full-resolution image.
    """
    fullres = "tissue_image.tif" if (Path(folder) / "tissue_image.tif").exists() else None
    return spatialdata_io.visium(folder, dataset_id=dataset_id, fullres_image_file=fullres)


def _all_spots(spots: AnnData, names: list[str], mpp: float) -> pd.DataFrame:
    """Every spot of the slide, on tissue or not, from the first row and column to the last, by barcode."""
    array, xy = spots.obs[["array_row", "array_col"]].to_numpy(), spots.obsm["spatial"]
    rows, columns = np.mgrid[: array[:, 0].max() + 1, : array[:, 1].max() + 1].reshape(2, -1)
    on_array = (rows + columns) % 2 == (array[0].sum() % 2)
    slide = np.column_stack([rows, columns])[on_array]
    place = np.linalg.lstsq(np.column_stack([array, np.ones(len(array))]), xy, rcond=None)[0]  # exact: it is a lattice
    x, y = (np.column_stack([slide, np.ones(len(slide))]) @ place).T / mpp
    on_tissue = {tuple(place): name for place, name in zip(array.tolist(), names, strict=True)}
    off_tissue = iter(_barcodes(len(slide), first=len(names)))
    barcodes = [on_tissue.get(tuple(place)) or next(off_tissue) for place in slide.tolist()]
    frame = {
        "in_tissue": [int(tuple(place) in on_tissue) for place in slide.tolist()],
        "array_row": slide[:, 0], "array_col": slide[:, 1], "pxl_row_in_fullres": y, "pxl_col_in_fullres": x,
    }  # fmt: skip
    return pd.DataFrame(frame, index=pd.Index(barcodes, name="barcode"))


# ---- Visium HD -------------------------------------------------------------------------------------------------------


def write_visium_hd(
    folder: str | Path, section: SpatialData, *, bin_um: int = 16, corner_um: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Count the molecules of a simulated section in square bins, and write them as Space Ranger does (``outs``).

    Written are, in ``binned_outputs/square_<bin_um>um``, ``filtered_feature_bc_matrix.h5`` (bins with a molecule in or
    beside them), ``spatial/tissue_positions.parquet`` (all bins) and ``spatial/scalefactors_json.json``;
    ``feature_slice.h5`` (its metadata), the images in ``spatial`` and ``microscope_image/tissue_image.tif``.

    Parameters
    ----------
    folder
        New folder.
    section
        Of :func:`stgen.datasets.simulated_section`. Pixels are those of its image.
    bin_um
        Side of a bin in µm.
    corner_um
        Upper left corner of the capture area as x, y in µm, on which only whole bins of the image count.
    """
    folder = Path(folder)
    image, mpp = _image(section)
    size = (np.array(image.shape[1::-1]) * mpp - corner_um) // bin_um
    width, height = size.astype(int)
    molecules = section["transcripts"][["x", "y", "gene"]].compute()
    column, row = np.floor((molecules[["x", "y"]].to_numpy() - corner_um) / bin_um).astype(int).T
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    genes = molecules["gene"].cat.categories
    place = row[inside] * width + column[inside], molecules["gene"].cat.codes[inside]
    counts = sparse.coo_array((np.ones(inside.sum()), place), shape=(height * width, len(genes))).tocsr()
    seen = (counts.sum(1) > 0).reshape(height, width)
    tissue = binary_dilation(seen, np.ones((3, 3))).ravel()

    rows, columns = np.mgrid[:height, :width].reshape(2, -1)
    names = np.array([f"s_{bin_um:03}um_{i:05}_{j:05}-1" for i, j in zip(rows, columns, strict=True)])
    at = folder / "binned_outputs" / f"square_{bin_um:03}um"
    table = AnnData(counts[tissue], var=pd.DataFrame(index=genes))
    _write_matrix(at / "filtered_feature_bc_matrix.h5", table, names[tissue], library="section")
    positions = pd.DataFrame(
        {
            "barcode": names, "in_tissue": tissue.astype(int), "array_row": rows, "array_col": columns,
            "pxl_row_in_fullres": ((rows + 0.5) * bin_um + corner_um[1]) / mpp,
            "pxl_col_in_fullres": ((columns + 0.5) * bin_um + corner_um[0]) / mpp,
        }
    )  # fmt: skip
    (at / "spatial").mkdir()
    positions.to_parquet(at / "spatial" / "tissue_positions.parquet")
    _write_scalefactors(
        at / "spatial", image, spot_diameter_fullres=bin_um / mpp, bin_size_um=float(bin_um), microns_per_pixel=mpp
    )
    _write_images(folder / "spatial", image)
    (folder / "microscope_image").mkdir()
    tifffile.imwrite(folder / "microscope_image" / "tissue_image.tif", image, photometric="rgb")
    with h5py.File(folder / "feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps({"hd_layout_json": json.dumps({"file_format": "1.0"})})


def read_visium_hd(folder: str | Path, *, dataset_id: str = "section") -> SpatialData:
    """What :func:`spatialdata_io.visium_hd` makes of it.

    Elements are ``<dataset_id>_square_016um`` (squares), the table ``square_016um`` and the images of
    :func:`read_visium`; the coordinate system ``<dataset_id>`` is in pixels of the full-resolution image.
    """
    return spatialdata_io.visium_hd(folder, dataset_id=dataset_id, load_segmentations_only=False)


# ---- Xenium ----------------------------------------------------------------------------------------------------------


def write_xenium(folder: str | Path, section: SpatialData) -> None:
    """Write the molecules and cells of a simulated section as the Xenium analyzer does (3.0), and its image as aligned H&E.

    Written are ``experiment.xenium``, ``transcripts.parquet`` (control probes among them), ``cells.parquet``,
    ``cell_feature_matrix.h5``, ``cell_boundaries.parquet``, ``nucleus_boundaries.parquet``, ``cells.zarr.zip`` (masks),
    ``morphology_focus`` (DAPI), and ``section_he_image.ome.tif`` with its alignment, turned by a quarter. Cells are
    polygons of the circles' area; nuclei have half of it.

    Parameters
    ----------
    folder
        New folder.
    section
        Of :func:`stgen.datasets.simulated_section`. Files grow fast with it: a pixel is 0.2125 µm.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    image, mpp = _image(section)
    cells, xy = section["cell_counts"], section["cell_counts"].obsm["spatial"]
    radius = section["cells"]["radius"].to_numpy()
    prefix = np.sort(np.random.default_rng(0).choice(2**32, len(xy), replace=False)).astype(np.uint32)
    names = cell_id_str_from_prefix_suffix_uint32(prefix, np.ones(len(xy), np.uint32))
    specs = {"analysis_sw_version": "xenium-3.0.0.15", "pixel_size": PIXEL_UM, "region_name": "section"}
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    _write_transcripts(folder / "transcripts.parquet", section, names)
    _write_matrix(folder / "cell_feature_matrix.h5", cells, names, library="section", controls=[CONTROL])
    summary = pd.DataFrame(
        {
            "cell_id": names, "x_centroid": xy[:, 0], "y_centroid": xy[:, 1],
            "transcript_counts": np.asarray(cells.X.sum(1)).ravel().astype(int), "cell_area": np.pi * radius**2,
            "nucleus_area": np.pi * radius**2 / 2,
        }
    )  # fmt: skip
    summary.to_parquet(folder / "cells.parquet")
    shape = [round(n * mpp / PIXEL_UM) for n in image.shape[:2]]
    store = zarr.storage.ZipStore(folder / "cells.zarr.zip", mode="w")
    group = zarr.create_group(store, zarr_format=2)
    group.create_array("cell_id", data=np.column_stack([prefix, np.ones_like(prefix)]))
    columns = {"column_names": ["cell_centroid_x", "cell_centroid_y", "z_level", "nucleus_count"]}
    group.create_array(
        "cell_summary", data=np.column_stack([xy, np.zeros(len(xy)), np.ones(len(xy))]), attributes=columns
    )
    for index, (kind, size) in enumerate((("nucleus", radius / np.sqrt(2)), ("cell", radius))):
        outlines = _outlines(xy, size)
        _write_boundaries(folder / f"{kind}_boundaries.parquet", outlines, names)
        group.create_array(f"masks/{index}", data=_mask(outlines / PIXEL_UM, shape))
        group.create_array(f"polygon_sets/{index}/cell_index", data=np.arange(len(xy), dtype=np.uint32))
    store.close()
    dapi = Image.fromarray(255 - image[..., 0]).resize(shape[::-1], Image.Resampling.BILINEAR)
    (folder / "morphology_focus").mkdir()
    tifffile.imwrite(
        folder / "morphology_focus" / "morphology_focus_0000.ome.tif", np.asarray(dapi, np.uint16), ome=True
    )
    tifffile.imwrite(folder / "section_he_image.ome.tif", np.rot90(image), photometric="rgb", ome=True)
    to_pixels = mpp / PIXEL_UM * np.array([[0, -1, image.shape[1]], [1, 0, 0]])
    alignment = np.vstack([to_pixels, [0, 0, 1]])
    np.savetxt(folder / "section_he_imagealignment.csv", alignment, delimiter=",")


def read_xenium(folder: str | Path) -> SpatialData:
    """What :func:`spatialdata_io.xenium` makes of it.

    Elements are ``transcripts``, ``cell_boundaries``, ``nucleus_boundaries``, ``cell_labels``, ``nucleus_labels``,
    ``table``, ``morphology_focus`` and ``he_image``; the coordinate system ``global`` is in pixels of 0.2125 µm.
    """
    return spatialdata_io.xenium(folder)


def _write_transcripts(path: Path, section: SpatialData, names: np.ndarray) -> None:
    molecules = section["transcripts"].compute()
    rng = np.random.default_rng(1)
    n, n_controls = len(molecules), len(molecules) // 100
    x, y = rng.uniform(molecules[["x", "y"]].min(), molecules[["x", "y"]].max(), (n_controls, 2)).T
    frame = {
        "transcript_id": np.arange(n + n_controls, dtype=np.uint64),
        "cell_id": [*names[molecules["cell_id"]], *["UNASSIGNED"] * n_controls],
        "overlaps_nucleus": np.zeros(n + n_controls, np.uint8),
        "feature_name": [*molecules["gene"], *[CONTROL] * n_controls],
        "x_location": np.append(molecules["x"], x).astype(np.float32),
        "y_location": np.append(molecules["y"], y).astype(np.float32),
        "z_location": rng.uniform(10, 20, n + n_controls).astype(np.float32),
        "qv": np.full(n + n_controls, 40, np.float32),
    }
    pd.DataFrame(frame).sample(frac=1, random_state=0).to_parquet(path, index=False)


def _outlines(xy: np.ndarray, radius: np.ndarray, n: int = 24) -> np.ndarray:
    """Closed polygons ``(cells, n + 1, 2)`` in µm, of the area of the circles."""
    angle = 2 * np.pi * np.append(np.arange(n), 0) / n
    reach = radius * np.sqrt(2 * np.pi / (n * np.sin(2 * np.pi / n)))
    return xy[:, None] + reach[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], -1)


def _write_boundaries(path: Path, outlines: np.ndarray, names: np.ndarray) -> None:
    n = outlines.shape[1]
    vertex_x, vertex_y = outlines.reshape(-1, 2).astype(np.float32).T
    label = np.repeat(np.arange(1, len(names) + 1, dtype=np.int32), n)
    frame = {"cell_id": np.repeat(names, n), "vertex_x": vertex_x, "vertex_y": vertex_y, "label_id": label}
    pd.DataFrame(frame).to_parquet(path, index=False)


def _mask(outlines: np.ndarray, shape: list[int]) -> np.ndarray:
    """The number of the cell, from 1, of each pixel whose center it holds."""
    mask = np.zeros(shape, np.uint32)
    for number, outline in enumerate(outlines, 1):
        mask[polygon(*(outline[:, ::-1] - 0.5).T, shape=shape)] = number
    return mask


# ---- what the formats share ------------------------------------------------------------------------------------------


def _image(section: SpatialData) -> tuple[np.ndarray, float]:
    """The H&E image ``(y, x, 3)`` and its µm per pixel."""
    image = image_levels(section["he"])[0].transpose("y", "x", "c")
    return np.asarray(image.data), affine_to(section["he"], "um")[1]


def _barcodes(n: int, first: int = 0) -> list[str]:
    """Barcodes of 16 bases, each of another place in the alphabet than of number."""
    digits = (np.arange(first, first + n)[:, None] * 2654435761 >> np.arange(0, 32, 2)) % 4
    return ["".join("ACGT"[d] for d in row) + "-1" for row in digits]


def _write_matrix(
    path: Path, table: AnnData, names: Sequence[str], *, library: str, controls: Sequence[str] = ()
) -> None:
    """Counts as Cell Ranger writes them (HDF5, version 2), rows in the order of the barcodes; controls count nothing."""
    order = np.argsort(names)
    counts = sparse.csr_matrix(table.X, dtype=np.int32)[order]
    kinds = dict.fromkeys(table.var_names, "Gene Expression") | dict.fromkeys(controls, "Negative Control Probe")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs.update(
            filetype="matrix", version=2, chemistry_description="Spatial 3' v1", software_version="spaceranger-3.1.2",
            library_ids=np.array([library], "S"),
        )  # fmt: skip
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(names, "S")[order]
        for part in ("data", "indices", "indptr"):
            matrix[part] = getattr(counts, part)
        matrix["shape"] = np.array([len(kinds), len(order)], np.int32)
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(kinds))], "S")
        features["name"] = np.array(list(kinds), "S")
        features["feature_type"] = np.array(list(kinds.values()), "S")
        features["genome"] = np.array(["GRCh38"] * len(kinds), "S")
        features["_all_tag_keys"] = np.array(["genome"], "S")


def _write_images(folder: Path, image: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, divisor in SMALLER.items():
        size = image.shape[1] // divisor, image.shape[0] // divisor
        Image.fromarray(image).resize(size, Image.Resampling.BOX).save(folder / f"tissue_{name}_image.png")


def _write_scalefactors(folder: Path, image: np.ndarray, **factors: float) -> None:
    height = image.shape[0]
    scales = {f"tissue_{name}_scalef": height // divisor / height for name, divisor in SMALLER.items()}
    (folder / "scalefactors_json.json").write_text(json.dumps(scales | factors))
