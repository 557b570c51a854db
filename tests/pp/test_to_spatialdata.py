"""Visium sections of scanpy and squidpy as SpatialData: everything in its place, in pixels and in µm."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import get_centroids, read_zarr

from stgen import pp, tl
from stgen._spatial.image import affine_to
from stgen._spatial.section import get_section

MPP = 0.5
HIRES, LOWRES = 0.1, 0.02


@pytest.fixture
def adata(simulated) -> AnnData:
    """The spots and the image of a simulated section, as squidpy reads them; a full-resolution pixel is 0.5 µm."""
    table = simulated["spot_counts"]
    adata = AnnData(table.X.copy(), pd.DataFrame(index=[f"barcode {i}" for i in range(table.n_obs)]), table.var[[]])
    adata.obs["region"] = "cortex"  # a column of the user's own
    adata.obsm["spatial"] = get_centroids(simulated["spots"], "um")[["x", "y"]].compute().to_numpy() / MPP
    image = simulated["he"].transpose("y", "x", "c").values[::5, ::5] / np.float32(255)  # as scanpy reads a PNG
    factors = {"tissue_hires_scalef": HIRES, "tissue_lowres_scalef": LOWRES, "spot_diameter_fullres": 65 / MPP}
    images = {"lowres": image[::5, ::5], "hires": image}
    adata.uns["spatial"] = {"section": {"images": images, "scalefactors": factors}}
    return adata


def test_spots_image_and_table_are_in_their_place(adata):
    sdata = pp.to_spatialdata(adata)
    assert {name for _, name, _ in sdata.gen_elements()} == {"hires", "spots", "table"}
    assert set(sdata.coordinate_systems) == {"global", "um"}
    np.testing.assert_array_equal(
        sdata["hires"].values, adata.uns["spatial"]["section"]["images"]["hires"].transpose(2, 0, 1)
    )
    np.testing.assert_allclose(affine_to(sdata["hires"], "global")[0], np.diag([1 / HIRES, 1 / HIRES, 1]))
    xy = get_centroids(sdata["spots"], "um").compute().to_numpy()
    mpp = get_section(adata).mpp  # from the pitch of 100 µm
    assert mpp == pytest.approx(MPP, rel=0.01)
    np.testing.assert_allclose(xy, adata.obsm["spatial"] * mpp)
    np.testing.assert_allclose(2 * sdata["spots"].radius * affine_to(sdata["spots"], "um")[1], 55, rtol=0.01)
    np.testing.assert_allclose(affine_to(sdata["hires"], "um")[1], mpp / HIRES)
    np.testing.assert_array_equal(sdata["table"].X.toarray(), adata.X.toarray())


def test_table_keeps_what_the_user_wrote_and_the_object_is_not_changed(adata):
    sdata = pp.to_spatialdata(adata)
    assert list(adata.obs) == ["region"]
    assert list(adata.uns) == ["spatial"]
    table = sdata["table"]
    assert list(table.obs["region"].unique()) == ["cortex"]
    assert "spatial" not in table.uns
    assert table.obs_names.to_list() == adata.obs_names.to_list()
    assert table.uns["spatialdata_attrs"]["region_key"] == "spot_region"


def test_functions_find_the_same_as_in_the_table(adata, tmp_path):
    sdata = pp.to_spatialdata(adata, image_keys=["hires", "lowres"], mpp=MPP)
    of_table, of_object = (
        pp.check_alignment(adata, image_key="hires", mpp=MPP),
        pp.check_alignment(sdata, image_key="hires"),
    )
    assert of_table.mpp == pytest.approx(of_object.mpp)
    assert (of_table.inside, of_table.on_tissue) == (of_object.inside, of_object.on_tissue)
    tl.superresolve(sdata, "hires", ["EPCAM"], bin_um=20, progress=False)
    sdata.write(tmp_path / "section.zarr")
    assert read_zarr(tmp_path / "section.zarr")["superresolved"].shape == sdata["superresolved"].shape


def test_spots_without_an_image(adata):
    adata.uns["spatial"]["section"].pop("images")
    assert not pp.to_spatialdata(adata).images
    del adata.uns["spatial"]
    sdata = pp.to_spatialdata(adata, mpp=MPP, spot_um=55, table_key="counts", shapes_key="discs")
    np.testing.assert_allclose(sdata["discs"].radius, 55 / MPP / 2)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"image_keys": "fullres"}, KeyError, "no image 'fullres'; found lowres, hires"),
        (None, {"mpp": -1}, ValueError, "`mpp` must be a positive number"),
        (None, {"spot_um": 0}, ValueError, "`spot_um` must be a positive number"),
        (None, {"table_key": "spots"}, ValueError, "names of their own"),
        (None, {"shapes_key": "Hires"}, ValueError, "names of their own"),
        ("obsm", {}, KeyError, 'obsm\\["spatial"\\] is missing'),
        ("uns", {}, ValueError, "µm per pixel are not known"),
        ("uns", {"mpp": MPP}, ValueError, "Pass spot_um="),
    ],
)
def test_bad_input_is_refused(adata, change, options, error, message):
    if change == "obsm":
        del adata.obsm["spatial"]
    elif change == "uns":
        del adata.uns["spatial"]
    before = adata.copy()
    with pytest.raises(error, match=message):
        pp.to_spatialdata(adata, **options)
    assert str(adata) == str(before)


def test_only_tables_are_taken(sdata, adata):
    with pytest.raises(TypeError, match="`adata` must be an AnnData, found SpatialData"):
        pp.to_spatialdata(sdata)
    adata.uns["spatial"]["is_single"] = True  # of CELLxGENE
    pp.to_spatialdata(adata)
    adata.uns["spatial"]["other"] = adata.uns["spatial"]["section"]
    with pytest.raises(ValueError, match="several libraries"):
        pp.to_spatialdata(adata)
