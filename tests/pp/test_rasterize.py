"""Maps of counts from molecules and tables, and their low-resolution versions."""

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import PointsModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation, set_transformation

import stgen
from stgen._spatial.grid import Grid, get_map
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import write_image, write_table
from stgen._spatial.section import find_image

XY = ("x", "y")


def molecules(n=2000, size=(100.0, 60.0), genes=("a", "b", "c"), seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.uniform(0, size, (n, 2)), columns=list(XY))
    frame["gene"] = pd.Categorical(rng.choice(genes, n), categories=list(genes))
    return frame


def section(frame=None, transformations=None, npartitions=1, **kwargs):
    frame = molecules() if frame is None else frame
    points = PointsModel.parse(
        dd.from_pandas(frame, npartitions=npartitions),
        transformations=transformations or {"um": Identity()},
        **({"feature_key": "gene"} | kwargs),
    )
    return SpatialData(points={"transcripts": points})


def values_of(sdata, key="counts"):
    return np.asarray(sdata[key].data)


def histogram(frame, gene, bin_um, bounds):
    x0, y0, x1, y1 = bounds
    own = frame[frame["gene"] == gene]
    edges = np.arange(y0, y1 + 1e-9, bin_um), np.arange(x0, x1 + 1e-9, bin_um)
    return np.histogram2d(own["y"], own["x"], edges)[0]


# -- molecules ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("npartitions", [1, 7])
def test_molecules_are_counted_per_bin_and_gene(npartitions):
    frame = molecules()
    sdata = section(frame, npartitions=npartitions)
    stgen.pp.rasterize(sdata, bin_um=5, mask_um=None)
    counts = values_of(sdata)
    assert (counts.shape, counts.dtype) == ((3, 12, 20), np.float32)
    assert list(sdata["counts"].coords["c"].values) == ["a", "b", "c"]
    for gene, own in zip("abc", counts, strict=True):
        np.testing.assert_array_equal(own, histogram(frame, gene, 5, (0, 0, 100, 60)))


def test_no_molecule_of_a_simulated_section_is_lost(sdata):
    stgen.pp.rasterize(sdata)
    assert np.nansum(values_of(sdata)) == len(sdata["transcripts"])
    assert list(sdata["counts"].coords["c"].values) == list(sdata["spot_counts"].var_names)


def test_the_grid_lies_on_multiples_of_the_bin_and_its_bins_where_the_molecules_are(sdata):
    stgen.pp.rasterize(sdata, bin_um=30, mask_um=None)
    grid = Grid.of_map(sdata, "counts")
    origin = grid.to_system("um")[:2, 2]
    np.testing.assert_allclose(origin / 30, np.round(origin / 30), atol=1e-9)
    inside = np.floor(grid.locate(sdata, "transcripts")).astype(int)
    expected = np.zeros((grid.height, grid.width))
    np.add.at(expected, tuple(inside.T), 1)
    np.testing.assert_array_equal(values_of(sdata).sum(0), expected)


def test_bounds_start_the_grid_exactly_and_hold_whole_bins_only():
    frame = molecules()
    sdata = section(frame)
    stgen.pp.rasterize(sdata, bin_um=7, mask_um=None, bounds_um=(3.5, -4, 60, 33))
    assert values_of(sdata).shape == (3, 5, 8)
    np.testing.assert_allclose(Grid.of_map(sdata, "counts").to_system("um")[:2, 2], [3.5, -4])
    np.testing.assert_array_equal(values_of(sdata)[1], histogram(frame, "b", 7, (3.5, -4, 59.5, 31)))


def test_genes_come_in_the_order_asked_for_and_may_have_no_molecule():
    frame = molecules()
    frame["gene"] = frame["gene"].cat.add_categories(["none"])
    sdata = section(frame)
    stgen.pp.rasterize(sdata, genes=["c", "none", "a"], mask_um=None, bin_um=10)
    counts = values_of(sdata)
    assert list(sdata["counts"].coords["c"].values) == ["c", "none", "a"]
    np.testing.assert_array_equal(counts[2], histogram(frame, "a", 10, (0, 0, 100, 60)))
    assert (counts[1] == 0).all()


