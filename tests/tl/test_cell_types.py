"""Cell types: formulas written out, the same answer however the data are cut, and a section whose types are known."""

from __future__ import annotations

import tracemalloc

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData, read_h5ad
from geopandas import GeoDataFrame
from scipy.special import softmax
from shapely import box
from spatialdata import SpatialData, read_zarr
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation

from stgen import datasets, pp, tl
from stgen._spatial.grid import Grid
from stgen._spatial.records import provenance, record, shallow_copy, write_image, write_table
from stgen.metrics import label_agreement
from stgen.tl.cells import locations as _locations

GENES = [f"g{i}" for i in range(20)]
TYPES = ["A", "B/C", "long name"]
SHAPE = (23, 31)
BINS = {"um": Scale([10, 10], ("x", "y")), "slide": Affine(np.diag([2.0, 2, 1]), ("x", "y"), ("x", "y"))}
MARKERS = {"A": ["g0", "g1"], "B/C": ["g2", "g7", "g3"], "long name": ["g19", "g1"]}


@pytest.fixture(scope="module")
def profiles():
    return np.random.default_rng(0).gamma(0.5, 2, (3, 20))


@pytest.fixture(scope="module")
def reference(profiles):
    """90 cells of three types, and one without a type."""
    rng = np.random.default_rng(1)
    kind = np.append(np.repeat(np.arange(3), [20, 30, 40]), 0)
    labels = pd.Categorical(np.array(TYPES, object)[kind], categories=[*TYPES, "unused"])
    labels[-1] = None
    counts = rng.poisson(profiles[kind] * 10).astype(np.float32)
    return AnnData(
        counts, obs=pd.DataFrame({"kind": labels}, index=[f"r{i}" for i in range(91)]), var=pd.DataFrame(index=GENES)
    )


@pytest.fixture(scope="module")
def truth():
    return np.random.default_rng(2).integers(0, 3, SHAPE)


@pytest.fixture(scope="module")
def values(profiles, truth):
    """Counts of a map with unknown bins in one corner, one bin unknown for one gene, and one bin without counts."""
    values = np.random.default_rng(3).poisson(np.moveaxis(profiles[truth], -1, 0) * 2).astype(np.float32)
    values[:, :4, :5] = np.nan
    values[7, 9, 9] = np.nan
    values[:, 12, 12] = 0
    return values


@pytest.fixture
def sdata(values):
    sdata = SpatialData()
    write_image(sdata, "map", values, channels=GENES, transformations=BINS)
    return sdata


@pytest.fixture
def table(values):
    """The known bins as rows."""
    known = np.isfinite(values).all(0)
    rows = values[:, known].T
    return AnnData(rows, obs=pd.DataFrame(index=[f"row{i}" for i in range(len(rows))]), var=pd.DataFrame(index=GENES))


def add_samples(sdata, samples):
    """Samples ``(S, G, y, x)`` of the map."""
    stacked = np.swapaxes(samples, 0, 1).reshape(-1, *SHAPE)
    channels = [f"{gene}:{i}" for gene in GENES for i in range(len(samples))]
    write_image(sdata, "map_samples", stacked, channels=channels, transformations=BINS)


def by(method, reference):
    return {"markers": MARKERS} if method == "markers" else {"reference": reference, "labels_column": "kind"}


def log_profile(reference):
    summed = np.stack([reference.X[(reference.obs["kind"] == t).to_numpy()].sum(0) for t in TYPES]).astype(float) + 1
    return np.log(summed / summed.sum(1, keepdims=True))


METHODS = pytest.mark.parametrize("method", ["markers", "reference"])


def test_the_record_of_another_function_is_not_replaced(table):
    table.uns["stgen"] = {"stem": {"function": "tl.predict_expression"}}
    with pytest.raises(ValueError, match="'stem' is there and not a result"):
        tl.localize_cell_types(table, markers=MARKERS, key_added="stem", overwrite=True)
    assert table.uns["stgen"] == {"stem": {"function": "tl.predict_expression"}}
    assert "stem" not in table.obsm


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prior", "temperature"), [("uniform", 1.0), ("reference", 1.0), ("reference", 7.5)])
def test_reference_is_naive_bayes(table, reference, prior, temperature):
    tl.localize_cell_types(table, reference=reference, labels_column="kind", prior=prior, temperature=temperature)
    weight = np.log([2 / 9, 3 / 9, 4 / 9]) if prior == "reference" else np.zeros(3)
    expected = softmax(weight + table.X @ log_profile(reference).T / temperature, axis=1)
    found = table.obsm["cell_types"]
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-4, atol=1e-7)
    assert (list(found.columns), list(found.index)) == (TYPES, list(table.obs_names))


