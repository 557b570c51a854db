"""Spots simulated from molecules and maps, and maps drawn from spots."""

import dask.dataframe as dd
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from scipy import sparse
from shapely import box
from spatialdata import SpatialData
from spatialdata.models import PointsModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation, set_transformation

import stgen
from stgen._spatial.grid import Grid
from stgen._spatial.measured import measurement_of
from stgen._spatial.platforms import spot_pitch
from stgen._spatial.records import write_image, write_table
from stgen._spatial.section import get_section

XY = ("x", "y")


def molecules(n=4000, size=(400.0, 300.0), genes=("a", "b", "c"), seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.uniform(0, size, (n, 2)), columns=list(XY))
    frame["gene"] = pd.Categorical(rng.choice(genes, n), categories=list(genes))
    frame["cell_id"] = np.arange(n) // 10
    return frame


def section(frame, transformations=None, npartitions=1):
    points = PointsModel.parse(
        dd.from_pandas(frame, npartitions=npartitions),
        feature_key="gene",
        instance_key="cell_id",
        transformations=transformations or {"um": Identity()},
    )
    return SpatialData(points={"transcripts": points})


def map_section(values, bin_um=10.0, genes=None):
    sdata = SpatialData()
    genes = [f"g{i}" for i in range(len(values))] if genes is None else genes
    place = Affine(np.array([[bin_um, 0, 50], [0, bin_um, -20], [0, 0, 1]]), XY, XY)
    write_image(sdata, "m", np.asarray(values), channels=genes, transformations={"um": place, "px": Identity()})
    return sdata


def poisson_map(n_genes=3, height=40, width=50, mean=3.0):
    return np.random.default_rng(0).poisson(mean, (n_genes, height, width)).astype(np.float32)


def counts_of(sdata, key="spots_counts"):
    return sdata[key].X.toarray()


def centers_of(sdata, key="spots"):
    return np.column_stack([sdata[key].geometry.x, sdata[key].geometry.y])


def in_discs(frame, centers, radius, genes):
    distance = np.hypot(*(frame[axis].to_numpy()[:, None] - centers[:, i] for i, axis in enumerate(XY)))
    inside = distance <= radius
    return np.stack([inside[(frame["gene"] == gene).to_numpy()].sum(0) for gene in genes], 1)


# -- spots from molecules --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["hex", "square"])
@pytest.mark.parametrize("npartitions", [1, 5])
def test_spots_count_the_molecules_within_their_discs(layout, npartitions):
    frame = molecules()
    sdata = section(frame, npartitions=npartitions)
    stgen.pp.simulate_spots(sdata, layout=layout, diameter_um=40, pitch_um=50)
    centers = centers_of(sdata)
    np.testing.assert_array_equal(counts_of(sdata), in_discs(frame, centers, 20, "abc"))
    assert sdata["spots"]["radius"].unique() == [20]
    assert list(sdata["spots_counts"].var_names) == ["a", "b", "c"]
    np.testing.assert_array_equal(sdata["spots_counts"].obsm["spatial"], centers)
    assert isinstance(sdata["spots_counts"].X, sparse.csr_matrix)


@pytest.mark.parametrize(("layout", "n_near"), [("hex", 6), ("square", 4)])
def test_the_lattice_covers_the_molecules_with_one_pitch(layout, n_near):
    frame = molecules(n=30000)
    sdata = section(frame)
    stgen.pp.simulate_spots(sdata, layout=layout, pitch_um=30, diameter_um=30)
    centers = centers_of(sdata)
    pitch, hexagonal = spot_pitch(centers)
    assert pitch == pytest.approx(30)
    assert hexagonal == (layout == "hex")
    distance = np.hypot(*(centers[:, None] - centers).T)
    assert np.median((np.abs(distance - 30) < 1e-6).sum(1)) == n_near
    covered = np.pi / (2 * np.sqrt(3)) if layout == "hex" else np.pi / 4
    assert counts_of(sdata).sum() / len(frame) == pytest.approx(covered, abs=0.02)  # discs reach over the edge
    row, column = sdata["spots_counts"].obs[["array_row", "array_col"]].to_numpy().T
    step = (15, 30 * np.sqrt(3) / 2) if layout == "hex" else (30, 30)
    np.testing.assert_allclose(centers[:, 0] - centers[0, 0], (column - column[0]) * step[0], atol=1e-9)
    np.testing.assert_allclose(centers[:, 1] - centers[0, 1], (row - row[0]) * step[1], atol=1e-9)
    if layout == "hex":
        assert ((row + column) % 2 == 0).all()


