"""overwrite=True replaces earlier results of the same function and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata.models import Labels2DModel
from spatialdata.transformations import get_transformation

from stgen import pp

CALLS = {
    "rasterize": ("images", lambda s, key: pp.rasterize(s, points_key="transcripts", bin_um=20, key_added=key, overwrite=True)),
    "spots_to_map": (
        "images",
        lambda s, key: pp.spots_to_map(
            s, table_key="spot_counts", image_key="he", bin_um=20, key_added=key, overwrite=True
        ),
    ),
    "degrade": ("images", lambda s, key: pp.degrade(s, map_key="fine", factor=2, key_added=key, overwrite=True)),
    "segment_nuclei": (
        "labels",
        lambda s, key: pp.segment_nuclei(s, image_key="he", key_added=key, overwrite=True, progress=False),
    ),
    "simulate_spots": (
        "shapes",
        lambda s, key: pp.simulate_spots(s, points_key="transcripts", key_added=key, overwrite=True),
    ),
    "tile_grid": ("shapes", lambda s, key: pp.tile_grid(s, image_key="he", key_added=key, overwrite=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_result_is_not_replaced(sdata, name):
    kind, call = CALLS[name]
    pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM"], bin_um=20, key_added="fine")
    transformations = get_transformation(sdata["he"], get_all=True)
    sdata.labels["mine"] = Labels2DModel.parse(
        np.ones(sdata["he"].shape[1:], np.uint16), dims=("y", "x"), transformations=transformations
    )
    key = {"images": "he", "labels": "mine", "shapes": "spots"}[kind]
    container = getattr(sdata, kind)
    before, elements = container[key], {k for _, k, _ in sdata.gen_elements()}
    with pytest.raises(ValueError, match=rf"sdata.{kind}\['{key}'\] is not a result .* del sdata.{kind}\['{key}'\]"):
        call(sdata, key)
    assert container[key] is before
    assert {k for _, k, _ in sdata.gen_elements()} == elements
    call(sdata, "new")
    call(sdata, "new")  # its own result is replaced


def test_an_area_beside_a_map_is_not_replaced_either(sdata):
    pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM"], bin_um=20, key_added="fine")
    sdata.labels["low_area"] = Labels2DModel.parse(np.ones((4, 4), np.uint16), dims=("y", "x"))
    with pytest.raises(ValueError, match=r"sdata.labels\['low_area'\] is not a result"):
        pp.degrade(sdata, map_key="fine", factor=2, key_added="low", overwrite=True)
    assert "low" not in sdata.images


def test_what_is_measured_is_not_replaced_by_what_is_left(sdata):
    pp.simulate_spots(sdata, points_key="transcripts", key_added="sim", thin=0.5)
    before = sdata["sim_rest"]
    with pytest.raises(ValueError, match="'sim_rest' is what is measured"):
        pp.simulate_spots(sdata, points_key="sim_rest", key_added="sim", thin=0.5, overwrite=True)
    assert sdata["sim_rest"] is before


def test_an_embedding_of_ones_own_is_not_replaced(sdata):
    table = sdata["spot_counts"]
    table.obsm["X_texture"] = own = np.ones((table.n_obs, 3), np.float32)
    with pytest.raises(ValueError, match=r"obsm\['X_texture'\] is not a result .* del adata.obsm"):
        pp.embed(sdata, image_key="he", table_key="spot_counts", overwrite=True, progress=False)
    np.testing.assert_array_equal(table.obsm["X_texture"], own)
