"""A map of genes is not taken for histology, nor histology for a map."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from stgen import pp, tl

AS_IMAGE = {
    "embed": lambda s, key: pp.embed(s, image_key=key, table_key="spot_counts", progress=False),
    "check_alignment": lambda s, key: pp.check_alignment(s, image_key=key, table_key="spot_counts"),
    "tile_grid": lambda s, key: pp.tile_grid(s, image_key=key),
    "segment_nuclei": lambda s, key: pp.segment_nuclei(s, image_key=key, progress=False),
    "superresolve": lambda s, key: tl.superresolve(s, key, low_res="spot_counts", n_samples=1, progress=False),
    "spots_to_map": lambda s, key: pp.spots_to_map(s, table_key="spot_counts", image_key=key, bin_um=20),
}
AS_MAP = {
    "degrade": lambda s, key: pp.degrade(s, map_key=key, factor=2),
    "simulate_spots": lambda s, key: pp.simulate_spots(s, map_key=key, key_added="sim"),
    "superresolve, low_res": lambda s, key: tl.superresolve(s, "he", low_res=key, n_samples=1, progress=False),
    "superresolve, like": lambda s, key: tl.superresolve(
        s, "he", low_res="spot_counts", like=key, n_samples=1, progress=False
    ),
    "evaluate": lambda s, key: tl.evaluate(s, key="map", truth_key=key),
    "find_domains": lambda s, key: tl.find_domains(s, map_key=key),
    "aggregate_cells": lambda s, key: tl.aggregate_cells(s, map_key=key, shapes_key="cells"),
}


def elements(sdata):
    return sorted([name for _, name, _ in sdata.gen_elements()] + list(sdata["spot_counts"].obsm))


@pytest.fixture
def maps(sdata):
    """With a map that the package made, one of the user's, and a picture whose channels are numbered."""
    pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1", "CD3E"], bin_um=20, key_added="map")
    transformations = get_transformation(sdata["map"], get_all=True)
    sdata.images["own"] = Image2DModel.parse(
        np.asarray(sdata["map"].data), dims=("c", "y", "x"), c_coords=["EPCAM", "COL1A1", "CD3E"],
        transformations=transformations,
    )  # fmt: skip
    picture = np.asarray(sdata["he"].data)
    sdata.images["numbered"] = Image2DModel.parse(
        picture, dims=("c", "y", "x"), transformations=get_transformation(sdata["he"], get_all=True)
    )
    return sdata


@pytest.mark.parametrize("call", AS_IMAGE)
@pytest.mark.parametrize("key", ["map", "own"])
def test_a_map_is_no_histology(maps, call, key):
    before = elements(maps)
    with pytest.raises(ValueError, match=rf"The image '{key}' is a map .* not the histology. Pass image_key="):
        AS_IMAGE[call](maps, key)
    assert elements(maps) == before


@pytest.mark.parametrize("call", AS_MAP)
@pytest.mark.parametrize("key", ["he", "numbered"])
def test_histology_is_no_map(maps, call, key):
    before = elements(maps)
    with pytest.raises(ValueError, match=rf"The image '{key}' is a picture with the channels .*, no map of genes"):
        AS_MAP[call](maps, key)
    assert elements(maps) == before


def test_a_stain_of_the_name_of_a_gene_is_histology(maps):
    values = (np.random.default_rng(0).random((1, 600, 600)) * 200).astype(np.uint8)
    maps.images["stain"] = Image2DModel.parse(
        values, dims=("c", "y", "x"), c_coords=["EPCAM"], transformations=get_transformation(maps["he"], get_all=True)
    )
    pp.embed(maps, image_key="stain", table_key="spot_counts", progress=False)
    assert "X_texture" in maps["spot_counts"].obsm