def test_spots_without_any_molecule_are_left_out_but_not_those_without_the_gene():
    frame = molecules(genes=("a",))
    frame = frame[(frame["x"] < 150) | (frame["x"] > 300)]
    frame["gene"] = pd.Categorical(np.where(frame["x"] < 150, "a", "b"))
    sdata = section(frame)
    stgen.pp.simulate_spots(sdata, genes=["a"], diameter_um=40, pitch_um=50)
    x = centers_of(sdata)[:, 0]
    assert ((x < 170) | (x > 280)).all()
    counts = counts_of(sdata)
    assert counts.shape[1] == 1
    assert (counts[x > 280] == 0).all()
    assert counts[x > 280].size


def test_spots_lie_in_the_coordinates_of_the_points_with_their_systems():
    frame = molecules()
    plain, turned = section(frame), frame.copy()
    turned["x"], turned["y"] = 2 * frame["y"], -2 * frame["x"]  # stored in halves of µm, turned by a right angle
    back = Affine(np.array([[0, -0.5, 0], [0.5, 0, 0], [0, 0, 1]]), XY, XY)
    sdata = section(turned, {"um": back, "half": Identity()})
    for each in (plain, sdata):
        stgen.pp.simulate_spots(each, layout="square", diameter_um=40, pitch_um=50)
    assert sdata["spots"]["radius"].unique() == [40]
    assert set(get_transformation(sdata["spots"], get_all=True)) == {"um", "half"}
    found = get_section(sdata, table_key="spots_counts", coordinate_system="um")
    expected = get_section(plain, table_key="spots_counts")
    order = [np.lexsort(each.xy_px.round(6).T) for each in (found, expected)]
    np.testing.assert_allclose(found.xy_px[order[0]], expected.xy_px[order[1]])
    np.testing.assert_array_equal(counts_of(sdata)[order[0]], counts_of(plain)[order[1]])
    assert found.spot_diameter_um == pytest.approx(40)


def test_simulated_spots_are_a_section_like_any_other(sdata):
    stgen.pp.simulate_spots(sdata, genes=["EPCAM", "ACTB"], key_added="sim", pitch_um=60)
    found = get_section(sdata, table_key="sim_counts", image_key="he")
    assert found.spot_diameter_um == pytest.approx(55)
    grid = Grid.of_image(sdata, "he", bin_um=10)
    measured = measurement_of(sdata, "sim_counts", grid, ["ACTB"])
    np.testing.assert_array_equal(measured.counts[:, 0], counts_of(sdata, "sim_counts")[:, 1])
    entry = sdata.attrs["stgen"]["sim"]
    assert (entry["function"], entry["source"], entry["n_spots"]) == (
        "pp.simulate_spots",
        "transcripts",
        sdata["sim_counts"].n_obs,
    )
    assert "thin" not in entry
    assert "sim_rest" not in sdata


# -- thinning ------------------------------------------------------------------------------------------------------------
def test_thinning_splits_the_molecules_into_measured_and_rest():
    frame = molecules(n=20000)
    sdata = section(frame)
    stgen.pp.simulate_spots(sdata, thin=0.3, diameter_um=40, pitch_um=50)
    rest = sdata["spots_rest"].compute()
    assert len(rest) / len(frame) == pytest.approx(0.7, abs=0.02)
    assert rest.index.isin(frame.index).all()
    pd.testing.assert_frame_equal(rest, frame.loc[rest.index], check_categorical=False)
    seen = frame.drop(rest.index)
    centers = centers_of(sdata)
    np.testing.assert_array_equal(counts_of(sdata), in_discs(seen, centers, 20, "abc"))
    attrs = sdata["spots_rest"].attrs["spatialdata_attrs"]
    assert attrs == {"feature_key": "gene", "instance_key": "cell_id"}
    assert set(get_transformation(sdata["spots_rest"], get_all=True)) == {"um"}


