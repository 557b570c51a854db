"""Exports, read back by other libraries: the same values, in the same place, in µm."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from geopandas import GeoDataFrame
from scipy.ndimage import label
from spatialdata import SpatialData, get_centroids, transform
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from stgen import io, tl
from stgen._spatial.labels import outlines
from stgen._spatial.records import provenance, record, write_image

GENES = ["A", "HLA-DRA", "µ"]
BIN_UM = 2.5
PX_UM = 0.5
CORNER = (30.0, -12.0)
BINS = {"um": Sequence([Scale([BIN_UM, BIN_UM], ("x", "y")), Translation(list(CORNER), ("x", "y"))])}
PIXELS = {"um": Sequence([Scale([PX_UM, PX_UM], ("x", "y")), Translation(list(CORNER), ("x", "y"))])}


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 2, (3, 1301, 700)).astype(np.float32)
    values[:, rng.random(values.shape[1:]) < 0.2] = np.nan
    values[:, :300, :300] = np.nan
    return values


@pytest.fixture
def sdata(values: np.ndarray) -> SpatialData:
    sdata = SpatialData()
    write_image(sdata, "map", values, channels=GENES, transformations=BINS)
    record(sdata, "map", provenance("tl.superresolve", unit="counts per bin", bin_um=BIN_UM))
    sdata["he"] = Image2DModel.parse(np.zeros((3, 70, 60), np.uint8), dims=("c", "y", "x"), transformations=PIXELS)
    blobs, _ = label(np.random.default_rng(1).random((70, 60)) < 0.4)
    sdata["nuclei"] = Labels2DModel.parse(blobs.astype(np.int32), dims=("y", "x"), transformations=PIXELS)
    squares = GeoDataFrame(geometry=shapely.box([31, 36], [-11, -5], [34, 45], [-6, -1]), index=["left", "right"])
    sdata["cells"] = ShapesModel.parse(squares, transformations={"um": Identity()})
    return sdata


@pytest.fixture
def counted(sdata: SpatialData) -> SpatialData:
    """With cells and nuclei whose counts are known in part."""
    small = np.random.default_rng(2).gamma(2, 2, (3, 14, 12)).astype(np.float32)
    write_image(sdata, "small", small, channels=GENES, transformations=BINS)
    tl.aggregate_cells(sdata, map_key="small", labels_key="nuclei", key_added="of_nuclei")
    tl.aggregate_cells(sdata, map_key="small", shapes_key="cells", key_added="of_cells")
    sdata["of_cells"].obs["type"] = pd.Categorical(["T cell", np.nan])
    return sdata


# ---- OME-TIFF --------------------------------------------------------------------------------------------------------


def test_pyramid_holds_the_map_in_um(sdata, values, tmp_path):
    path = io.write_ome_tiff(sdata, "map", tmp_path / "map.ome.tif", genes=["µ", "A"])
    expected = values[[2, 0]]
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert series.axes == "CYX"
        assert [level.shape for level in series.levels] == [(2, 1301, 700), (2, 651, 350), (2, 326, 175)]
        np.testing.assert_array_equal(series.asarray(), expected)
        blocks = np.pad(expected, ((0, 0), (0, 3), (0, 0)), constant_values=np.nan).reshape(2, 326, 4, 175, 4)
        coarse = series.levels[2].asarray()
        assert (np.isfinite(coarse) == np.isfinite(blocks).any((2, 4))).all()
        full = np.isfinite(blocks).all((2, 4))
        np.testing.assert_allclose(coarse[full], blocks.mean((2, 4))[full], rtol=1e-5)
        for level, page in enumerate([series.keyframe, series.levels[1].keyframe]):
            per_cm = page.tags["XResolution"].value
            assert per_cm[0] / per_cm[1] == pytest.approx(1e4 / (BIN_UM * 2**level))
        pixels = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
        assert float(pixels.get("PhysicalSizeX")) == float(pixels.get("PhysicalSizeY")) == BIN_UM
        assert pixels.get("PhysicalSizeXUnit") == "µm"
        assert [channel.get("Name") for channel in pixels.findall("{*}Channel")] == ["µ", "A"]
        planes = pixels.findall("{*}Plane")
        assert [(float(p.get("PositionX")), float(p.get("PositionY"))) for p in planes] == [CORNER, CORNER]
        description = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Description").text
        assert json.loads(description)["unit"] == "counts per bin"


def test_ome_types_accepts_the_header(sdata, tmp_path):
    ome_types = pytest.importorskip("ome_types")
    path = io.write_ome_tiff(sdata, "map", tmp_path / "map.ome.tiff")
    pixels = ome_types.from_tiff(path).images[0].pixels
    assert (pixels.size_c, pixels.size_y, pixels.size_x) == (3, 1301, 700)
    assert (pixels.physical_size_x, pixels.physical_size_x_unit.value) == (BIN_UM, "µm")


def test_off_the_tissue_stands_what_was_asked_for(sdata, values, tmp_path):
    path = io.write_ome_tiff(sdata, "map", tmp_path / "map.ome.tif", genes=["A"], fill=0)
    np.testing.assert_array_equal(tifffile.imread(path), np.nan_to_num(values[0], nan=0))


def test_a_turned_map_has_no_position(sdata, values, tmp_path):
    turned = {"um": Affine([[0, BIN_UM, 1], [BIN_UM, 0, 2], [0, 0, 1]], ("x", "y"), ("x", "y"))}
    write_image(sdata, "turned", values, channels=GENES, transformations=turned)
    path = io.write_ome_tiff(sdata, "turned", tmp_path / "map.ome.tif")
    assert "PositionX" not in tifffile.TiffFile(path).ome_metadata


# ---- GeoJSON ---------------------------------------------------------------------------------------------------------


def test_outlines_of_a_mask_are_its_pixels(sdata):
    mask = sdata["nuclei"].values
    numbers, polygons = outlines(sdata["nuclei"])
    np.testing.assert_array_equal(numbers, np.unique(mask[mask > 0]))
    assert shapely.is_valid(polygons).all()
    np.testing.assert_array_equal(shapely.area(polygons), np.bincount(mask.ravel())[numbers])
    y, x = np.nonzero(mask)
    for number, polygon in zip(numbers, polygons, strict=True):
        inside = shapely.contains_xy(polygon, x + 0.5, y + 0.5)
        np.testing.assert_array_equal(inside, mask[y, x] == number)


def test_outlines_do_not_depend_on_how_a_mask_is_read(sdata, monkeypatch):
    whole = outlines(sdata["nuclei"])
    monkeypatch.setattr("stgen._spatial.labels.ROWS", 7)
    parts = outlines(sdata["nuclei"])
    np.testing.assert_array_equal(whole[0], parts[0])
    assert shapely.equals(whole[1], parts[1]).all()


def test_an_empty_mask_has_no_outlines(sdata):
    numbers, polygons = outlines(sdata["nuclei"] * 0)
    assert len(numbers) == len(polygons) == 0


def test_nuclei_come_back_with_their_counts_in_pixels_of_the_image(counted, tmp_path):
    path = io.write_geojson(counted, "of_nuclei", tmp_path / "nuclei.geojson", image_key="he", genes=["µ", "A"])
    frame, table = geopandas.read_file(path), counted["of_nuclei"]
    numbers, polygons = outlines(counted["nuclei"])
    of_row = dict(zip(numbers, polygons, strict=True))
    assert frame["name"].to_list() == [str(number) for number in table.obs["instance_id"]]
    assert shapely.equals(
        frame.geometry.to_numpy(), np.array([of_row[number] for number in table.obs["instance_id"]])
    ).all()
    measured = pd.DataFrame([json.loads(m) if isinstance(m, str) else m for m in frame["measurements"]])
    assert set(measured) == {"µ", "A", "area_um2", "covered", "spatial_x", "spatial_y"}
    np.testing.assert_allclose(measured[["µ", "A"]], table[:, ["µ", "A"]].X.toarray(), rtol=1e-6)
    np.testing.assert_allclose(measured["area_um2"], shapely.area(frame.geometry) * PX_UM**2, rtol=1e-6)
    assert set(frame["objectType"]) == {"detection"}
    assert frame["id"].is_unique


def test_cells_come_back_in_um_with_their_class(counted, tmp_path):
    path = io.write_geojson(counted, "of_cells", tmp_path / "a.json", classification="type", object_type="cell")
    frame = geopandas.read_file(path)
    np.testing.assert_array_equal(shapely.area(frame.geometry), [15, 36])
    assert shapely.equals(frame.geometry.to_numpy(), counted["cells"].geometry.to_numpy()).all()
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    assert features[0]["properties"]["classification"] == {"name": "T cell"}
    assert "classification" not in features[1]["properties"]
    assert {feature["properties"]["objectType"] for feature in features} == {"cell"}


def test_spots_are_circles_and_outlines_alone_have_no_measurements(simulated, tmp_path):
    path = io.write_geojson(simulated, "spots", tmp_path / "spots.geojson")
    frame, spots = geopandas.read_file(path), transform(simulated["spots"], to_coordinate_system="um")
    assert "measurements" not in frame
    np.testing.assert_allclose(shapely.area(frame.geometry), np.pi * spots.radius**2, rtol=0.01)
    centers = get_centroids(simulated["spots"], "um").compute().to_numpy()
    np.testing.assert_allclose(np.column_stack([frame.centroid.x, frame.centroid.y]), centers, atol=1e-3)


def test_what_is_not_finite_is_left_out(counted, tmp_path):
    counted["of_cells"].layers["doubt"] = np.array([[np.nan, 1, np.inf], [1, 2, 3]])
    path = io.write_geojson(counted, "of_cells", tmp_path / "cells.geojson", layer="doubt")
    first = json.loads(path.read_text(encoding="utf-8"))["features"][0]["properties"]["measurements"]
    assert first["HLA-DRA"] == 1
    assert not {"A", "µ"} & set(first)


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv.gz"])
def test_tables_come_back(counted, tmp_path, name):
    table = counted["of_nuclei"]
    path = io.write_table(counted, tmp_path / name, table_key="of_nuclei", genes=["µ", "A"])
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv, "gz": lambda p: pd.read_csv(p, sep="\t")}
    frame = read[name.rpartition(".")[2]](path)
    columns = ["region", "instance_id", "area_um2", "covered", "spatial_x", "spatial_y"]
    assert list(frame) == ["name", *columns, "µ", "A"]
    np.testing.assert_allclose(frame[["µ", "A"]], table[:, ["µ", "A"]].X.toarray(), rtol=1e-6)
    np.testing.assert_allclose(frame[["spatial_x", "spatial_y"]], table.obsm["spatial"])
    assert frame["instance_id"].to_list() == table.obs["instance_id"].to_list()


def test_a_layer_of_a_table_of_its_own(counted, tmp_path):
    table = counted["of_cells"].copy()
    table.layers["double"] = 2 * table.X
    frame = pd.read_csv(io.write_table(table, tmp_path / "t.csv", layer="double"))
    np.testing.assert_allclose(frame[GENES], 2 * table.X.toarray(), rtol=1e-6)


# ---- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "options", "error", "message"),
    [
        ("write_ome_tiff", {"key": "nothing"}, KeyError, "no map in sdata.images 'nothing'"),
        ("write_ome_tiff", {"genes": ["B"]}, KeyError, "genes are not in the map"),
        ("write_ome_tiff", {"path": "map.tif"}, ValueError, r"must end in .ome.tif or .ome.tiff, found 'map.tif'"),
        ("write_ome_tiff", {"path": "there.ome.tif"}, ValueError, "exists already. Pass overwrite=True"),
        ("write_ome_tiff", {"path": "no/map.ome.tif"}, FileNotFoundError, "there is no folder"),
        ("write_ome_tiff", {"path": 3}, TypeError, "`path` must be text or a PathLike, found 3"),
        ("write_ome_tiff", {"fill": "zero"}, ValueError, "`fill` must be a finite number"),
        ("write_geojson", {"key": "nothing"}, KeyError, "There is no element 'nothing'"),
        ("write_geojson", {"key": "map"}, TypeError, "it has no outlines"),
        ("write_geojson", {"image_key": "nothing"}, KeyError, "no image 'nothing'"),
        ("write_geojson", {"genes": ["B"]}, KeyError, "genes are not in the table"),
        ("write_geojson", {"layer": "B"}, KeyError, "no layer 'B'"),
        ("write_geojson", {"classification": "B"}, KeyError, "no column of obs 'B'"),
        ("write_geojson", {"key": "cells", "genes": ["A"]}, ValueError, "only for a table"),
        ("write_geojson", {"object_type": "tile"}, ValueError, "`object_type` must be one of"),
        ("write_geojson", {"coordinate_system": "mm"}, KeyError, "mm"),
        ("write_geojson", {"path": "cells.csv"}, ValueError, "must end in .geojson"),
        ("write_geojson", {"path": "there.geojson"}, ValueError, "exists already"),
        ("write_table", {"path": "cells.xlsx"}, ValueError, "must end in .parquet or .csv"),
        ("write_table", {"path": "there.csv"}, ValueError, "exists already"),
        ("write_table", {"genes": "A"}, TypeError, "`genes` must be a list of names"),
        ("write_table", {"layer": "B"}, KeyError, "no layer 'B'"),
        ("write_table", {"key": "nothing"}, KeyError, "no table 'nothing'"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(counted, tmp_path, monkeypatch, call, options, error, message):
    monkeypatch.chdir(tmp_path)
    for name in ("there.ome.tif", "there.geojson", "there.csv"):
        (tmp_path / name).write_text("mine")
    key, path = {
        "write_ome_tiff": ("map", "map.ome.tif"),
        "write_geojson": ("of_cells", "cells.geojson"),
        "write_table": ("of_cells", "cells.csv"),
    }[call]
    options = {"key": key, "path": path} | options
    key, path = options.pop("key"), options.pop("path")
    named = {"table_key": key, "path": path} if call == "write_table" else {"path": path}
    args = (counted,) if call == "write_table" else (counted, key)
    with pytest.raises(error, match=message):
        getattr(io, call)(*args, **named, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.csv", "there.geojson", "there.ome.tif"]
    assert {p.read_text() for p in tmp_path.iterdir()} == {"mine"}


def test_names_that_occur_twice_are_refused(counted, tmp_path):
    counted["of_cells"].obs["A"] = 1.0
    with pytest.raises(ValueError, match="A: two columns of one name"):
        io.write_table(counted, tmp_path / "t.csv", table_key="of_cells")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(sdata, tmp_path, monkeypatch):
    path = io.write_ome_tiff(sdata, "map", tmp_path / "map.ome.tif", genes=["A"])
    before = path.read_bytes()
    monkeypatch.setattr("stgen.io._ome_tiff._halved", lambda values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        io.write_ome_tiff(sdata, "map", path, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["map.ome.tif"]