@pytest.mark.parametrize("as_type", ["string", "object", "unknown categories", "missing"])
def test_genes_may_be_stored_in_any_way(as_type):
    frame = molecules()
    expected = histogram(frame, "b", 10, (0, 0, 100, 60))
    names = frame["gene"].astype(str)
    frame["gene"] = names.astype("string" if as_type == "string" else object)
    if as_type == "missing":
        frame.loc[(names == "a").to_numpy(), "gene"] = None
    points = dd.from_pandas(frame, npartitions=2)
    if as_type == "unknown categories":
        points["gene"] = points["gene"].astype("category")
    points = PointsModel.parse(points, transformations={"um": Identity()})
    sdata = SpatialData(points={"transcripts": points})
    stgen.pp.rasterize(sdata, mask_um=None)
    assert list(sdata["counts"].coords["c"].values) == (["b", "c"] if as_type == "missing" else ["a", "b", "c"])
    np.testing.assert_array_equal(get_map(sdata, "counts", ["b"])[0], expected)


def test_the_gene_column_is_the_feature_key_or_a_usual_name_or_named():
    frame = molecules().rename(columns={"gene": "feature_name"})
    sdata = section(frame, feature_key=None)
    stgen.pp.rasterize(sdata)
    frame = frame.rename(columns={"feature_name": "target"})
    frame["gene"] = "decoy"
    sdata = section(frame, feature_key="target")
    stgen.pp.rasterize(sdata)
    assert list(sdata["counts"].coords["c"].values) == ["a", "b", "c"]
    stgen.pp.rasterize(sdata, gene_column="gene", key_added="other")
    assert list(sdata["other"].coords["c"].values) == ["decoy"]
    with pytest.raises(KeyError, match="have no column 'x1'; found .*target.*Pass gene_column="):
        stgen.pp.rasterize(sdata, gene_column="x1", key_added="third")
    bare = section(molecules().rename(columns={"gene": "target"}), feature_key=None)
    with pytest.raises(KeyError, match="no feature key, and no column 'gene' or 'feature_name'"):
        stgen.pp.rasterize(bare)


def test_the_map_has_the_systems_of_the_molecules_and_the_grid_lies_along_the_chosen_one():
    turn = Affine(np.array([[0, -0.5, 80], [0.5, 0, 10], [0, 0, 1]]), XY, XY)
    frame = molecules()
    sdata = section(frame, {"px": Identity(), "um": turn})
    stgen.pp.rasterize(sdata, bin_um=5, mask_um=None)
    grid = Grid.of_map(sdata, "counts")
    assert set(grid.transformations) == {"px", "um"}
    np.testing.assert_allclose(grid.to_system("um")[:2, :2], 5 * np.eye(2))
    for system in ("um", "px"):
        at = np.floor(grid.locate(sdata, "transcripts", system)).astype(int)
        expected = np.zeros((grid.height, grid.width))
        np.add.at(expected, tuple(at.T), 1)
        np.testing.assert_array_equal(values_of(sdata).sum(0), expected)
    stgen.pp.rasterize(sdata, bin_um=5, coordinate_system="px", key_added="along_px")  # 0.5 µm per px, from "um"
    np.testing.assert_allclose(Grid.of_map(sdata, "along_px").to_system("px")[:2, :2], 10 * np.eye(2))


def test_points_in_three_dimensions_and_empty_partitions():
    frame = molecules().sort_values("x", ignore_index=True)
    frame["z"] = 4.0
    points = dd.from_pandas(frame, npartitions=5)
    points = points[points["x"] > 50]  # the first partitions are empty
    points = PointsModel.parse(
        points, feature_key="gene", transformations={"um": Scale([2, 2, 3], axes=("x", "y", "z")), "px": Identity()}
    )
    sdata = SpatialData(points={"transcripts": points})
    stgen.pp.rasterize(sdata, bin_um=10, mask_um=None, bounds_um=(0, 0, 200, 120))
    expected = histogram(frame[frame["x"] > 50], "a", 5, (0, 0, 100, 60))
    np.testing.assert_array_equal(values_of(sdata)[0], expected)
    assert set(get_transformation(sdata["counts"], get_all=True)) == {"um", "px"}
    stgen.pp.simulate_spots(sdata, thin=0.5, diameter_um=20, pitch_um=20)
    assert 0 < len(sdata["spots_rest"]) < len(points)
    assert "z" in sdata["spots_rest"].columns