def test_the_split_depends_on_the_seed_and_not_on_the_partitions():
    frame = molecules()
    rests, counts = [], []
    for npartitions, seed in [(1, 4), (5, 4), (5, 5)]:
        sdata = section(frame, npartitions=npartitions)
        stgen.pp.simulate_spots(sdata, thin=0.5, seed=seed)
        assert sdata["spots_rest"].npartitions == npartitions
        rests.append(sdata["spots_rest"].compute().index.to_numpy())
        counts.append(counts_of(sdata))
    np.testing.assert_array_equal(rests[0], rests[1])
    np.testing.assert_array_equal(counts[0], counts[1])
    assert not np.array_equal(rests[1], rests[2])


def test_the_rest_survives_the_disk_and_is_not_taken_for_the_molecules(sdata, tmp_path):
    stgen.pp.simulate_spots(sdata, genes=["EPCAM"], thin=0.5, key_added="sim")
    del sdata.images["he"]
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    assert len(back["sim_rest"]) == len(sdata["sim_rest"])
    assert back["sim_rest"].attrs["spatialdata_attrs"]["feature_key"] == "gene"
    stgen.pp.rasterize(back, genes=["EPCAM"])
    assert back.attrs["stgen"]["counts"]["source"] == "transcripts"
    stgen.pp.rasterize(back, genes=["EPCAM"], points_key="sim_rest", key_added="truth")
    assert 0.4 < np.nansum(back["truth"]) / np.nansum(back["counts"]) < 0.6


# -- spots from maps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["hex", "square"])
def test_spots_of_a_map_pool_it_over_their_discs(layout):
    values = poisson_map()
    values[:, 5, 5] = np.nan
    sdata = map_section(values)
    stgen.pp.simulate_spots(sdata, map_key="m", genes=["g2", "g0"], layout=layout)
    grid = Grid.of_map(sdata, "m")
    measured = measurement_of(sdata, "spots_counts", grid, ["g2", "g0"])
    assert measured.footprints.diameter == pytest.approx(5.5)
    np.testing.assert_allclose(measured.counts, measured.footprints.pool(values[[2, 0]]), rtol=1e-5)
    assert sdata["spots"]["radius"].unique() == [2.75]
    assert set(get_transformation(sdata["spots"], get_all=True)) == {"um", "px"}


def test_spots_of_molecules_and_of_their_map_agree(sdata):
    genes = ["ACTB", "KRT8"]
    stgen.pp.rasterize(sdata, genes=genes, bin_um=2.5, mask_um=None)
    stgen.pp.simulate_spots(sdata, map_key="counts", key_added="of_map")
    frame = sdata["transcripts"].compute()
    found = get_section(sdata, table_key="of_map_counts")
    exact = in_discs(frame, found.xy_px, 27.5, genes)
    assert np.corrcoef(exact.ravel(), counts_of(sdata, "of_map_counts").ravel())[0, 1] > 0.999


def test_thinning_a_map_is_binomial_and_loses_nothing():
    values = poisson_map(mean=20.0)
    values[:, :3, :3] = np.nan
    sdata = map_section(values)
    stgen.pp.simulate_spots(sdata, map_key="m", genes=["g2", "g0"], thin=0.3, seed=7)
    rest = np.asarray(sdata["spots_rest"].data)
    assert list(sdata["spots_rest"].coords["c"].values) == ["g2", "g0"]
    np.testing.assert_array_equal(np.isnan(rest), np.isnan(values[[2, 0]]))
    seen = values[[2, 0]] - rest
    known = np.isfinite(rest)
    assert (rest[known] >= 0).all()
    assert (seen[known] >= 0).all()
    assert (rest[known] == np.round(rest[known])).all()
    assert np.nansum(seen) / np.nansum(values[[2, 0]]) == pytest.approx(0.3, abs=0.02)
    measured = measurement_of(sdata, "spots_counts", Grid.of_map(sdata, "m"), ["g2", "g0"])
    np.testing.assert_allclose(measured.counts, measured.footprints.pool(seen), rtol=1e-5)
    assert Grid.of_map(sdata, "spots_rest").bin_um == 10.0
    assert sdata.attrs["stgen"]["spots_rest"]["thin"] == 0.3
    again = map_section(values)
    stgen.pp.simulate_spots(again, map_key="m", thin=0.3, seed=7)
    np.testing.assert_array_equal(np.asarray(again["spots_rest"].data)[[2, 0]], rest)  # whatever the genes


