"""Bins as tables, and back: every value in its place, and what scanpy, squidpy and spatialdata-plot make of them."""

from __future__ import annotations

import logging

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import squidpy as sq
from scipy import sparse
from spatialdata import SpatialData, read_zarr
from spatialdata.transformations import Affine, Scale

from stgen import tl
from stgen._spatial.records import provenance, record, write_image

GENES = ["A", "B", "C"]
BIN_UM = 10.0
BINS = {
    "um": Scale([BIN_UM, BIN_UM], ("x", "y")),
    "px": Affine([[0, 40, 3], [40, 0, 5], [0, 0, 1]], ("x", "y"), ("x", "y")),
}


@pytest.fixture
def values() -> np.ndarray:
    values = np.random.default_rng(0).poisson(1.0, (3, 9, 12)).astype(np.float32)
    values[:, :2, :] = np.nan
    values[1, 5, 6] = np.nan  # unknown for one gene only
    return values


@pytest.fixture
def sdata(values: np.ndarray) -> SpatialData:
    sdata = SpatialData()
    total = np.nansum(values, 0, keepdims=True) + 7
    total[0, 3, 4] = 0
    for key, stack, channels in (
        ("map", values, GENES),
        ("map_std", values / 3, GENES),
        ("map_total", total, ["total"]),
    ):
        write_image(sdata, key, stack, channels=channels, transformations=BINS)
    record(sdata, "map", provenance("tl.superresolve", unit="counts per bin", bin_um=BIN_UM))
    return sdata


def dense(x: object) -> np.ndarray:
    x = x.compute() if hasattr(x, "compute") else x
    return np.asarray(x.toarray() if sparse.issparse(x) else x)


# ---- there -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "kind"), [("dense", np.ndarray), ("sparse", sparse.csr_matrix), ("lazy", da.Array)]
)
def test_rows_are_the_known_bins_with_their_values(sdata, values, storage, kind):
    tl.bins_to_table(sdata, "map", genes=["C", "A", "B"], normalize=True, storage=storage)
    table = sdata["map_bins"]
    known = np.isfinite(values).all(0)
    assert table.n_obs == known.sum() == 83
    expected = values[[2, 0, 1]][:, known].T
    row, column = np.nonzero(known)
    np.testing.assert_array_equal(table.obs[["array_row", "array_col"]].to_numpy(), np.column_stack([row, column]))
    for x in (table.X, table.layers["map_bins_std"], table.layers["map_bins_normalized"]):
        assert isinstance(x, kind)
        assert x.dtype == np.float32
    np.testing.assert_array_equal(dense(table.X), expected)
    np.testing.assert_allclose(dense(table.layers["map_bins_std"]), expected / 3, rtol=1e-6)
    total = table.obs["total"].to_numpy()[:, None]
    assert (total == 0).sum() == 1
    normalized = dense(table.layers["map_bins_normalized"])
    np.testing.assert_allclose(normalized * total, np.where(total > 0, 1e4 * expected, 0), rtol=1e-5)
    np.testing.assert_allclose(table.obsm["spatial"], BIN_UM * (np.column_stack([column, row]) + 0.5))


def test_squares_lie_on_the_bins_in_every_coordinate_system(sdata):
    from spatialdata import transform

    tl.bins_to_table(sdata, "map")
    for system, area in (("um", BIN_UM**2), ("px", 40.0**2)):
        squares = transform(sdata["map_bins_squares"], to_coordinate_system=system)
        np.testing.assert_allclose(squares.area, area)
        tl.bins_to_table(sdata, "map", coordinate_system=system, overwrite=True)
        centers = squares.centroid.loc[sdata["map_bins"].obs["instance_id"]]
        np.testing.assert_allclose(sdata["map_bins"].obsm["spatial"], np.column_stack([centers.x, centers.y]))