def test_units_without_a_name_need_mpp():
    sdata = section(
        transformations={"global": Scale([1 / 0.2125, 1 / 0.2125], axes=XY)}
    )  # as spatialdata-io reads Xenium
    with pytest.raises(ValueError, match="µm per unit of the coordinate system 'global' are not known.*mpp="):
        stgen.pp.rasterize(sdata)
    assert "counts" not in sdata
    stgen.pp.rasterize(sdata, mpp=0.2125, bin_um=5, mask_um=None)
    assert values_of(sdata).shape == (3, 12, 20)
    assert Grid.of_map(sdata, "counts").bin_um == 5.0
    np.testing.assert_allclose(Grid.of_map(sdata, "counts").to_system("global")[0, 0], 5 / 0.2125)


# -- tissue --------------------------------------------------------------------------------------------------------------
def test_bins_far_from_any_molecule_are_unknown():
    frame = pd.DataFrame({"x": [5.0, 195.0], "y": [5.0, 95.0], "gene": pd.Categorical(["a", "b"])})
    sdata = section(frame)
    stgen.pp.rasterize(sdata, genes=["a"], mask_um=30)
    y, x = np.mgrid[:10, :20]
    near = np.minimum(np.hypot(y, x), np.hypot(y - 9, x - 19)) <= 3
    np.testing.assert_array_equal(np.isfinite(values_of(sdata)[0]), near)
    assert np.nansum(values_of(sdata)) == 1
    stgen.pp.rasterize(sdata, mask_um=0, key_added="touched")
    assert np.isfinite(values_of(sdata, "touched")[0]).sum() == 2


# -- lazily ----------------------------------------------------------------------------------------------------------------
def test_the_map_is_computed_block_by_block(monkeypatch):
    monkeypatch.setattr("stgen.pp._rasterize._CHUNK", 8)
    monkeypatch.setattr("stgen.pp._degrade._CHUNK", 8)
    frame = molecules()
    sdata = section(frame)
    stgen.pp.rasterize(sdata, bin_um=5, mask_um=None)
    image = sdata["counts"]
    assert isinstance(image.data, da.Array)
    np.testing.assert_array_equal(image.data, np.stack([histogram(frame, g, 5, (0, 0, 100, 60)) for g in "abc"]))
    np.testing.assert_array_equal(image[1, 3:11, 5:19:2], histogram(frame, "b", 5, (0, 0, 100, 60))[3:11, 5:19:2])
    stgen.pp.degrade(sdata, map_key="counts", factor=3)
    assert values_of(sdata, "counts_3x").sum() == len(frame)


def test_the_chunks_are_of_one_gene():
    sdata = section(molecules(size=(1000.0, 700.0)))
    stgen.pp.rasterize(sdata, bin_um=1)
    assert sdata["counts"].data.chunksize == (1, 512, 512)


def test_maps_survive_the_disk_and_are_no_histology(sdata, tmp_path):
    stgen.pp.rasterize(sdata, genes=["EPCAM", "ACTB"])
    stgen.pp.degrade(sdata, map_key="counts", factor=4)
    assert find_image(sdata, None) == "he"
    maps = SpatialData(
        images={key: sdata[key] for key in ("counts", "counts_4x")},
        labels={"counts_4x_area": sdata["counts_4x_area"]},
        attrs=sdata.attrs,
    )
    maps.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    for key in ("counts", "counts_4x"):
        np.testing.assert_array_equal(values_of(back, key), values_of(sdata, key))
        assert list(back[key].coords["c"].values) == ["EPCAM", "ACTB"]
        np.testing.assert_allclose(Grid.of_map(back, key).to_system("um"), Grid.of_map(sdata, key).to_system("um"))
        assert back.attrs["stgen"][key] == sdata.attrs["stgen"][key]
    entry = back.attrs["stgen"]["counts"]
    assert (entry["function"], entry["unit"], entry["bin_um"]) == ("pp.rasterize", "counts per bin", 10.0)
    np.testing.assert_array_equal(back["counts_4x_area"], sdata["counts_4x_area"])


# -- tables ----------------------------------------------------------------------------------------------------------------
def test_a_table_of_cells_goes_where_their_centroids_are(sdata):
    table = sdata["cell_counts"]
    stgen.pp.rasterize(
        sdata, table_key="cell_counts", genes=["KRT8", "EPCAM"], mask_um=None, bounds_um=(0, 0, 600, 600)
    )
    counts = values_of(sdata)
    x, y = table.obsm["spatial"].T
    for gene, own in zip(["KRT8", "EPCAM"], counts, strict=True):
        weights = table[:, gene].X.toarray()[:, 0]
        edges = np.arange(0, 601, 10)
        np.testing.assert_array_equal(own, np.histogram2d(y, x, (edges, edges), weights=weights)[0])
    assert set(get_transformation(sdata["counts"], get_all=True)) == {"um"}


