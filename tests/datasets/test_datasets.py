from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.transformations import get_transformation

from stgen import datasets
from stgen.datasets import _public, _render, _simulated
from stgen.datasets._simulated import _gene_programs

DATA = Path(os.environ.get("STGEN_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real data: set STGEN_DATA to their folder")


@pytest.fixture(scope="module")
def section():
    return datasets.simulated_section(seed=0)


@pytest.fixture(scope="module")
def small():
    return datasets.simulated_section(seed=3, size_um=400)


def dense(matrix):
    return np.asarray(matrix.todense())


def sha256_of_content(path):
    """Of the unpacked content of a .gz file, which is plain at its source."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def to_pixels(sdata, element, image="he"):
    """Centers of shapes in pixels of the image's finest level, through the transformations."""
    um_from_px = get_transformation(sdata[image], "um").to_affine_matrix(("x", "y"), ("x", "y"))
    xy = np.column_stack([sdata[element].geometry.x, sdata[element].geometry.y, np.ones(len(sdata[element]))])
    return (xy @ np.linalg.inv(um_from_px).T)[:, :2]


# ---- the simulated section ------------------------------------------------------------------------------------------


def test_elements(section):
    assert section["he"].dtype == np.uint8
    assert section["he"].shape == (3, 1000, 1000)
    assert list(section["he"].coords["c"].values) == ["r", "g", "b"]
    assert set(section["transcripts"].columns) == {"x", "y", "gene", "cell_id"}
    assert (section["spots"].radius == 27.5).all()
    for table in (section["cell_counts"], section["spot_counts"]):
        assert table.X.dtype == np.float32
        assert table.X.format == "csr"
        assert table.layers["rate"].shape == table.shape
        assert (table.layers["rate"] >= 0).all()
        assert table.var_names.is_unique
    fractions = section["spot_counts"].obsm["cell_type_fractions"]
    np.testing.assert_allclose(fractions.sum(1), 1, atol=1e-6)
    assert section.coordinate_systems == ["um"]
    assert section.attrs["stgen"]["simulated"]["seed"] == 0
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    np.testing.assert_allclose(section["spot_counts"].obsm["spatial"], xy)
    gaps = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 1e9 * np.eye(len(xy))
    np.testing.assert_allclose(np.median(gaps.min(1)), 100, rtol=1e-6)


def test_same_seed_same_bits(small):
    again = datasets.simulated_section(seed=3, size_um=400)
    np.testing.assert_array_equal(again["he"].values, small["he"].values)
    np.testing.assert_array_equal(again["spot_counts"].X.todense(), small["spot_counts"].X.todense())
    np.testing.assert_array_equal(again["cell_counts"].layers["rate"], small["cell_counts"].layers["rate"])
    pd.testing.assert_frame_equal(again["transcripts"].compute(), small["transcripts"].compute())
    other = datasets.simulated_section(seed=4, size_um=400)
    assert not np.array_equal(other["he"].values, small["he"].values)


def test_pixel_size_changes_the_picture_only(small):
    finer = datasets.simulated_section(seed=3, size_um=400, mpp=0.5)
    assert finer["he"].shape == (3, 800, 800)
    np.testing.assert_array_equal(finer["cell_counts"].X.todense(), small["cell_counts"].X.todense())
    pooled = finer["he"].values.reshape(3, 400, 2, 400, 2).mean((2, 4))
    assert np.corrcoef(pooled.ravel(), small["he"].values.ravel())[0, 1] > 0.95


def test_large_image_is_multiscale(monkeypatch):
    for module in (_render, _simulated):
        monkeypatch.setattr(module, "LARGE", 300)
    sdata = datasets.simulated_section(size_um=302)
    assert [sdata["he"][f"scale{k}"]["image"].shape[1] for k in range(3)] == [304, 152, 76]


def test_tables_count_the_transcripts(section):
    molecules = section["transcripts"].compute()
    genes = section["cell_counts"].var_names
    gene = genes.get_indexer(molecules["gene"].astype(str))
    xy = molecules[["x", "y"]].to_numpy(float)
    cell = molecules["cell_id"].to_numpy()

    counts = np.zeros(section["cell_counts"].shape)
    np.add.at(counts, (cell, gene), 1)
    np.testing.assert_array_equal(counts, dense(section["cell_counts"].X))
    cells = section["cells"]
    center = np.column_stack([cells.geometry.x, cells.geometry.y])
    assert (np.linalg.norm(xy - center[cell], axis=1) <= cells.radius.to_numpy()[cell]).all()

    spots = section["spot_counts"].obsm["spatial"]
    for i in range(len(spots)):
        inside = ((xy - spots[i]) ** 2).sum(1) <= 27.5**2
        np.testing.assert_array_equal(
            np.bincount(gene[inside], minlength=len(genes)), dense(section["spot_counts"].X[i])[0]
        )


def test_rate_is_the_expectation(section):
    for name, tolerance in (("cell_counts", 0.01), ("spot_counts", 0.02)):
        counts, rate = dense(section[name].X), section[name].layers["rate"]
        assert abs(counts.sum() / rate.sum() - 1) < tolerance
    counts, rate = dense(section["spot_counts"].X).sum(1), section["spot_counts"].layers["rate"].sum(1)
    assert np.corrcoef(counts, rate)[0, 1] > 0.97
    # gene-wise variance of the counts of cells: mean + dispersion * mean^2 about their own rate
    table = section["cell_counts"]
    rate = table.layers["rate"].astype(float)
    expected = (rate + table.var["dispersion"].to_numpy() * rate**2).sum(0)
    found = ((dense(table.X) - rate) ** 2).sum(0)
    assert 0.9 < np.median(found / expected) < 1.1


def test_cells_do_not_overlap(section):
    from scipy.spatial import cKDTree

    cells = section["cells"]
    xy, radius = np.column_stack([cells.geometry.x, cells.geometry.y]), cells.radius.to_numpy()
    pairs = cKDTree(xy).query_pairs(2 * radius.max(), output_type="ndarray")
    assert (np.linalg.norm(xy[pairs[:, 0]] - xy[pairs[:, 1]], axis=1) > radius[pairs].sum(1) - 1e-6).all()


@pytest.mark.parametrize("mpp", [0.5, 2.0])
def test_nuclei_lie_where_the_cells_are(mpp):
    sdata = datasets.simulated_section(seed=1, size_um=500, mpp=mpp)
    red = sdata["he"].values[0].astype(float)
    kinds = sdata["cell_counts"].obs["cell_type"].to_numpy()
    xy = to_pixels(sdata, "cells")[kinds != "adipocyte"]

    def brightness(shift_um):
        col, row = np.floor(xy + np.array(shift_um) / mpp).astype(int).clip(0, red.shape[0] - 1).T
        return red[row, col].mean()

    here = brightness((0, 0))
    around = [brightness((6 * np.cos(a), 6 * np.sin(a))) for a in np.arange(8) * np.pi / 4]
    assert here < min(around) - 15
    if mpp < 1:  # half a pixel matters: the darkest place is the center, in each direction
        assert max(abs(brightness((d, 0)) - brightness((-d, 0))) for d in (2, 3)) < 6
        assert max(abs(brightness((0, d)) - brightness((0, -d))) for d in (2, 3)) < 6
    swapped = xy[:, ::-1]
    assert red[tuple(np.floor(swapped).astype(int).clip(0, red.shape[0] - 1).T[::-1])].mean() > here + 15


def test_spots_lie_on_tissue(section):
    glass = (section["he"].values.min(0) > 225).astype(float)
    for x, y in to_pixels(section, "spots"):
        window = glass[int(y) - 27 : int(y) + 28, int(x) - 27 : int(x) + 28]
        assert window.mean() < 0.97
    assert glass.mean() > 0.05
    assert (section["spot_counts"].X.sum(1) > 0).all()


def test_depth_is_sensible(section):
    assert 700 < np.median(np.asarray(section["spot_counts"].X.sum(1))) < 2000


def test_gene_programs_do_not_depend_on_the_seed(section, small):
    pd.testing.assert_frame_equal(section["spot_counts"].var, small["spot_counts"].var)

    def profile(sdata, kind):
        table = sdata["cell_counts"]
        rate = table.layers["rate"][(table.obs["cell_type"] == kind).to_numpy()].mean(0)
        steady = table.var["program"].isin(["epithelium", "stroma", "T cell", "B cell", "duct", "vessel"]).to_numpy()
        return rate[steady] / rate[steady].sum()

    for kind in ("tumor", "fibroblast", "T cell"):
        np.testing.assert_allclose(profile(section, kind), profile(small, kind), rtol=1e-4)
    few, many = _gene_programs(20), _gene_programs(80)
    pd.testing.assert_frame_equal(few[0], many[0].iloc[:20])
    np.testing.assert_array_equal(few[1], many[1][:, :20])
    assert not many[0].index[:60].str.startswith(("MT-", "RP")).any()
    assert {"MT-CO1", "RPL13"} <= set(many[0].index)
    assert many[0].index.is_unique


def test_patient_shifts_stain_and_depth_only():
    a = datasets.simulated_section(seed=5, size_um=300, patient=0)
    b = datasets.simulated_section(seed=5, size_um=300, patient=1)
    ratio = b["cell_counts"].layers["rate"] / a["cell_counts"].layers["rate"]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    assert abs(ratio.mean() - 1) > 0.02
    assert np.abs(a["he"].values.mean((1, 2)) - b["he"].values.mean((1, 2))).max() > 2
    assert list(a["cells"].geometry) == list(b["cells"].geometry)


def test_morphology_predicts_expression_but_not_perfectly(section):
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    sections = [section, datasets.simulated_section(seed=1)]

    def features(sdata):
        image = sdata["he"].values.astype(float)
        od = -np.log((image + 5) / 250)
        rows = []
        for x, y in to_pixels(sdata, "spots"):
            w = od[:, int(y) - 24 : int(y) + 25, int(x) - 24 : int(x) + 25].reshape(3, -1)
            q = np.quantile(w, [0.05, 0.25, 0.5, 0.75, 0.9, 0.97], axis=1).ravel()
            rows.append(np.r_[w.mean(1), w.std(1), q])
        return StandardScaler().fit_transform(np.array(rows))

    def target(sdata):
        counts = dense(sdata["spot_counts"].X)
        return np.log1p(counts / counts.sum(1, keepdims=True).clip(1) * 1000)

    model = RidgeCV(np.logspace(-1, 4, 11)).fit(features(sections[0]), target(sections[0]))
    predicted, truth = model.predict(features(sections[1])), target(sections[1])
    genes = list(sections[1]["spot_counts"].var_names)
    r = {g: np.corrcoef(predicted[:, i], truth[:, i])[0, 1] for i, g in enumerate(genes)}
    assert r["KRT8"] > 0.5
    assert r["COL1A1"] > 0.5
    assert 0.4 < np.mean(list(r.values())) < 0.75
    assert abs(r["FOS"]) < 0.35
    assert abs(r["IFI6"]) < 0.35
    assert r["MS4A1"] < 0.6


def test_round_trip(small, tmp_path):
    small.write(tmp_path / "section.zarr")
    read = sd.read_zarr(tmp_path / "section.zarr")
    np.testing.assert_array_equal(read["he"].values, small["he"].values)
    for name in ("spot_counts", "cell_counts"):
        np.testing.assert_array_equal(dense(read[name].X), dense(small[name].X))
        np.testing.assert_array_equal(read[name].layers["rate"], small[name].layers["rate"])
        pd.testing.assert_frame_equal(read[name].obs, small[name].obs, check_dtype=False, check_categorical=False)
    pd.testing.assert_frame_equal(
        read["spot_counts"].obsm["cell_type_fractions"], small["spot_counts"].obsm["cell_type_fractions"]
    )
    assert len(read["transcripts"]) == len(small["transcripts"])
    assert read.attrs["stgen"]["simulated"] == small.attrs["stgen"]["simulated"]
    np.testing.assert_allclose(to_pixels(read, "spots"), to_pixels(small, "spots"))


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"size_um": 100}, ValueError, "size_um"),
        ({"mpp": 0}, ValueError, "mpp"),
        ({"mpp": float("nan")}, ValueError, "mpp"),
        ({"n_genes": 0}, ValueError, "n_genes=1"),
        ({"seed": 0.5}, ValueError, "seed"),
        ({"seed": -1}, ValueError, "seed"),
        ({"capture_efficiency": 2}, ValueError, "capture_efficiency"),
        ({"spot_diameter_um": 120}, ValueError, "spot_diameter_um"),
    ],
)
def test_bad_arguments(bad, error, says):
    with pytest.raises(error, match=says):
        datasets.simulated_section(**bad)