def test_what_is_known_of_genes_comes_along(sdata):
    from anndata import AnnData
    from spatialdata.models import TableModel

    var = pd.DataFrame({"score": [0.5, 0.1, 0.3], "trusted": [True, False, True]}, index=GENES)
    sdata.tables["map_out_of_fold"] = TableModel.parse(AnnData(np.zeros((2, 3)), var=var))
    tl.bins_to_table(sdata, "map", genes=["C", "A"])
    pd.testing.assert_frame_equal(sdata["map_bins"].var, var.loc[["C", "A"]])
    assert sdata["map_bins"].uns["stgen"]["map_bins"]["values_in"] == "X"


def test_table_survives_a_store_and_other_packages_take_it(sdata, tmp_path):
    tl.bins_to_table(sdata, "map", storage="lazy")
    sdata.write(tmp_path / "section.zarr")
    table = read_zarr(tmp_path / "section.zarr")["map_bins"]
    np.testing.assert_array_equal(dense(table.X), dense(sdata["map_bins"].X))
    sq.gr.spatial_neighbors(table, coord_type="grid", n_neighs=4, spatial_key="spatial")
    degrees = np.asarray(table.obsp["spatial_connectivities"].sum(1)).ravel()
    assert degrees.max() == 4  # neighbors share a side
    sq.gr.spatial_autocorr(table, mode="moran", n_perms=None, use_raw=False)
    assert set(table.uns["moranI"].index) == set(GENES)


def test_spatialdata_plot_draws_the_values(sdata):
    import spatialdata_plot  # noqa: F401

    tl.bins_to_table(sdata, "map")
    ax = sdata.pl.render_shapes("map_bins_squares", color="A", method="matplotlib").pl.show("um", return_ax=True)
    drawn = np.concatenate([c.get_facecolor() for c in ax.collections])
    values = sdata["map_bins"][:, "A"].X.ravel()
    assert len(drawn) == len(values)
    for value in np.unique(values):  # one color each
        assert len(np.unique(drawn[values == value], axis=0)) == 1
    assert len(np.unique(drawn, axis=0)) == len(np.unique(values))
    plt.close("all")


def test_copy_leaves_the_object_alone(sdata):
    before = set(sdata.images) | set(sdata.tables) | set(sdata.shapes)
    result = tl.bins_to_table(sdata, "map", copy=True)
    assert set(sdata.images) | set(sdata.tables) | set(sdata.shapes) == before
    assert {"map_bins", "map_bins_squares"} <= {name for _, name, _ in result.gen_elements()}


# ---- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["dense", "sparse", "lazy"])
def test_there_and_back_is_the_map(sdata, values, storage):
    tl.bins_to_table(sdata, "map", storage=storage)
    tl.table_to_map(sdata, "map_bins", key_added="back")
    expected = np.where(np.isfinite(values).all(0), values, np.nan)
    np.testing.assert_array_equal(sdata["back"].values, expected)
    assert list(sdata["back"].coords["c"].values) == GENES
    from stgen.tl.evaluation.maps import check_same_grid

    check_same_grid(sdata, "map", "back")


def test_what_scanpy_left_becomes_a_map(sdata, values):
    tl.bins_to_table(sdata, "map", normalize=True)
    table = sdata["map_bins"]
    table.obs["score"] = np.arange(table.n_obs, dtype=np.int32)
    order = np.random.default_rng(1).permutation(table.n_obs)[:50]
    sdata.tables["map_bins"] = kept = table[order, ["B", "A"]].copy()
    sc.pp.log1p(kept)
    tl.table_to_map(sdata, "map_bins", layer="map_bins_normalized", genes=["A"], key_added="a")
    tl.table_to_map(sdata, "map_bins", columns=["score", "total"], key_added="columns")
    tl.table_to_map(sdata, "map_bins")
    row, column = kept.obs["array_row"], kept.obs["array_col"]
    np.testing.assert_array_equal(sdata["columns"].values[0, row, column], order)
    np.testing.assert_array_equal(sdata["a"].values[0, row, column], kept[:, "A"].layers["map_bins_normalized"].ravel())
    np.testing.assert_array_equal(sdata["map_bins_map"].values[:, row, column].T, kept.X)
    assert np.isfinite(sdata["columns"].values[0]).sum() == 50
    assert sdata.attrs["stgen"]["columns"]["columns"] == "score, total"


