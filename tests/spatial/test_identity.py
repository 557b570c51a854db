"""Which row belongs to which instance is checked before anything is matched."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity

from stgen import pp, tl
from stgen._spatial.section import get_section

CALLS = {
    "superresolve": lambda s: tl.superresolve(s, "he", low_res="spot_counts", n_samples=1, progress=False),
    "embed": lambda s: pp.embed(s, image_key="he", table_key="spot_counts", progress=False),
    "rasterize": lambda s: pp.rasterize(s, table_key="spot_counts", bin_um=80, key_added="r"),
    "spots_to_map": lambda s: pp.spots_to_map(s, table_key="spot_counts", image_key="he", bin_um=20),
    "get_section": lambda s: get_section(s, table_key="spot_counts"),
}


def names(sdata: SpatialData) -> list[str]:
    return sorted([name for _, name, _ in sdata.gen_elements()] + list(sdata["spot_counts"].obsm))


@pytest.fixture
def sdata(simulated) -> SpatialData:
    """Image and spots, of which the test may change the table."""
    return SpatialData(
        images={"he": simulated["he"]},
        shapes={"spots": simulated["spots"]},
        tables={"spot_counts": simulated["spot_counts"].copy()},
    )


def shapes_with_index(shapes: gpd.GeoDataFrame, index: object) -> gpd.GeoDataFrame:
    frame = gpd.GeoDataFrame({"radius": shapes["radius"].to_numpy()}, geometry=list(shapes.geometry), index=index)
    return ShapesModel.parse(frame, transformations={"um": Identity()})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["text in the table", "text in the shapes", "categories"])
def test_ids_of_two_types_are_not_matched(sdata, call, kind):
    table = sdata["spot_counts"]
    if kind == "text in the shapes":
        sdata.shapes["spots"] = shapes_with_index(sdata["spots"], sdata["spots"].index.astype(str))
    else:
        table.obs["spot_id"] = table.obs["spot_id"].astype(str).astype("category" if kind == "categories" else object)
    before = names(sdata)
    with pytest.raises(
        ValueError, match=r"ids of the table 'spot_counts' are .* 'spots' are .* types must be equal.*astype"
    ):
        CALLS[call](sdata)
    assert names(sdata) == before
    table.obs["spot_id"] = table.obs["spot_id"].astype(str if kind == "text in the shapes" else int)  # as advised
    assert len(get_section(sdata, table_key="spot_counts").xy_px) == table.n_obs


@pytest.mark.parametrize("call", CALLS)
def test_shapes_of_one_id_are_refused(sdata, call):
    index = sdata["spots"].index.to_numpy().copy()
    index[5] = index[4]
    sdata.shapes["spots"] = shapes_with_index(sdata["spots"], index)
    sdata.tables["spot_counts"] = sdata["spot_counts"][np.arange(sdata["spot_counts"].n_obs) != 5].copy()
    before = names(sdata)
    with pytest.raises(ValueError, match=r"'spots' has 1 ids \(its index\) more than once \(4\)"):
        CALLS[call](sdata)
    assert names(sdata) == before


def test_cells_of_one_id_are_refused_before_the_work(simulated, monkeypatch):
    cells = simulated["cells"]
    index = cells.index.to_numpy().copy()
    index[1] = index[0]
    sdata = SpatialData(images={"he": simulated["he"]}, shapes={"cells": shapes_with_index(cells, index)})
    sdata.points["transcripts"] = simulated["transcripts"]
    pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM"], bin_um=20, key_added="map")
    monkeypatch.setattr("stgen.tl.cells.aggregate._Summed.parts", lambda _: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match="'cells' has 1 ids"):
        tl.aggregate_cells(sdata, map_key="map", shapes_key="cells")
    assert "map_cells" not in sdata.tables


def test_an_instance_has_one_row(sdata):
    sdata["spot_counts"].obs.iloc[3, sdata["spot_counts"].obs.columns.get_loc("spot_id")] = 2
    with pytest.raises(
        ValueError, match=r"1 instances of 'spots' have more than one row in the table 'spot_counts' \(2 in obs"
    ):
        get_section(sdata, table_key="spot_counts")


def test_rows_of_one_name_are_refused(sdata):
    table = sdata["spot_counts"]
    table.obs_names = ["same", "same", *table.obs_names[2:]]
    for data, options in ((sdata, {"table_key": "spot_counts"}), (table, {"mpp": 1.0})):
        with pytest.raises(
            ValueError, match=r"obs_names\) more than once \(same\); run adata.obs_names_make_unique\(\)"
        ):
            get_section(data, **options)
    table.obs_names_make_unique()
    assert len(get_section(table, mpp=1.0).xy_px) == table.n_obs


def test_floats_of_whole_numbers_are_the_same_ids(sdata):
    """As they come back from a CSV file in which one was missing."""
    want = get_section(sdata, table_key="spot_counts").xy_px
    sdata["spot_counts"].obs["spot_id"] = sdata["spot_counts"].obs["spot_id"].astype(float)
    np.testing.assert_array_equal(get_section(sdata, table_key="spot_counts").xy_px, want)


def test_the_column_of_the_link_may_be_gone(sdata):
    del sdata["spot_counts"].obs["spot_id"]
    with pytest.raises(KeyError, match=r"annotates 'spots' by obs\['spot_id'\], which is not there"):
        get_section(sdata, table_key="spot_counts")