def test_layers_and_fractions_of_a_table(sdata):
    stgen.pp.rasterize(sdata, table_key="cell_counts", genes=["EPCAM"], layer="rate")
    total = sdata["cell_counts"][:, "EPCAM"].layers["rate"].sum()
    assert np.nansum(values_of(sdata)) == pytest.approx(total, rel=1e-5)
    with pytest.raises(KeyError, match="There is no layer 'x'"):
        stgen.pp.rasterize(sdata, table_key="cell_counts", layer="x", key_added="other")


def bins_table(side=8.0, n=6, scale=1.0):
    """Counts of square bins of ``side`` µm, as Visium HD gives them, in units of ``scale`` µm."""
    row, column = np.divmod(np.arange(n * n), n)
    xy = np.column_stack([column + 0.5, row + 0.5]) * side / scale
    circles = ShapesModel.parse(xy, geometry=0, radius=1.0, transformations={"um": Scale([scale, scale], axes=XY)})
    sdata = SpatialData(shapes={"bins": circles})
    counts = np.random.default_rng(0).poisson(3, (n * n, 2)).astype(np.float32)
    write_table(
        sdata, "bin_counts", AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=["a", "b"])), region="bins"
    )
    return sdata, counts.T.reshape(2, n, n)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_regular_bins_become_the_same_bins_or_blocks_of_them(scale):
    sdata, counts = bins_table(scale=scale)
    stgen.pp.rasterize(sdata, table_key="bin_counts", bin_um=8)
    np.testing.assert_array_equal(values_of(sdata), counts)
    stgen.pp.rasterize(sdata, table_key="bin_counts", bin_um=16, key_added="blocks")
    np.testing.assert_array_equal(values_of(sdata, "blocks"), counts.reshape(2, 3, 2, 3, 2).sum((2, 4)))


def test_bad_counts_of_a_table_are_refused():
    for bad in (-1.0, np.nan):
        sdata, _ = bins_table()
        sdata["bin_counts"].X[0, 0] = bad
        with pytest.raises(ValueError, match="X holds (negative|NaN)"):
            stgen.pp.rasterize(sdata, table_key="bin_counts")
        assert not sdata.images
        assert "stgen" not in sdata.attrs


# -- what is refused -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"genes": ["EPCAM", "A1", "A2"]},
            KeyError,
            r"2 of 3 genes are not in the column 'gene' of 'transcripts' \(A1, A2\)",
        ),
        ({"genes": ["A1"], "table_key": "cell_counts"}, KeyError, "1 of 1 genes are not in the table 'cell_counts'"),
        ({"genes": "EPCAM"}, TypeError, "found a string; pass genes="),
        ({"genes": []}, ValueError, "at least one; found none"),
        ({"genes": ["EPCAM", "EPCAM"]}, ValueError, "without repetition"),
        ({"points_key": "x"}, KeyError, "found transcripts. Pass points_key="),
        ({"table_key": "x"}, KeyError, "found cell_counts, spot_counts. Pass table_key="),
        ({"table_key": "cell_counts", "points_key": "transcripts"}, ValueError, "pass the one to count"),
        ({"bin_um": 0}, ValueError, "`bin_um` must be a positive number of µm"),
        ({"bin_um": 700.0}, ValueError, "Bins of 700 µm are larger than the section, which is 572.2 x 563.1 µm"),
        ({"bin_um": 1e-3}, ValueError, "bins of 0.001 µm is more than can be held"),
        ({"bounds_um": (0, 0, 5, 50)}, ValueError, "Bins of 10 µm are larger than the section, which is 5 x 50 µm"),
        ({"bounds_um": (9, 0, 5, 50)}, ValueError, "must be .x_min, y_min, x_max, y_max. in µm"),
        ({"bounds_um": (900, 900, 999, 999)}, ValueError, "Nothing of 'transcripts' lies within bounds_um="),
        ({"mask_um": -1}, ValueError, "`mask_um` must be None or a number"),
        ({"coordinate_system": "px"}, KeyError, "'transcripts' is not in the coordinate system 'px'; found um"),
        ({"mpp": -1.0}, ValueError, "`mpp` must be a positive number"),
        ({"key_added": "he"}, ValueError, "sdata.images.'he'. exists already. Pass overwrite=True"),
        ({"key_added": "spots"}, ValueError, "'spots' is the name of another element"),
    ],
)
def test_what_rasterize_refuses(simulated, kwargs, error, message):
    elements = set(simulated._shared_keys)
    with pytest.raises(error, match=message):
        stgen.pp.rasterize(simulated, **kwargs)
    assert set(simulated._shared_keys) == elements
    assert set(simulated.attrs["stgen"]) == {"simulated"}