# -- what simulate_spots refuses ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"diameter_um": 120.0}, ValueError, "Spots of 120 µm overlap at a pitch of 100 µm"),
        ({"diameter_um": 0.0}, ValueError, "`diameter_um` must be a positive number"),
        ({"pitch_um": np.nan}, ValueError, "`pitch_um` must be a finite number"),
        ({"layout": "random"}, ValueError, "`layout` must be one of 'hex', 'square', found 'random'"),
        ({"thin": 1.0}, ValueError, "`thin` must be None or a probability"),
        ({"seed": -1}, ValueError, "`seed` must be a whole number"),
        (
            {"genes": ["EPCAM", "NOPE"]},
            KeyError,
            r"1 of 2 genes are not in the column 'gene' of 'transcripts' \(NOPE\)",
        ),
        ({"points_key": "x"}, KeyError, "found transcripts. Pass points_key="),
        ({"map_key": "x"}, KeyError, "found he. Pass map_key="),
        ({"map_key": "he"}, ValueError, "'he' is a picture .*no map of genes"),
        ({"map_key": "he", "points_key": "transcripts"}, ValueError, "pass the one to measure"),
        ({"coordinate_system": "px"}, KeyError, "not in the coordinate system 'px'"),
        ({"key_added": "spots"}, ValueError, "sdata.shapes.'spots'. exists already"),
        ({"key_added": "spot"}, ValueError, "sdata.tables.'spot_counts'. exists already"),
        ({"key_added": "he"}, ValueError, "'he' is the name of another element"),
    ],
)
def test_what_simulate_spots_refuses(simulated, kwargs, error, message):
    elements = set(simulated._shared_keys)
    with pytest.raises(error, match=message):
        stgen.pp.simulate_spots(simulated, **({"key_added": "sim"} | kwargs))
    assert set(simulated._shared_keys) == elements
    assert set(simulated.attrs["stgen"]) == {"simulated"}


def test_maps_without_the_gene_or_of_bins_larger_than_spots_are_refused(sdata):
    stgen.pp.rasterize(sdata, points_key="transcripts", genes=["CD3E"], bin_um=20, key_added="map")
    with pytest.raises(KeyError, match="1 of 1 genes are not in the map 'map'"):
        stgen.pp.simulate_spots(sdata, map_key="map", genes=["EPCAM"], key_added="sim")
    with pytest.raises(ValueError, match="smaller than the bins of 'map'"):
        stgen.pp.simulate_spots(sdata, map_key="map", diameter_um=5, key_added="sim")
    assert "sim" not in sdata.shapes


@pytest.mark.parametrize(
    ("value", "thin", "message"),
    [
        (-1.0, None, "holds negative values"),
        (np.inf, None, "infinite"),
        (0.5, 0.5, "not whole, which cannot be thinned"),
    ],
)
def test_maps_that_cannot_be_measured_leave_nothing_behind(value, thin, message):
    values = poisson_map()
    values[1, 3, 3] = value
    sdata = map_section(values)
    with pytest.raises(ValueError, match=f"The map 'm' holds.*{message.removeprefix('holds')}|{message}"):
        stgen.pp.simulate_spots(sdata, map_key="m", thin=thin)
    assert set(sdata._shared_keys) == {"m"}
    assert "stgen" not in sdata.attrs


def test_empty_maps_have_no_spots():
    sdata = map_section(np.zeros((1, 20, 20)))
    with pytest.raises(ValueError, match="None of .* spots holds a molecule of 'm'"):
        stgen.pp.simulate_spots(sdata, map_key="m")