def test_markers_are_mean_standardized_expression(table):
    tl.localize_cell_types(table, markers=MARKERS, temperature=0.5)
    counted = table[table.X.sum(1) > 0]
    scaled = sc.pp.normalize_total(counted, target_sum=1e4, inplace=False)["X"]
    z = np.log1p(scaled)
    z = pd.DataFrame((z - z.mean(0)) / z.std(0), columns=GENES)
    expected = softmax(np.stack([z[genes].mean(axis=1) for genes in MARKERS.values()], 1) / 0.5, axis=1)
    np.testing.assert_allclose(counted.obsm["cell_types"].to_numpy(), expected, rtol=1e-3, atol=1e-6)


def test_depth_makes_certain_and_does_not_change_the_type(table, reference):
    options = by("reference", reference)
    tl.localize_cell_types(table, **options)
    deeper = AnnData(table.X * 8, obs=table.obs[[]], var=table.var)
    tl.localize_cell_types(deeper, **options)
    tl.localize_cell_types(deeper, **options, temperature=8, key_added="cooled")
    assert deeper.obs["cell_types_label"].equals(table.obs["cell_types_label"])
    np.testing.assert_allclose(deeper.obsm["cooled"], table.obsm["cell_types"], rtol=1e-4, atol=1e-7)
    assert deeper.obsm["cell_types"].max(axis=1).mean() > table.obsm["cell_types"].max(axis=1).mean()


def test_genes_are_matched_by_name(table, reference):
    tl.localize_cell_types(table, **by("reference", reference))
    shuffled = reference[:, np.random.default_rng(0).permutation(20)].copy()
    more = AnnData(np.ones((91, 1), np.float32), obs=reference.obs, var=pd.DataFrame(index=["elsewhere"]))
    wider = AnnData(
        np.hstack([more.X, shuffled.X]),
        obs=reference.obs,
        var=pd.DataFrame(index=[*more.var_names, *shuffled.var_names]),
    )
    tl.localize_cell_types(table, **by("reference", wider), key_added="again")
    np.testing.assert_allclose(table.obsm["again"], table.obsm["cell_types"], rtol=1e-5, atol=1e-8)


# ---- maps ------------------------------------------------------------------------------------------------------------