def test_coordinates_must_be_finite_and_molecules_exist():
    frame = molecules()
    frame.loc[3, "x"] = np.nan
    for bounds in (None, (0, 0, 100, 60)):
        with pytest.raises(ValueError, match="'transcripts' have molecules without finite coordinates"):
            stgen.pp.rasterize(section(frame), bounds_um=bounds)
    with pytest.raises(ValueError, match="There are no molecules"):
        stgen.pp.rasterize(section(frame[:0]))
    with pytest.raises(KeyError, match="has no points. Pass table_key=<one of bin_counts>"):
        stgen.pp.rasterize(bins_table()[0])
    with pytest.raises(TypeError, match="`sdata` must be a SpatialData, found AnnData"):
        stgen.pp.rasterize(AnnData(np.ones((2, 2))))


def test_overwrite_replaces():
    sdata = section()
    stgen.pp.rasterize(sdata)
    stgen.pp.rasterize(sdata, bin_um=20, overwrite=True)
    assert values_of(sdata).shape == (3, 3, 5)
    assert sdata.attrs["stgen"]["counts"]["bin_um"] == 20.0


# -- lower resolution ------------------------------------------------------------------------------------------------------
def fine_map(values, bin_um=2.0):
    sdata = SpatialData()
    place = Affine(np.array([[bin_um, 0, 10], [0, bin_um, -6], [0, 0, 1]]), XY, XY)
    genes = [f"g{i}" for i in range(len(values))]
    write_image(sdata, "m", np.asarray(values), channels=genes, transformations={"um": place, "px": Identity()})
    return sdata


def test_degrading_small_bins_is_counting_in_large_ones(sdata):
    bounds = {"bounds_um": (0, 0, 600, 600), "mask_um": None}
    stgen.pp.rasterize(sdata, bin_um=10, **bounds)
    for factor in (2, 5):
        stgen.pp.rasterize(sdata, bin_um=10 * factor, key_added=f"by{factor}", **bounds)
        stgen.pp.degrade(sdata, map_key="counts", factor=factor)
        np.testing.assert_array_equal(values_of(sdata, f"counts_{factor}x"), values_of(sdata, f"by{factor}"))
        grids = [Grid.of_map(sdata, key) for key in (f"counts_{factor}x", f"by{factor}")]
        np.testing.assert_allclose(grids[0].to_system("um"), grids[1].to_system("um"))
        assert grids[0].bin_um == 10.0 * factor


def test_blocks_at_the_edge_and_unknown_bins():
    values = np.ones((2, 5, 7), np.float32)
    values[1] *= 3
    values[:, :2, 2] = np.nan
    values[:, 2:4, 2:4] = np.nan
    sdata = fine_map(values)
    stgen.pp.degrade(sdata, map_key="m", factor=2)
    area = np.array([[4, 2, 4, 2], [4, 0, 4, 2], [2, 2, 2, 1]])
    np.testing.assert_array_equal(sdata["m_2x_area"], area)
    assert sdata["m_2x_area"].dtype == np.uint16
    expected = np.where(area > 0, area, np.nan) * np.array([1, 3])[:, None, None]
    np.testing.assert_array_equal(values_of(sdata, "m_2x"), expected)
    assert np.nansum(values_of(sdata, "m_2x")) == np.nansum(values)
    np.testing.assert_allclose(
        Grid.of_map(sdata, "m_2x").to_system("px"),
        get_transformation(sdata["m_2x_area"], "px").to_affine_matrix(XY, XY),
    )
    measured = measurement_of(sdata, "m_2x", Grid.of_map(sdata, "m"), ["g1", "g0"])
    np.testing.assert_array_equal(measured.footprints.area, area[area > 0])
    np.testing.assert_allclose(measured.footprints.pool(values[[1, 0]]), measured.counts)