def test_overwrite_replaces_all(sdata):
    stgen.pp.simulate_spots(sdata, genes=["EPCAM"], thin=0.5, key_added="sim")
    n_obs = sdata["sim_counts"].n_obs
    with pytest.raises(ValueError, match="exists already"):
        stgen.pp.simulate_spots(sdata, genes=["EPCAM"], thin=0.9, key_added="sim")
    stgen.pp.simulate_spots(sdata, genes=["EPCAM"], thin=0.9, key_added="sim", pitch_um=60, overwrite=True)
    assert sdata["sim_counts"].n_obs == len(sdata["sim"]) > n_obs
    assert len(sdata["sim_rest"]) < 0.2 * len(sdata["transcripts"])


# -- maps from spots -----------------------------------------------------------------------------------------------------------
def test_a_map_of_spots_pools_back_to_their_counts(sdata):
    stgen.pp.rasterize(sdata, bin_um=10, bounds_um=(0, 0, 600, 600))
    genes = ["ACTB", "EPCAM", "KRT8"]
    stgen.pp.spots_to_map(sdata, table_key="spot_counts", map_key="counts", genes=genes)
    values = np.asarray(sdata["spot_map"].data)
    measured = measurement_of(sdata, "spot_counts", Grid.of_map(sdata, "counts"), genes)
    np.testing.assert_allclose(measured.footprints.pool(values), measured.counts, rtol=1e-5)
    rows, share = measured.footprints.coverage(0, 0, 60, 60)
    assert len(rows) == len(measured)
    np.testing.assert_array_equal(np.isnan(values[0]), share.sum(0).reshape(60, 60) == 0)
    area = np.asarray(share.sum(1)).ravel()
    center = np.floor(measured.footprints.centers).astype(int)
    np.testing.assert_allclose(values[:, center[:, 0], center[:, 1]], (measured.counts / area[:, None]).T, rtol=1e-5)
    assert sdata.attrs["stgen"]["spot_map"]["n_spots"] == 32


def test_the_grid_may_be_that_of_an_image(sdata):
    stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=20)
    assert sdata["spot_map"].shape == (60, 30, 30)
    np.testing.assert_allclose(Grid.of_map(sdata, "spot_map").to_system("um"), np.diag([20, 20, 1]))
    assert list(sdata["spot_map"].coords["c"].values) == list(sdata["spot_counts"].var_names)


def test_bins_that_spots_share_have_the_mean_density():
    frame = pd.DataFrame({"x": [10.0, 30.0, 50.0], "y": 10.0, "gene": pd.Categorical(["a", "a", "b"]), "cell_id": 0})
    sdata = section(frame)
    stgen.pp.simulate_spots(sdata, layout="square", diameter_um=20, pitch_um=20)
    stgen.pp.rasterize(sdata, bin_um=20, bounds_um=(0, 0, 60, 20), mask_um=None)
    stgen.pp.spots_to_map(sdata, table_key="spots_counts", map_key="counts", genes=["a"])
    grid = Grid.of_map(sdata, "counts")
    measured = measurement_of(sdata, "spots_counts", grid, ["a"])
    rows, share = measured.footprints.coverage(-2, -2, 5, 7)
    share = share.toarray().reshape(len(rows), 5, 7)
    density = measured.counts[rows, 0] / share.sum((1, 2))
    expected = np.einsum("nyx,n->yx", share, density)[2:3, 2:5] / share.sum(0)[2:3, 2:5]
    np.testing.assert_allclose(np.asarray(sdata["spot_map"].data)[0], expected, rtol=1e-5)


