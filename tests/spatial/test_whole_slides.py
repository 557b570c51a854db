"""Slides as LazySlide and wsidata hold them, a subclass of SpatialData: input of predictions from histology alone."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd
import tifffile
import wsidata

from stgen import datasets, models, pl, pp, tl
from stgen._spatial.image import image_of, slide_mpp

GENES = ["EPCAM", "COL1A1"]


@pytest.fixture(scope="module")
def section():
    """A section at 1 µm per pixel, with its embedding."""
    sdata = datasets.simulated_section(size_um=700, seed=1)
    del sdata.tables["cell_counts"]
    pp.embed(sdata, image_key="he", patch_um=128, progress=False)
    return sdata


@pytest.fixture(scope="module")
def model(section):
    fitted = models.LinearProbe(GENES, embedding_dim=section["spot_counts"].obsm["X_texture"].shape[1])
    tl.fit(fitted, section)
    return fitted


@pytest.fixture
def slide(section, tmp_path):
    """The image of the section as a slide file, opened by wsidata."""
    pixels = np.ascontiguousarray(section["he"].to_numpy().transpose(1, 2, 0))
    file = tmp_path / "slide.tif"
    resolution = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}  # 1 µm
    tifffile.imwrite(file, pixels, tile=(256, 256), photometric="rgb", **resolution)
    return wsidata.open_wsi(file, store=None, reader="openslide", attach_images=True)


def test_a_slide_knows_its_scale(slide, section):
    assert slide_mpp(slide, "wsi") == 1.0
    assert image_of(slide, "wsi").mpp == 1.0
    assert slide_mpp(section, "he") is None


def test_an_image_of_another_size_is_not_the_slide(slide):
    slide["thumbnail"] = sd.models.Image2DModel.parse(np.zeros((3, 70, 70), np.uint8), dims=("c", "y", "x"))
    assert slide_mpp(slide, "thumbnail") is None
    with pytest.raises(ValueError, match="not known"):
        image_of(slide, "thumbnail")


def test_tiles_of_a_slide_are_predicted_like_those_of_the_same_image(slide, section, model):
    plain = sd.SpatialData(images={"he": section["he"]})
    for data in (slide, plain):
        tl.predict_expression(data, model=model, key_added="probe", progress=False)
    assert isinstance(slide, wsidata.WSIData)
    assert len(slide["probe"]) > 20
    np.testing.assert_allclose(slide["probe"].X, plain["probe"].X, rtol=1e-5)
    np.testing.assert_allclose(slide["probe"].obsm["spatial"], plain["probe"].obsm["spatial"])


def test_locations_on_a_slide_are_predicted_like_those_on_the_image(slide, section, model):
    slide["spots"] = sd.models.ShapesModel.parse(
        np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y]), geometry=0, radius=27.5,
        index=section["spots"].index,
    )  # fmt: skip
    slide["spot_counts"] = section["spot_counts"].copy()
    del slide["spot_counts"].obsm["X_texture"]
    before = section["spot_counts"].obsm["X_texture"]
    tl.predict_expression(slide, model=model, image_key="wsi", key_added="probe", progress=False)
    np.testing.assert_allclose(slide["spot_counts"].obsm["X_texture"], before, rtol=1e-4, atol=1e-5)


def test_a_slide_is_embedded_and_drawn_like_its_image(slide, section, model):
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    slide["spots"] = sd.models.ShapesModel.parse(xy, geometry=0, radius=27.5, index=section["spots"].index)
    slide["spot_counts"] = section["spot_counts"].copy()
    before = slide["spot_counts"].obsm.pop("X_texture")
    del slide["spot_counts"].uns["stgen"]
    pp.embed(slide, image_key="wsi", patch_um=128, progress=False)
    np.testing.assert_allclose(slide["spot_counts"].obsm["X_texture"], before, rtol=1e-4, atol=1e-5)
    tl.predict_expression(slide, model=model, key_added="probe", progress=False)
    assert pl.maps(slide, "EPCAM", keys="probe", image_key="wsi")[0, 0].images
    plt.close("all")


def test_an_embedded_table_needs_no_image(slide, section, model):
    slide["spots"] = section["spots"]
    slide["spot_counts"] = section["spot_counts"].copy()
    slide["other"] = sd.models.Image2DModel.parse(np.zeros((3, 70, 70), np.uint8), dims=("c", "y", "x"))
    tl.predict_expression(slide, model=model, key_added="probe", progress=False)
    assert np.isfinite(slide["spot_counts"][:, GENES].layers["probe"]).all()


@pytest.mark.parametrize("mpp", [0, -1.0])
def test_an_impossible_scale_is_refused(slide, section, mpp):
    for data, key in ((slide, "wsi"), (section, "he")):
        with pytest.raises(ValueError, match="mpp"):
            pp.tile_grid(data, image_key=key, mpp=mpp)


def test_a_slide_without_its_image_says_how_to_attach_it(slide, model):
    del slide.images["wsi"]
    with pytest.raises((KeyError, ValueError), match="attach_images=True"):
        tl.predict_expression(slide, model=model, progress=False)