# ---- public data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("STGEN_DATA", raising=False)


def test_unknown_sections_and_missing_files(no_data, tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="B4, C2, C3, C4, C5"):
        datasets.her2st("Z9")
    with pytest.raises(KeyError, match="MOB1, MOB2, MOB3"):
        datasets.mouse_olfactory_bulb("C4")
    with pytest.raises(ValueError, match="mpp"):
        datasets.mouse_olfactory_bulb("MOB1", mpp=0)
    with pytest.raises(FileNotFoundError, match=r"C4\.tsv\.gz.*path="):
        datasets.her2st("C4", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot be downloaded.*STGEN_DATA"):
        datasets.xenium_pancreas()
    monkeypatch.setenv("STGEN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"STGEN_DATA=.*transcripts\.parquet"):
        datasets.xenium_pancreas()


def test_addresses():
    urls = [f.url for f in _public._her2st_files("C4")]
    root = "https://raw.githubusercontent.com/almaan/her2st/85df7411b987a7dec3feff9718b869a7a82091ec/data/"
    assert urls == [
        root + "ST-imgs/C/C4/5714_HE_BT_D2.jpg",
        root + "ST-cnts/C4.tsv.gz",
        root + "ST-spotfiles/C4_selection.tsv",
    ]
    assert _public._mob_files("MOB2")[2].url.endswith("inst/extdata/counts/alignment_table_MOB2.tsv")
    hashes = [f.sha256 for s in ("B4", "C2", "C3", "C4", "C5") for f in _public._her2st_files(s)]
    hashes += [f.sha256 for s in ("MOB1", "MOB2", "MOB3") for f in _public._mob_files(s)]
    assert len(set(hashes)) == 24
    assert {len(h) for h in hashes} == {64}


def _fake_her2st(folder: Path) -> None:
    """A section in the layout of the local folder: 4 x 3 spots, 291 pixels apart."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (1203, 1500, 3), dtype=np.uint8)).save(folder / "C4.jpg")
    x, y = (a.ravel() for a in np.meshgrid(np.arange(1, 5), np.arange(1, 4)))
    new = np.column_stack([x, y]) + rng.uniform(-0.1, 0.1, (12, 2))
    spots = pd.DataFrame({"x": x, "y": y, "new_x": new[:, 0], "new_y": new[:, 1]})
    spots["pixel_x"], spots["pixel_y"], spots["selected"] = 290 * new[:, 0] + 7, 292 * new[:, 1] - 9, 1
    spots.to_csv(folder / "C4_selection.tsv", sep="\t", index=False)
    counts = pd.DataFrame(
        rng.poisson(3, (12, 3)), columns=["A", "B", "C"], index=[f"{i}x{j}" for i, j in zip(x, y, strict=True)]
    )
    counts.iloc[[5, *range(5), *range(6, 11)]].to_csv(folder / "C4.tsv.gz", sep="\t")  # shuffled, the last is missing


def _check_fake(sdata):
    assert sdata["spot_counts"].shape == (11, 3)
    assert sdata["spot_counts"].obs_names[0] == "2x2"
    mpp = get_transformation(sdata["he"], "um").to_affine_matrix(("x",), ("x",))[0, 0]
    np.testing.assert_allclose(mpp, 200 / np.sqrt(290 * 292))
    spot = _spots_of(sdata).loc["3x3"]
    assert abs(spot["x"] / mpp - 3 * 290) < 40
    assert abs(spot["y"] / mpp - 3 * 292) < 45
    np.testing.assert_allclose(to_pixels(sdata, "spots") * mpp, sdata["spot_counts"].obsm["spatial"])


def _spots_of(sdata):
    return pd.DataFrame(sdata["spot_counts"].obsm["spatial"], sdata["spot_counts"].obs_names, ["x", "y"])


@pytest.mark.parametrize("inner", ["", "her2st", "her2st/C4"])
def test_local_folder(no_data, tmp_path, inner, monkeypatch):
    _fake_her2st(tmp_path / "her2st" / "C4")
    sdata = datasets.her2st("C4", path=tmp_path / inner)
    _check_fake(sdata)
    assert [sdata["he"][f"scale{k}"]["image"].shape[1:] for k in range(2)] == [(1202, 1500), (601, 750)]
    full, half = (sdata["he"][f"scale{k}"]["image"].values.astype(float) for k in range(2))
    assert np.abs(full.reshape(3, 601, 2, 750, 2).mean((2, 4)) - half).max() <= 0.5
    monkeypatch.setenv("STGEN_DATA", str(tmp_path / inner))
    _check_fake(datasets.her2st("C4"))


def test_download_checks_the_content(no_data, tmp_path, monkeypatch):
    import pooch

    _fake_her2st(tmp_path / "source")
    names = ("C4.jpg", "C4.tsv.gz", "C4_selection.tsv")
    hashes = [hashlib.sha256((tmp_path / "source" / n).read_bytes()).hexdigest() for n in names]
    monkeypatch.setitem(_public._HER2ST_SECTIONS, "C4", ("C4", *hashes))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    asked = []

    def fetch(url, output_file, caller, **_):
        asked.append(url)
        Path(output_file).write_bytes((tmp_path / "source" / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr("pooch.core.choose_downloader", lambda *_, **__: fetch)
    _check_fake(datasets.her2st("C4"))
    assert len(asked) == 3
    assert (tmp_path / "cache/stgen/her2st/C4/C4.jpg").is_file()
    _check_fake(datasets.her2st("C4"))
    assert len(asked) == 3  # from the cache

    monkeypatch.setitem(_public._HER2ST_SECTIONS, "C4", ("C4", "0" * 64, *hashes[1:]))
    with pytest.raises(ValueError, match="hash"):
        datasets.her2st("C4")

    def offline(url, output_file, caller, **_):
        raise OSError("no route to host")

    monkeypatch.setattr("pooch.core.choose_downloader", lambda *_, **__: offline)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "empty" / name)
    with pytest.raises(ConnectionError, match="by hand.*path="):
        datasets.her2st("C4")


@needs_data
def test_her2st_section():
    sdata = datasets.her2st("C4", path=DATA)
    table = sdata["spot_counts"]
    assert table.shape == (184, 15842)
    assert np.median(np.asarray(table.X.sum(1))) == pytest.approx(10191, abs=1)
    assert 0.68 < sdata.attrs["stgen"]["source"]["mpp"] < 0.70
    image = sdata["he"]["scale3"]["image"].values.astype(float)
    col, row = (to_pixels(sdata, "spots") / 8).astype(int).T
    dark = image[0] < 190  # tissue is dark in red, the slide around it is pink
    assert np.mean(dark[row, col]) > 0.8
    assert np.mean(dark) < 0.3
    assert all((DATA / "her2st/C4" / f.name).is_file() for f in _public._her2st_files("C4"))
    packed = {f.name: f.sha256 for f in _public._her2st_files("C4")}
    found = hashlib.sha256((DATA / "her2st/C4/C4.tsv.gz").read_bytes()).hexdigest()
    assert packed["C4.tsv.gz"] == found


@needs_data
def test_mouse_olfactory_bulb_section(monkeypatch):
    monkeypatch.setenv("STGEN_DATA", str(DATA))
    sdata = datasets.mouse_olfactory_bulb("MOB1", mpp=4.0)
    assert sdata["spot_counts"].shape == (379, 1000)
    assert np.median(np.asarray(sdata["spot_counts"].X.sum(1))) == pytest.approx(2268, abs=1)
    np.testing.assert_allclose(to_pixels(sdata, "spots") * 4.0, sdata["spot_counts"].obsm["spatial"])
    for file in _public._mob_files("MOB1"):
        assert sha256_of_content(DATA / "st_mouse_olfactory_bulb" / file.name) == file.sha256


@needs_data
def test_xenium_pancreas_section():
    sdata = datasets.xenium_pancreas(path=DATA)
    assert list(sdata["stains"]["scale0"]["image"].coords["c"].values) == ["dapi", "bound", "rna", "prot"]
    assert sdata["cell_counts"].shape == (98237, 377)
    molecules = sdata["transcripts"].get_partition(0).compute()
    column = molecules[["x", "y"]].to_numpy(float) / 0.85 - 0.5
    np.testing.assert_allclose(column, np.rint(column), atol=2e-3)
    nuclei = sdata["stains"]["scale0"]["image"].sel(c="dapi").values
    col, row = (to_pixels(sdata, "cells", "stains")).astype(int).T
    row = row.clip(0, nuclei.shape[0] - 1)
    assert nuclei[row, col].mean() > 1.3 * nuclei.mean()