def test_squares_that_tile_the_plane_are_exact_and_leave_no_gap():
    row, column = np.divmod(np.arange(30), 6)
    squares = gpd.GeoDataFrame(geometry=box(8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
    sdata = SpatialData(shapes={"bins": ShapesModel.parse(squares, transformations={"um": Identity()})})
    counts = np.random.default_rng(0).poisson(4, (30, 2)).astype(np.float32)
    write_table(sdata, "table", AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=["a", "b"])), region="bins")
    place = Scale([2, 2], axes=XY)
    write_image(sdata, "grid", np.zeros((1, 20, 24)), channels=["a"], transformations={"um": place})
    stgen.pp.spots_to_map(sdata, table_key="table", map_key="grid")
    expected = counts.T.reshape(2, 5, 6).repeat(4, 1).repeat(4, 2) / 16
    np.testing.assert_allclose(sdata["spot_map"], expected, rtol=1e-6)
    stgen.pp.degrade(sdata, map_key="spot_map", factor=4)
    np.testing.assert_allclose(sdata["spot_map_4x"], counts.T.reshape(2, 5, 6), rtol=1e-6)


def test_the_map_of_spots_is_lazy_and_agrees_in_blocks(sdata, monkeypatch):
    stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=10, key_added="whole")
    monkeypatch.setattr("stgen.pp._rasterize._CHUNK", 16)
    stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=10, key_added="blocks")
    np.testing.assert_array_equal(sdata["blocks"], sdata["whole"])


def test_map_of_a_layer(normalized):
    options = {"table_key": "spot_counts", "image_key": "he", "bin_um": 10, "genes": ["ACTB"]}
    stgen.pp.spots_to_map(normalized, layer="counts", **options)
    normalized["spot_counts"].X = normalized["spot_counts"].layers["counts"]
    stgen.pp.spots_to_map(normalized, key_added="of_x", **options)
    np.testing.assert_array_equal(normalized["spot_map"], normalized["of_x"])
    assert normalized.attrs["stgen"]["spot_map"]["layer"] == "counts"


def test_spots_beyond_the_grid_are_cut(sdata):
    genes = ["ACTB"]
    stgen.pp.rasterize(sdata, bin_um=10, bounds_um=(0, 0, 300, 600), genes=genes)
    stgen.pp.spots_to_map(sdata, table_key="spot_counts", map_key="counts", genes=genes)
    stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=10, genes=genes, key_added="whole")
    np.testing.assert_allclose(sdata["spot_map"], sdata["whole"][:, :, :30], rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "The grid is that of a map, map_key=<key>, or one over an image"),
        ({"bin_um": 10}, ValueError, "found map_key=None, image_key=None, bin_um=10"),
        ({"bin_um": 10, "map_key": "he"}, ValueError, "The grid is that of a map"),
        ({"map_key": "x"}, KeyError, "found he. Pass map_key="),
        ({"image_key": "x", "bin_um": 10}, KeyError, "found he. Pass image_key="),
        ({"image_key": "he", "bin_um": 10, "table_key": "x"}, KeyError, "found cell_counts, spot_counts"),
        (
            {"image_key": "he", "bin_um": 10, "genes": ["NOPE"]},
            KeyError,
            "1 of 1 genes are not in the table 'spot_counts'",
        ),
        ({"image_key": "he", "bin_um": 10, "layer": "x"}, KeyError, "There is no layer 'x'"),
        ({"image_key": "he", "bin_um": 10, "table_key": "cell_counts"}, ValueError, "neither circles of one size"),
        ({"image_key": "he", "bin_um": 10, "key_added": "he"}, ValueError, "exists already"),
        ({"image_key": "he", "bin_um": 700}, ValueError, "Bins of 700 µm are larger than the image"),
    ],
)
def test_what_spots_to_map_refuses(simulated, kwargs, error, message):
    elements = set(simulated._shared_keys)
    with pytest.raises(error, match=message):
        stgen.pp.spots_to_map(simulated, **({"table_key": "spot_counts"} | kwargs))
    assert set(simulated._shared_keys) == elements


def test_spots_elsewhere_are_refused(sdata):
    set_transformation(
        sdata["spots"], {"um": Affine(np.array([[1, 0, 5000], [0, 1, 0], [0, 0, 1.0]]), XY, XY)}, set_all=True
    )
    with pytest.raises(ValueError, match="Nothing of 'spot_counts' was measured on the grid"):
        stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=10)
    set_transformation(sdata["spots"], {"px": Identity()}, set_all=True)
    with pytest.raises(ValueError, match="share no coordinate system"):
        stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=10)
    assert "spot_map" not in sdata
