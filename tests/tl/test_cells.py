"""Cells from maps: areas with known answers, and nothing lost or given twice."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import shapely
from geopandas import GeoDataFrame
from scipy.sparse import issparse
from spatialdata import SpatialData, read_zarr
from spatialdata.models import Labels2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from stgen import tl
from stgen._spatial.grid import Grid
from stgen._spatial.records import provenance, record, write_image
from stgen.tl.evaluation.overlap import find_overlap

GENES = ["A", "B"]
SHAPE = (12, 15)
BIN_UM = 10.0
BINS = {"um": Scale([BIN_UM, BIN_UM], ("x", "y"))}
UM = {"um": Identity()}


def affine(matrix: np.ndarray) -> dict:
    return {"um": Affine(matrix, ("x", "y"), ("x", "y"))}


def turned(degrees: float, shift: tuple[float, float], *, mirrored: bool = False) -> np.ndarray:
    a = np.deg2rad(degrees)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ np.diag([-1 if mirrored else 1, 1])
    return np.block([[turn, np.array(shift)[:, None]], [np.zeros((1, 2)), 1]])


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).gamma(2, 2, (2, *SHAPE)).astype(np.float32)


@pytest.fixture
def sdata(counts: np.ndarray) -> SpatialData:
    sdata = SpatialData()
    write_image(sdata, "map", counts, channels=GENES, transformations=BINS)
    return sdata


def add_shapes(sdata: SpatialData, polygons: list, transformations: dict = UM, index=None) -> None:
    frame = GeoDataFrame(geometry=polygons, index=index)
    sdata.shapes["cells"] = ShapesModel.parse(frame, transformations=transformations)


def add_labels(sdata: SpatialData, labels: np.ndarray, transformations: dict, **options) -> None:
    sdata.labels["mask"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations=transformations, **options)


def cells(sdata: SpatialData, **options):
    if "labels_key" not in options:
        options["shapes_key"] = "cells"
    tl.aggregate_cells(sdata, map_key="map", key_added="result", **options)
    return sdata["result"]


def outside_and_inside(table) -> np.ndarray:
    return np.asarray(table.X.sum(0)).ravel() + table.var["outside"].to_numpy()


def star(rng: np.random.Generator) -> shapely.Polygon:
    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    xy = rng.uniform(-20, [170, 140], 2) + np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(5, 60, (9, 1))
    return shapely.Polygon(xy).buffer(0)


# ---- areas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "mirrored"), [(0, False), (90, False), (33, False), (33, True)])
def test_shares_of_polygons_are_those_of_shapely(sdata: SpatialData, degrees: float, mirrored: bool) -> None:
    rng = np.random.default_rng(1)
    polygons = [star(rng) for _ in range(25)]
    polygons.append(shapely.box(20, 20, 90, 80).difference(shapely.box(33, 31, 52, 66)))  # with a hole
    polygons.append(shapely.MultiPolygon([shapely.box(0, 0, 15, 15), shapely.box(100, 40, 112.5, 55)]))
    matrix = turned(degrees, (12, 7), mirrored=mirrored)
    add_shapes(sdata, polygons, affine(matrix))
    found = find_overlap(sdata, "cells", Grid.of_map(sdata, "map"))

    in_bins = [shapely.transform(p, lambda xy: (xy @ matrix[:2, :2].T + matrix[:2, 2]) / BIN_UM) for p in polygons]
    shares = np.zeros((len(polygons), *SHAPE))
    np.add.at(shares, (found.instances[found.cell], found.y, found.x), found.share)
    y, x = np.indices(SHAPE)
    expected = [shapely.area(shapely.intersection(p, shapely.box(x, y, x + 1, y + 1))) for p in in_bins]
    np.testing.assert_allclose(shares, expected, atol=1e-9)
    np.testing.assert_allclose(found.area, shapely.area(in_bins), rtol=1e-9)
    np.testing.assert_allclose(found.centers, shapely.get_coordinates(shapely.centroid(in_bins)), atol=1e-6)


def test_mask_and_polygons_of_its_pixels_agree(sdata: SpatialData, counts: np.ndarray) -> None:
    labels = np.random.default_rng(2).integers(0, 4, (9, 11))
    place = affine(turned(20, (15, -5)) @ np.diag([8.0, 8.0, 1.0]))
    add_labels(sdata, labels, place)
    squares = [
        shapely.union_all([shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(labels == k)]) for k in (1, 2, 3)
    ]
    add_shapes(sdata, squares, place, index=[1, 2, 3])
    of_shapes = cells(sdata).copy()
    of_mask = cells(sdata, labels_key="mask", overwrite=True)
    np.testing.assert_allclose(of_mask.X.toarray(), of_shapes.X.toarray(), rtol=1e-5)
    np.testing.assert_allclose(of_mask.obs["area_um2"], of_shapes.obs["area_um2"])
    np.testing.assert_allclose(of_mask.obsm["spatial"], of_shapes.obsm["spatial"])
    np.testing.assert_allclose(of_mask.obs["area_um2"], [64 * (labels == k).sum() for k in (1, 2, 3)])


def test_mask_on_the_bins_is_a_group_by(sdata: SpatialData, counts: np.ndarray) -> None:
    labels = np.random.default_rng(3).integers(0, 5, SHAPE)
    add_labels(sdata, labels, BINS)
    table = cells(sdata, labels_key="mask")
    expected = [[counts[g][labels == k].sum() for g in range(2)] for k in range(1, 5)]
    np.testing.assert_allclose(table.X.toarray(), expected, rtol=1e-5)
    np.testing.assert_allclose(table.var["outside"], counts[:, labels == 0].sum(1), rtol=1e-5)
    assert table.obs["instance_id"].tolist() == [1, 2, 3, 4]


def test_mask_is_read_by_tiles_without_seams(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.kron(np.arange(1, 13).reshape(3, 4), np.ones((7, 7), int))
    add_labels(sdata, labels, {"um": Scale([4.3, 4.3], ("x", "y"))})
    whole = cells(sdata, labels_key="mask").copy()
    monkeypatch.setattr("stgen.tl.evaluation.overlap.TILE", 9)
    tiled = cells(sdata, labels_key="mask", overwrite=True)
    np.testing.assert_allclose(tiled.X.toarray(), whole.X.toarray(), rtol=1e-5)
    np.testing.assert_allclose(tiled.obsm["spatial"], whole.obsm["spatial"])


def test_circles_have_their_area_and_center(sdata: SpatialData) -> None:
    xy = np.array([[31.0, 44.0], [90.0, 60.0]])
    sdata.shapes["cells"] = ShapesModel.parse(xy, geometry=0, radius=np.array([7.0, 20.0]), transformations=UM)
    table = cells(sdata)
    np.testing.assert_allclose(table.obs["area_um2"], np.pi * np.array([49, 400]))
    np.testing.assert_allclose(table.obsm["spatial"], xy)


def test_pieces_in_several_coordinate_systems_meet_in_the_shared_one(sdata: SpatialData, counts: np.ndarray) -> None:
    sdata = SpatialData()
    both = {
        "um": Scale([10, 10], ("x", "y")),
        "px": Sequence([Scale([2, 2], ("x", "y")), Translation([6, 4], ("x", "y"))]),
    }
    write_image(sdata, "map", counts, channels=GENES, transformations=both)
    add_shapes(sdata, [shapely.box(6, 4, 8, 6), shapely.box(10, 4, 14, 6)], {"px": Identity()})
    table = cells(sdata)
    np.testing.assert_allclose(table.X.toarray(), [counts[:, 0, 0], counts[:, 0, 2:4].sum(1)], rtol=1e-6)
    assert table.uns["stgen"]["result"]["coordinate_system"] == "px"


# ---- mass ------------------------------------------------------------------------------------------------------------


def test_cells_that_tile_hold_all_counts(sdata: SpatialData, counts: np.ndarray) -> None:
    points = shapely.MultiPoint(np.random.default_rng(4).uniform(0, [150, 120], (30, 2)))
    frame = shapely.box(0, 0, 150, 120)
    tiles = [p.intersection(frame) for p in shapely.voronoi_polygons(points, extend_to=frame).geoms]
    add_shapes(sdata, tiles)
    table = cells(sdata)
    np.testing.assert_allclose(np.asarray(table.X.sum(0)).ravel(), counts.sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(table.var["outside"], 0, atol=1e-3)
    np.testing.assert_allclose(table.obs["covered"], 1)


def test_mass_is_kept_whatever_overlaps(sdata: SpatialData, counts: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    add_shapes(sdata, [star(rng) for _ in range(40)])
    table = cells(sdata)
    np.testing.assert_allclose(outside_and_inside(table), counts.sum((1, 2)), rtol=1e-5)


def test_a_bin_in_two_cells_is_divided(sdata: SpatialData, counts: np.ndarray) -> None:
    add_shapes(sdata, [shapely.box(0, 0, 10, 10), shapely.box(0, 0, 10, 10)])
    np.testing.assert_allclose(cells(sdata).X.toarray(), np.stack([counts[:, 0, 0] / 2] * 2), rtol=1e-6)


def test_uniform_map_gives_counts_in_proportion_to_area() -> None:
    sdata = SpatialData()
    write_image(sdata, "map", np.full((2, *SHAPE), 3.0), channels=GENES, transformations=BINS)
    rng = np.random.default_rng(6)
    boxes = [
        shapely.box(*(low := np.array([15.0 * i, 15.0 * j])), *(low + rng.uniform(1, 15, 2)))
        for i in range(9)
        for j in range(7)
    ]
    add_shapes(sdata, boxes)
    table = cells(sdata)
    np.testing.assert_allclose(table.X.toarray()[:, 0], 3 * table.obs["area_um2"] / BIN_UM**2, rtol=1e-5)


def test_order_of_cells_and_genes_does_not_matter(sdata: SpatialData) -> None:
    rng = np.random.default_rng(7)
    polygons = [star(rng) for _ in range(20)]
    add_shapes(sdata, polygons)
    table = cells(sdata).copy()
    order = rng.permutation(20)
    add_shapes(sdata, [polygons[i] for i in order], index=order)
    other = cells(sdata, genes=["B", "A"], overwrite=True)[table.obs_names, GENES]
    np.testing.assert_allclose(other.X.toarray(), table.X.toarray(), rtol=1e-5)


def test_chunks_do_not_matter(sdata: SpatialData, counts: np.ndarray) -> None:
    rng = np.random.default_rng(8)
    add_shapes(sdata, [star(rng) for _ in range(20)])
    whole = cells(sdata).X.toarray()
    seen = []

    def read(block, block_info=None):
        seen.append(block_info[0]["array-location"])
        return block

    chunked = da.from_array(counts, chunks=(1, 5, 4)).map_blocks(read, dtype=np.float32, meta=np.empty((0, 0, 0)))
    sdata.images["map"] = sdata.images["map"].copy(data=chunked)
    np.testing.assert_allclose(cells(sdata, overwrite=True).X.toarray(), whole, rtol=1e-5)
    assert len(seen) == len({str(where) for where in seen}) == 2 * 3 * 4  # each once


# ---- what is not known -----------------------------------------------------------------------------------------------


def test_unknown_bins_add_nothing_and_are_told(counts: np.ndarray) -> None:
    counts[:, :, 5:] = np.nan
    counts[1, 0, 0] = np.nan
    sdata = SpatialData()
    write_image(sdata, "map", counts, channels=GENES, transformations=BINS)
    add_shapes(
        sdata, [shapely.box(30, 10, 70, 20), shapely.box(0, 0, 20, 10), shapely.box(80, 0, 90, 10)], index=list("abc")
    )
    table = cells(sdata)
    assert table.obs_names.tolist() == ["a", "b"]  # nothing is known of c
    np.testing.assert_allclose(table.obs["covered"], [0.5, 0.5])
    np.testing.assert_allclose(table["a"].X.toarray()[0], counts[:, 1, 3:5].sum(1), rtol=1e-6)
    np.testing.assert_allclose(table["b"].X.toarray()[0], [counts[0, 0, :2].sum(), counts[1, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(outside_and_inside(table), np.nansum(counts, (1, 2)), rtol=1e-5)
    assert table.uns["stgen"]["result"]["n_left_out"] == 1


def test_cells_that_hardly_lie_on_the_map_can_be_left_out(sdata: SpatialData, counts: np.ndarray) -> None:
    add_shapes(sdata, [shapely.box(-60, 0, 20, 10), shapely.box(20, 0, 30, 10)])
    table = cells(sdata, min_covered=0.5)
    assert table.obs["instance_id"].tolist() == [1]
    np.testing.assert_allclose(outside_and_inside(table), counts.sum((1, 2)), rtol=1e-5)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_spread_is_that_of_the_sums_of_samples(sdata: SpatialData) -> None:
    samples = np.random.default_rng(9).gamma(2, 1, (2, 3, *SHAPE))
    channels = [f"{gene}:{i}" for gene in GENES for i in range(3)]
    write_image(sdata, "map_samples", samples.reshape(6, *SHAPE), channels=channels, transformations=BINS)
    add_shapes(sdata, [shapely.box(0, 0, 40, 30)])
    table = cells(sdata, genes=["B", "A"])
    expected = samples[:, :, :3, :4].sum((2, 3)).std(1)[::-1]
    np.testing.assert_allclose(table.layers["result_std"].toarray()[0], expected, rtol=1e-5)


def test_table_is_linked_recorded_and_stored(sdata: SpatialData, tmp_path) -> None:
    record(sdata, "map", provenance("tl.superresolve", bin_um=10))
    add_shapes(sdata, [shapely.box(0, 0, 20, 30), shapely.box(50, 50, 80, 70)], index=["x", "y"])
    before = set(sdata.tables)
    copied = tl.aggregate_cells(sdata, map_key="map", shapes_key="cells", copy=True)
    assert set(sdata.tables) == before
    assert list(copied.tables) == ["map_cells"]
    del copied.images["map"]  # the rest is written faster without
    copied.write(tmp_path / "s.zarr")
    table = read_zarr(tmp_path / "s.zarr")["map_cells"]
    assert issparse(table.X)
    assert table.X.dtype == np.float32
    assert table.uns["spatialdata_attrs"] == {"region": "cells", "region_key": "region", "instance_key": "instance_id"}
    assert table.obs["instance_id"].tolist() == ["x", "y"]
    entry = table.uns["stgen"]["map_cells"]
    assert entry["function"] == "tl.aggregate_cells"
    assert (entry["map_key"], entry["cells"], entry["bin_um"], entry["n_cells"]) == ("map", "cells", 10.0, 2)
    assert entry["values_in"] == "X"  # a prediction, which nothing may be scored against


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"map_key": "none"}, KeyError, "no map in sdata.images 'none'"),
        ({"labels_key": "mask"}, ValueError, "either labels_key"),
        ({"shapes_key": None}, ValueError, "either labels_key"),
        ({"shapes_key": "none"}, KeyError, "no shapes element 'none'"),
        ({"shapes_key": None, "labels_key": "none"}, KeyError, "no mask"),
        ({"genes": ["A", "Z"]}, KeyError, "1 of 2 genes"),
        ({"genes": "A"}, TypeError, "list of names"),
        ({"min_covered": 1.5}, ValueError, "min_covered"),
        ({"coordinate_system": "px"}, KeyError, "'px'"),
        ({"key_added": "cells"}, ValueError, "not a result"),
        ({"key_added": "a/b"}, ValueError, "a/b|Name|name"),
        ({"shapes_key": "far"}, ValueError, "none of the 1 cells"),
        ({"shapes_key": "lines"}, TypeError, "LineString"),
        ({"shapes_key": "elsewhere"}, ValueError, "share no coordinate system"),
        ({"map_key": "negative"}, ValueError, "negative"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(sdata: SpatialData, options, error, message) -> None:
    write_image(sdata, "negative", np.full((2, *SHAPE), -1.0), channels=GENES, transformations=BINS)
    add_labels(sdata, np.ones((2, 2), int), BINS)
    square = shapely.box(0, 0, 20, 20)
    for key, geometry, place in (
        ("cells", square, UM),
        ("elsewhere", square, {"other": Identity()}),
        ("far", shapely.box(900, 900, 910, 910), UM),
        ("lines", square, UM),
    ):
        sdata.shapes[key] = ShapesModel.parse(GeoDataFrame(geometry=[geometry]), transformations=place)
    sdata.shapes["lines"].geometry = [shapely.LineString([[0, 0], [5, 5]])]
    with pytest.raises(error, match=message):
        tl.aggregate_cells(sdata, **{"map_key": "map", "shapes_key": "cells"} | options)
    assert not sdata.tables
    assert "stgen" not in sdata.attrs


def test_only_its_own_result_is_replaced(sdata: SpatialData) -> None:
    add_shapes(sdata, [shapely.box(0, 0, 20, 30)])
    table = cells(sdata)
    with pytest.raises(ValueError, match="exists already"):
        cells(sdata)
    assert cells(sdata, overwrite=True) is not table
    del sdata["result"].uns["stgen"]
    with pytest.raises(ValueError, match="not a result"):
        cells(sdata, overwrite=True)


def test_masks_must_hold_whole_numbers(sdata: SpatialData) -> None:
    add_labels(sdata, np.ones((2, 2), int), BINS)
    sdata.labels["mask"].data = sdata.labels["mask"].data.astype(float)
    with pytest.raises(TypeError, match="whole numbers"):
        cells(sdata, labels_key="mask")