@METHODS
def test_a_map_is_what_its_bins_are_as_rows(sdata, table, reference, values, method, truth):
    options = by(method, reference)
    assert tl.localize_cell_types(sdata, map_key="map", **options) is None
    tl.localize_cell_types(table, **options)
    known = np.isfinite(values).all(0)
    found, label = sdata["cell_types"], sdata["cell_types_label"].values
    assert (found.dtype, label.dtype) == (np.float32, np.uint16)
    assert list(found.coords["c"].values) == TYPES
    np.testing.assert_allclose(found.values[:, known].T, table.obsm["cell_types"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.values[:, known].sum(0), 1, rtol=1e-5)
    assert np.isnan(found.values[:, ~known]).all()
    assert (label[~known] == 0).all()
    names = table.obs["cell_types_label"].astype(object).fillna("none")
    np.testing.assert_array_equal(np.array(["none", *TYPES], object)[label[known]], names)
    if method == "reference":
        assert (label[known] == truth[known] + 1).mean() > 0.9
    for key in ("cell_types", "cell_types_label"):
        for system, place in BINS.items():
            matrix = get_transformation(sdata[key], system).to_affine_matrix(("x", "y"), ("x", "y"))
            np.testing.assert_allclose(matrix, place.to_affine_matrix(("x", "y"), ("x", "y")))


@METHODS
def test_chunks_do_not_matter(sdata, table, reference, method, monkeypatch):
    options = by(method, reference)
    for data, where in ((sdata, {"map_key": "map"}), (table, {})):
        tl.localize_cell_types(data, **where, **options)
    monkeypatch.setattr(_locations, "VALUES_AT_ONCE", 100)
    sdata["map"] = sdata["map"].chunk({"c": 7, "y": 12, "x": 17})
    for data, where in ((sdata, {"map_key": "map"}), (table, {})):
        tl.localize_cell_types(data, **where, **options, key_added="pieces")
    np.testing.assert_allclose(sdata["pieces"].values, sdata["cell_types"].values, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(sdata["pieces_label"].values, sdata["cell_types_label"].values)
    np.testing.assert_allclose(table.obsm["pieces"], table.obsm["cell_types"], rtol=1e-4, atol=1e-6)


@METHODS
def test_where_nothing_was_counted_nothing_is_told(sdata, reference, method):
    tl.localize_cell_types(sdata, map_key="map", **by(method, reference))
    np.testing.assert_allclose(sdata["cell_types"].values[:, 12, 12], 1 / 3, rtol=1e-6)
    assert sdata["cell_types_label"].values[12, 12] == 0


def test_memory_does_not_hold_the_map(reference):
    """80 MiB of genes in all, of which a chunk of a few is there at a time."""

    def level(block_info):
        return np.full(block_info[None]["chunk-shape"], block_info[None]["chunk-location"][0] % 4, np.float32)

    sdata = SpatialData()
    lazy = da.map_blocks(level, chunks=((4,) * 5, (256,) * 4, (256,) * 4), dtype=np.float32, meta=np.empty((0, 0, 0)))
    sdata.images["map"] = Image2DModel.parse(
        lazy, dims=("c", "y", "x"), c_coords=GENES, transformations=BINS, chunks=None
    )
    tracemalloc.start()
    tl.localize_cell_types(sdata, map_key="map", **by("reference", reference))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = 2**20 * (4 * len(TYPES) + 2)
    assert peak < 2 * result + 16 * 2**20


# ---- samples ---------------------------------------------------------------------------------------------------------


@METHODS
def test_frequency_is_how_often_samples_get_a_type(sdata, reference, values, method):
    rng = np.random.default_rng(4)
    samples = rng.poisson(np.nan_to_num(values) / 5, (5, *values.shape)).astype(np.float32)
    samples[:, np.isnan(values)] = np.nan
    add_samples(sdata, samples)
    options = by(method, reference)
    tl.localize_cell_types(sdata, map_key="map", **options)
    counted = np.zeros((3, *SHAPE))
    for sample in samples:
        single = SpatialData()
        write_image(single, "one", sample, channels=GENES, transformations=BINS)
        tl.localize_cell_types(single, map_key="one", **options)
        counted += single["cell_types_label"].values == np.arange(1, 4)[:, None, None]
    known = np.isfinite(values).all(0)
    found = sdata["cell_types_frequency"]
    assert list(found.coords["c"].values) == TYPES
    np.testing.assert_allclose(found.values[:, known], counted[:, known] / 5, rtol=1e-6)
    assert np.isnan(found.values[:, ~known]).all()
    assert 0.05 < (found.values[:, known].max(0) < 1).mean()
    assert sdata.attrs["stgen"]["cell_types_frequency"]["n_samples"] == 5


def test_one_sample_has_no_spread_and_an_old_one_is_not_left(sdata, reference, values):
    options = {"map_key": "map", **by("reference", reference)}
    add_samples(sdata, np.stack([values] * 2))
    tl.localize_cell_types(sdata, **options)
    known = np.isfinite(values).all(0) & (sdata["cell_types_label"].values > 0)
    assert (sdata["cell_types_frequency"].values[:, known].max(0) == 1).all()  # samples that are alike agree
    del sdata["map_samples"]
    add_samples(sdata, values[None])
    tl.localize_cell_types(sdata, **options, overwrite=True)
    assert "cell_types_frequency" not in {*sdata.images, *sdata.attrs["stgen"]}


def test_samples_are_summed_over_cells(sdata, reference, values):
    """Each sample, summed over the cells on its own, gives the frequency."""
    rng = np.random.default_rng(5)
    samples = rng.poisson(np.nan_to_num(values) / 3, (4, *values.shape)).astype(np.float32)
    add_samples(sdata, samples)
    cells = GeoDataFrame(geometry=[box(x, y, x + 17, y + 13) for x in range(60, 290, 20) for y in range(50, 210, 15)])
    cells.index = [f"cell{i}" for i in range(len(cells))]
    sdata["cells"] = ShapesModel.parse(cells, transformations={"um": Identity()})
    tl.aggregate_cells(sdata, map_key="map", shapes_key="cells")
    sdata.tables["map_cells"] = sdata["map_cells"][::-1].copy()  # in whatever order
    for method in ("markers", "reference"):
        options = by(method, reference)
        tl.localize_cell_types(sdata, table_key="map_cells", **options, key_added=method)
        counted = 0
        for sample in samples:
            single = SpatialData(shapes={"cells": sdata["cells"]})
            write_image(single, "one", sample, channels=GENES, transformations=BINS)
            tl.aggregate_cells(single, map_key="one", shapes_key="cells")
            of_sample = single["one_cells"][sdata["map_cells"].obs_names].copy()
            tl.localize_cell_types(of_sample, **options)
            counted = counted + pd.get_dummies(of_sample.obs["cell_types_label"])[TYPES].to_numpy()
        np.testing.assert_allclose(sdata["map_cells"].obsm[f"{method}_frequency"], counted / 4, rtol=1e-6)
    tl.localize_cell_types(
        sdata["map_cells"], markers=MARKERS, key_added="alone"
    )  # without the map, there are no samples
    assert "alone_frequency" not in sdata["map_cells"].obsm


@pytest.mark.parametrize("transform", ["log1p_raw", "log1p_norm"])
def test_a_prediction_is_brought_back_to_counts(table, reference, transform):
    """Of some of the genes, as tl.predict_expression writes it."""
    genes, rng = GENES[:12], np.random.default_rng(6)
    samples = np.log1p(rng.poisson(table.X[:, :12] + 0.2, (3, table.n_obs, 12))).transpose(1, 0, 2).astype(np.float32)
    table.layers["predicted"] = np.full(table.shape, np.nan, np.float32)
    table.layers["predicted"][:, :12] = samples.mean(1)
    table.obsm["predicted_samples"] = samples[:, :, ::-1]
    table.var["predicted"] = table.var_names.isin(genes)
    entry = provenance("tl.predict_expression", transform=transform, sample_genes="\n".join(genes[::-1]))
    record(table, "predicted", entry)
    tl.localize_cell_types(table, layer="predicted", **by("reference", reference))
    var = pd.DataFrame(index=genes)
    expected = AnnData(np.expm1(samples.mean(1)), obs=table.obs[[]], var=var)
    tl.localize_cell_types(expected, **by("reference", reference))
    np.testing.assert_allclose(table.obsm["cell_types"], expected.obsm["cell_types"], rtol=1e-4, atol=1e-7)
    counted = 0
    for number in range(3):
        sample = AnnData(np.expm1(samples[:, number]), var=var)
        tl.localize_cell_types(sample, **by("reference", reference))
        counted = counted + pd.get_dummies(sample.obs["cell_types_label"])[TYPES].to_numpy()
    np.testing.assert_allclose(table.obsm["cell_types_frequency"], counted / 3, rtol=1e-6)
    assert table.uns["stgen"]["cell_types"]["genes"] == ", ".join(genes)


# ---- a section whose types are known ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_types():
    """Cells of another section, as a reference."""
    return datasets.simulated_section(seed=5, size_um=400)["cell_counts"]


SIMULATED = {
    "tumor": ["ERBB2", "CLDN4", "CA9"], "luminal": ["SCGB2A2", "PIP", "ELF3"], "fibroblast": ["LUM", "DCN", "COL1A2"],
    "T cell": ["CD3E", "CD3D", "TRAC", "IL7R"], "B cell": ["MS4A1", "CD79A", "IGKC"], "adipocyte": ["PLIN1", "ADIPOQ"],
    "macrophage": ["CD68", "LYZ", "C1QA"], "endothelial": ["PECAM1", "VWF", "CLDN5"], "myoepithelial": ["KRT14", "MYLK", "KRT5"],
}  # fmt: skip


@pytest.mark.parametrize(("method", "least"), [("reference", 0.97), ("markers", 0.75)])
def test_types_of_cells_are_found(simulated, known_types, method, least):
    cells = simulated["cell_counts"].copy()
    options = (
        {"markers": SIMULATED} if method == "markers" else {"reference": known_types, "labels_column": "cell_type"}
    )
    tl.localize_cell_types(cells, **options)
    scores = label_agreement(cells.obs["cell_types_label"], cells.obs["cell_type"])
    assert scores["accuracy"] > least
    assert scores["ARI"] > least - 0.25
    assert scores["F1"]["T cell"] > 0.85


def test_types_of_a_map_are_found_and_their_spread_knows_where_they_are_not(simulated, known_types):
    sdata = shallow_copy(simulated)
    pp.rasterize(sdata, points_key="transcripts", bin_um=10)
    counts = sdata["counts"].values
    samples = np.random.default_rng(7).poisson(np.nan_to_num(counts), (6, *counts.shape)).astype(np.float32)
    samples[:, np.isnan(counts)] = np.nan
    channels = [f"{gene}:{i}" for gene in sdata["counts"].coords["c"].values for i in range(6)]
    stacked = np.swapaxes(samples, 0, 1).reshape(-1, *counts.shape[1:])
    place = get_transformation(sdata["counts"], get_all=True)
    write_image(sdata, "counts_samples", stacked, channels=channels, transformations=place)
    tl.localize_cell_types(sdata, map_key="counts", reference=known_types, labels_column="cell_type")
    row, column = Grid.of_map(sdata, "counts").locate(sdata, "cells").astype(int).T
    names = np.array([None, *sdata["cell_types"].coords["c"].values], object)
    label = sdata["cell_types_label"].values[row, column]
    truth = sdata["cell_counts"].obs["cell_type"].to_numpy()
    scores = label_agreement(names[label], truth)
    assert scores["accuracy"] > 0.8  # a bin of 10 µm holds more than one cell, and one type wins
    agreed = sdata["cell_types_frequency"].values[:, row, column].max(0) == 1
    right = names[label] == truth
    assert right[agreed].mean() > right[~agreed].mean() + 0.2


# ---- the object ------------------------------------------------------------------------------------------------------


def test_results_are_stored_with_their_record(sdata, table, reference, values, tmp_path):
    add_samples(sdata, np.stack([values] * 2))
    options = by("reference", reference)
    tl.localize_cell_types(sdata, map_key="map", **options)
    sdata.write(tmp_path / "map.zarr")
    again = read_zarr(tmp_path / "map.zarr")
    for key in ("cell_types", "cell_types_frequency", "cell_types_label"):
        np.testing.assert_array_equal(again[key].values, sdata[key].values)
        entry = again.attrs["stgen"][key]
        assert entry == sdata.attrs["stgen"][key]
        assert entry["types"].split("\n") == TYPES
        assert (
            entry["unit"]
            == {"": "probability", "_frequency": "share of the samples", "_label": "number of the type"}[key[10:]]
        )
        assert (entry["function"], entry["method"], entry["map_key"]) == ("tl.localize_cell_types", "reference", "map")
    tl.localize_cell_types(table, **by("markers", None) | {"markers": {"A": ["g0"], "B": ["g3"]}})
    table.write_h5ad(tmp_path / "table.h5ad")
    again = read_h5ad(tmp_path / "table.h5ad")
    pd.testing.assert_frame_equal(again.obsm["cell_types"], table.obsm["cell_types"])
    assert again.obs["cell_types_label"].equals(table.obs["cell_types_label"])
    assert again.uns["stgen"]["cell_types"] == table.uns["stgen"]["cell_types"]


def test_copy_and_overwrite(sdata, table, reference):
    options = by("reference", reference)
    copied = tl.localize_cell_types(sdata, map_key="map", **options, copy=True)
    assert set(copied.images) == {"map", "cell_types"}
    assert set(sdata.images) == {"map"}
    assert not sdata.labels
    assert "stgen" not in sdata.attrs
    copied = tl.localize_cell_types(table, **options, copy=True)
    assert "cell_types" in copied.obsm
    assert not table.obsm.keys()
    tl.localize_cell_types(copied, **options, prior="reference", overwrite=True)
    assert copied.uns["stgen"]["cell_types"]["prior"] == "reference"
    with pytest.raises(ValueError, match="overwrite=True"):
        tl.localize_cell_types(copied, **options)


def test_a_table_of_spatialdata_is_found(sdata, table, reference):
    sdata["cells"] = ShapesModel.parse(
        np.zeros((table.n_obs, 2)), geometry=0, radius=1, transformations={"um": Identity()}
    )
    write_table(sdata, "only", table, region="cells")
    tl.localize_cell_types(sdata, **by("reference", reference))
    assert "cell_types" in sdata["only"].obsm


def test_markers_that_were_not_measured_are_named(table, caplog):
    tl.localize_cell_types(table, markers=MARKERS)
    tl.localize_cell_types(table, markers=MARKERS | {"A": ["g0", "UNKNOWN", "g1"]}, key_added="with")
    assert "1 markers were not measured" in caplog.text
    assert "UNKNOWN" in caplog.text
    np.testing.assert_array_equal(table.obsm["with"], table.obsm["cell_types"])


BAD = [
    ({}, ValueError, "either markers=.* or reference="),
    ({"markers": MARKERS, "reference": AnnData()}, ValueError, "either markers=.* or reference="),
    ({"markers": {"A": ["g1"]}}, ValueError, "at least two types"),
    ({"markers": {"A": "g1", "B": "g2"}}, TypeError, "mapping of text to a list of names"),
    ({"markers": {"A": ["g1"], "B": ["x", "y"]}}, KeyError, "no marker of B was measured"),
    ({"markers": MARKERS, "temperature": 0}, ValueError, "temperature"),
    ({"markers": MARKERS, "temperature": "warm"}, ValueError, "temperature"),
    ({"markers": MARKERS, "map_key": "nothing"}, KeyError, "no map in sdata.images 'nothing'"),
    ({"markers": MARKERS, "map_key": None}, KeyError, "no table; pass map_key=<one of .*: map>"),
    ({"markers": MARKERS, "table_key": "t"}, ValueError, "leave it out for a table"),
    ({"markers": MARKERS, "key_added": "map", "overwrite": True}, ValueError, "'map' is there and not a result"),
    ({"markers": MARKERS, "key_added": "Map"}, ValueError, "'map' is there"),
    ({"markers": MARKERS, "key_added": "with space"}, ValueError, "alphanumeric"),
    ({"markers": {"A": ["g0"], "B": ["g1"]}, "prior": "flat"}, ValueError, "`prior` must be"),
    ({"reference": "cells.h5ad", "labels_column": "kind"}, TypeError, "`reference` must be an AnnData"),
    ({"labels_column": None}, KeyError, "labels_column=<one of kind>"),
    ({"labels_column": "nothing"}, KeyError, "labels_column=<one of kind>"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments_are_refused_and_nothing_is_changed(sdata, reference, options, error, message):
    if "labels_column" in options and "reference" not in options:
        options = {"reference": reference, **options}
    with pytest.raises(error, match=message):
        tl.localize_cell_types(sdata, **{"map_key": "map", **options})
    assert [name for _, name, _ in sdata.gen_elements()] == ["map"]
    assert "stgen" not in sdata.attrs


def bad_reference(reference, what):
    reference = reference.copy()
    if what == "other genes":
        reference.var_names = [f"ENSG{i}" for i in range(20)]
    elif what == "one type":
        reference.obs["kind"] = "A"
    elif what == "empty type":
        reference.X[(reference.obs["kind"] == "A").to_numpy()] = 0
    elif what == "scaled":
        reference.X = reference.X - 1
    return reference


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other genes", "shares 0 genes.*ENSG0.*g0"),
        ("one type", "at least two types"),
        ("empty type", "no counts of the shared genes for A"),
        ("scaled", "negative"),
    ],
)
def test_references_that_tell_nothing_are_refused(table, reference, what, message):
    with pytest.raises(ValueError, match=message):
        tl.localize_cell_types(table, **by("reference", bad_reference(reference, what)))
    assert not table.obsm.keys()


def test_values_that_are_no_counts_are_refused(sdata, table, reference, values):
    write_image(sdata, "scaled", values - 1, channels=GENES, transformations=BINS)
    with pytest.raises(ValueError, match="negative"):
        tl.localize_cell_types(sdata, map_key="scaled", **by("reference", reference))
    assert set(sdata.images) == {"map", "scaled"}
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        tl.localize_cell_types(table, layer="nothing", **by("reference", reference))
    with pytest.raises(TypeError, match="found DataFrame"):
        tl.localize_cell_types(table.to_df(), **by("reference", reference))


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_of_labels():
    truth = np.array(["a", "a", "b", "b", "c", None], object)
    assert label_agreement(truth, truth) == {"accuracy": 1, "ARI": 1, "NMI": 1, "F1": {"a": 1, "b": 1, "c": 1}}
    renamed = np.array(["x", "x", "y", "y", "z", "x"], object)
    found = label_agreement(renamed, truth)
    assert (found["accuracy"], found["ARI"], found["NMI"]) == (0, 1, pytest.approx(1))  # the groups are the same
    assert set(found["F1"].values()) == {0}
    found = label_agreement(pd.Categorical(["a", None, "b", "a", "c", "c"]), pd.Series(truth))
    assert found["accuracy"] == 0.6
    assert found["F1"] == {"a": 0.5, "b": pytest.approx(2 / 3), "c": 1}
    numbers = label_agreement([1, 2, 2], [1, 2, 3])
    assert numbers["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one length"):
        label_agreement(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no true label"):
        label_agreement(["a"], [None])