# ---- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"map_key": "nothing"}, KeyError, "no map in sdata.images 'nothing'"),
        ({"genes": ["A", "D"]}, KeyError, "1 of 2 genes are not in the map"),
        ({"genes": "A"}, TypeError, "`genes` must be a list of names"),
        ({"genes": []}, ValueError, "at least one"),
        ({"storage": "zarr"}, ValueError, "`storage` must be one of 'dense', 'sparse', 'lazy'"),
        ({"normalize": "yes"}, TypeError, "`normalize` must be True or False"),
        ({"coordinate_system": "mm"}, KeyError, "mm"),
        ({"key_added": "map"}, ValueError, "name of another element"),
        ({"key_added": "a/b"}, ValueError, "a/b"),
        ({"map_key": "map_std", "normalize": True}, KeyError, "map_std_total"),
    ],
)
def test_bad_input_to_bins_to_table_is_refused(sdata, options, error, message):
    before = {name for _, name, _ in sdata.gen_elements()}
    with pytest.raises(error, match=message):
        tl.bins_to_table(sdata, **({"map_key": "map"} | options))
    assert {name for _, name, _ in sdata.gen_elements()} == before
    assert set(sdata.attrs["stgen"]) == {"map"}


def test_existing_results_are_kept_unless_told(sdata):
    tl.bins_to_table(sdata, "map")
    with pytest.raises(ValueError, match="overwrite=True"):
        tl.bins_to_table(sdata, "map")
    tl.bins_to_table(sdata, "map", genes=["A"], overwrite=True)
    assert sdata["map_bins"].n_vars == 1
    sdata["map_bins"].uns.pop("stgen")
    with pytest.raises(ValueError, match=r"is not a result"):
        tl.bins_to_table(sdata, "map", overwrite=True)
    with pytest.raises(ValueError, match=r"stgen.tl.bins_to_table makes such tables"):
        tl.table_to_map(sdata, "map_bins")


def test_a_map_without_known_bins_is_refused(sdata, values):
    write_image(sdata, "empty", np.full_like(values, np.nan), channels=GENES, transformations=BINS)
    with pytest.raises(ValueError, match="no bin of the map 'empty' is known"):
        tl.bins_to_table(sdata, "empty")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"table_key": "nothing"}, KeyError, "no table 'nothing'"),
        ({"layer": "nothing"}, KeyError, "no layer 'nothing'"),
        ({"genes": ["D"]}, KeyError, "genes are not in the table"),
        ({"columns": ["nothing"]}, KeyError, "obs has no column nothing"),
        ({"columns": "total"}, TypeError, "`columns` must be a list of names"),
        ({"columns": ["region"]}, TypeError, "not numeric"),
        ({"columns": ["total"], "layer": "x"}, ValueError, "not both"),
        ({"key_added": "map", "overwrite": True}, ValueError, "is not a result"),
        ({"key_added": "map_bins"}, ValueError, "name of another element"),
    ],
)
def test_bad_input_to_table_to_map_is_refused(sdata, options, error, message):
    tl.bins_to_table(sdata, "map")
    before = {name for _, name, _ in sdata.gen_elements()}
    with pytest.raises(error, match=message):
        tl.table_to_map(sdata, **({"table_key": "map_bins"} | options))
    assert {name for _, name, _ in sdata.gen_elements()} == before


def test_the_log_says_where_the_table_is(sdata, caplog):
    with caplog.at_level(logging.INFO, "stgen"):
        tl.bins_to_table(sdata, "map")
    assert "tables['map_bins']" in caplog.text