def test_a_bin_is_measured_where_all_genes_are_known():
    values = np.ones((2, 4, 4), np.float32)
    values[0, 0, 0] = np.nan
    sdata = fine_map(values)
    stgen.pp.degrade(sdata, map_key="m", factor=2)
    np.testing.assert_array_equal(sdata["m_2x_area"], [[3, 4], [4, 4]])
    np.testing.assert_array_equal(values_of(sdata, "m_2x")[:, 0, 0], [3, 4])


def test_degrading_is_lazy_and_the_blocks_line_up_across_chunks():
    values = np.random.default_rng(0).poisson(2.0, (2, 1100, 700)).astype(np.float32)
    sdata = fine_map(values)
    calls = []

    def spy(block):
        calls.append(block.shape)
        return block

    sdata["m"].data = sdata["m"].data.map_blocks(spy, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32))
    stgen.pp.degrade(sdata, map_key="m", factor=7, key_added="low")
    assert not calls
    padded = np.pad(values, [(0, 0), (0, -1100 % 7), (0, 0)])
    np.testing.assert_array_equal(values_of(sdata, "low"), padded.reshape(2, 158, 7, 100, 7).sum((2, 4)))
    assert calls


def test_degrading_twice_is_degrading_once():
    sdata = fine_map(np.random.default_rng(0).poisson(2.0, (2, 12, 18)).astype(np.float32))
    stgen.pp.degrade(sdata, map_key="m", factor=2)
    stgen.pp.degrade(sdata, map_key="m_2x", factor=3, key_added="both")
    stgen.pp.degrade(sdata, map_key="m", factor=6)
    np.testing.assert_array_equal(values_of(sdata, "both"), values_of(sdata, "m_6x"))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"factor": 2.5}, ValueError, "`factor` must be a whole number, found 2.5"),
        ({"factor": True}, ValueError, "`factor` must be a whole number"),
        ({"factor": 1}, ValueError, "`factor` must lie between 2 and 7 for the map 'm' of 7 x 5 bins"),
        ({"factor": 8}, ValueError, "`factor` must lie between 2 and 7"),
        ({"factor": 2, "map_key": "x"}, KeyError, "found m. Pass map_key="),
        ({"factor": 2, "key_added": "m"}, ValueError, "is the map itself"),
    ],
)
def test_what_degrade_refuses(kwargs, error, message):
    sdata = fine_map(np.ones((1, 5, 7)))
    with pytest.raises(error, match=message):
        stgen.pp.degrade(sdata, **({"map_key": "m"} | kwargs))
    assert list(sdata.images) == ["m"]
    assert not sdata.labels


def test_degrade_does_not_replace_by_itself():
    sdata = fine_map(np.ones((1, 4, 6)))
    stgen.pp.degrade(sdata, map_key="m", factor=2)
    with pytest.raises(ValueError, match="sdata.images.'m_2x'. exists already"):
        stgen.pp.degrade(sdata, map_key="m", factor=2)
    del sdata.images["m_2x"]
    with pytest.raises(ValueError, match="sdata.labels.'m_2x_area'. exists already"):
        stgen.pp.degrade(sdata, map_key="m", factor=2)
    assert "m_2x" not in sdata.images
    stgen.pp.degrade(sdata, map_key="m", factor=2, overwrite=True)
    assert "m_2x" in sdata.images


@pytest.mark.parametrize("bad", [-1.0, np.inf])
def test_bad_counts_of_a_map_are_refused_when_they_are_met(bad):
    values = np.ones((1, 4, 6), np.float32)
    values[0, 1, 1] = bad
    sdata = fine_map(values)
    stgen.pp.degrade(sdata, map_key="m", factor=2)
    with pytest.raises(ValueError, match="The map 'm' holds (negative|infinite) values"):
        values_of(sdata, "m_2x")


def test_a_map_of_unknown_scale_is_refused():
    sdata = fine_map(np.ones((1, 4, 6)))
    set_transformation(sdata["m"], {"px": Identity()}, set_all=True)
    with pytest.raises(ValueError, match="µm per bin of the map 'm' are not known"):
        stgen.pp.degrade(sdata, map_key="m", factor=2)
    assert not sdata.labels
