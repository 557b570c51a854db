"""What the values of an image mean, by their content."""

import dask.array as da
import numpy as np
import pytest
from scipy import ndimage
from spatialdata import SpatialData, bounding_box_query
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale
from xarray import DataArray

import stgen
from stgen._spatial.image import Histology, histology_of
from stgen._spatial.pixels import judge_pixels


def slide(height=64, width=80, seed=0):
    """Something like H&E as uint8 ``(3, height, width)``: pink and purple with glass on the right."""
    rng = np.random.default_rng(seed)
    stain = ndimage.gaussian_filter(rng.random((2, height, width)), (0, 2, 2)) * np.array([1.2, 0.8])[:, None, None]
    density = np.tensordot([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]], stain, axes=1)
    density[:, :, width * 3 // 4 :] = 0
    return np.clip(243 * np.exp(-density), 0, 255).astype(np.uint8)


def level(values, channels=None):
    return DataArray(values, dims=("c", "y", "x"), coords={"c": list(channels or map(str, range(len(values))))})


def judged(values, channels=None, **kwargs):
    return judge_pixels([level(values, channels)], name="he", **kwargs)


def histology(values, channels=None, **kwargs):
    return Histology([level(values, channels)], mpp=1.0, name="he", **kwargs)


def read(values, channels=None, **kwargs):
    image = histology(values, channels, **kwargs)
    return image.read(0, 0, image.width, image.height)


PLAIN = slide()


# -- full scale --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype", ["uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
)
def test_8_bit_values_in_any_type(dtype):
    values = judged(PLAIN.astype(dtype))
    assert values.full_scale == 255
    assert values.record() == {"image_full_scale": 255.0}
    assert not histology(PLAIN.astype(dtype)).doubts
    np.testing.assert_allclose(read(PLAIN.astype(dtype)), PLAIN / 255, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_cameras_of_any_number_of_bits(bits, dtype):
    values = np.round(PLAIN * ((2.0**bits - 1) / 255)).astype(dtype)
    assert judged(values).full_scale == 2**bits - 1
    np.testing.assert_allclose(read(values), PLAIN / 255, atol=0.6 / 255)


@pytest.mark.parametrize("over", [1.0, 1.02, 1.3])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_up_to_one_and_somewhat_over(dtype, over):
    values = (PLAIN / 255 * over).astype(dtype)
    assert judged(values).full_scale == 1
    np.testing.assert_allclose(read(values), np.minimum(PLAIN / 255 * over, 1), atol=2e-3)


def test_an_8_bit_image_says_all_by_its_type():
    unreadable = da.map_blocks(
        lambda block: pytest.fail("was read"), da.from_array(PLAIN), dtype=np.uint8, meta=PLAIN[:0]
    )
    values = judged(unreadable, "rgb")
    assert (values.full_scale, values.record(), values.cut) == (255.0, {}, False)
    assert judged(np.ones((1, 8, 8), bool)).full_scale == 1


def test_hot_pixels_do_not_change_the_scale():
    values = np.tile(PLAIN.astype(np.uint16), (1, 4, 4))
    hot = values.copy()
    hot[:, 100, 100], hot[0, 3, 3] = 65535, 4000
    assert judged(hot).full_scale == 255
    np.testing.assert_allclose(read(hot)[:, 110:], read(values)[:, 110:])
    assert read(hot).max() == 1


def test_overshoot_of_interpolation_is_cut():
    values = PLAIN.astype(np.float32) * (255 / 243) * 1.03 - 5
    assert judged(values).full_scale == 255
    assert read(values).max() == 1
    assert read(values).min() >= 0


def test_every_level_and_a_lazy_image_are_judged_alike():
    fine = np.tile(slide(512, 640), (1, 5, 5)).astype(np.uint16) * 16
    whole = judge_pixels([level(fine)])
    lazy = judge_pixels([level(da.from_array(fine, chunks=(3, 512, 512)))])
    pyramid = judge_pixels([level(fine[:, ::step, ::step]) for step in (1, 2, 4, 8)])
    assert whole.full_scale == lazy.full_scale == pyramid.full_scale == 4095


def test_few_windows_of_a_large_image_are_read():
    seen = []

    def block(block_info=None):
        seen.append(block_info[None]["chunk-location"])
        return np.full((3, 256, 256), 200, np.uint16)

    large = da.map_blocks(
        block, chunks=((3,), (256,) * 64, (256,) * 64), dtype=np.uint16, meta=np.empty((0, 0, 0), np.uint16)
    )
    assert judge_pixels([level(large)]).full_scale == 255
    assert len(set(seen)) <= 4 * 64


def test_a_dark_image_in_transmitted_light_is_doubted():
    doubt = histology(np.full((3, 8, 8), 300, np.uint16)).doubts[0]
    assert "'he' is dark" in doubt
    assert "sdata.attrs[\"image_full_scale\"] = {'he': <value>}" in doubt


def test_a_dark_8_bit_image_is_doubted():
    assert not histology(PLAIN).doubts
    filled = np.zeros((3, 64, 240), np.uint8)
    filled[:, :, :80] = PLAIN
    assert "must be NaN or white" in histology(filled).doubts[0]
    assert "'he' is dark" in histology(np.zeros((3, 8, 8), np.uint8)).doubts[0]


@pytest.mark.parametrize(("top", "doubted"), [(200, True), (4095, True), (30_000, False)])
def test_stains_are_shares_of_what_the_type_holds(top, doubted):
    stain = np.random.default_rng(0).integers(0, top + 1, (2, 40, 40)).astype(np.uint16)
    values = judged(stain, ["DAPI", "CD45"])
    assert values.full_scale == 65535
    assert bool(histology(stain, ["DAPI", "CD45"]).doubts) is doubted
    np.testing.assert_allclose(read(stain, ["DAPI", "CD45"]), stain / 65535, atol=1e-6)
    assert judged(stain, ["DAPI", "CD45"], full_scale=top).full_scale == top
    assert not histology(stain, ["DAPI", "CD45"], full_scale=top).doubts


def test_the_user_can_state_the_full_scale(tmp_path):
    image = Image2DModel.parse(
        (PLAIN // 2).astype(np.uint16), dims=("c", "y", "x"), transformations={"um": Scale([1, 1], ("x", "y"))}
    )
    sdata = SpatialData(images={"he": image}, attrs={"image_full_scale": {"he": 510}})
    assert histology_of(sdata, "he", mpp=1.0).values.full_scale == 510
    sdata.write(tmp_path / "a.zarr")
    again = SpatialData.read(tmp_path / "a.zarr")
    np.testing.assert_allclose(
        histology_of(again, "he", mpp=1.0).read(0, 0, 8, 8), PLAIN[:, :8, :8] // 2 / 510, atol=1e-6
    )
    for wrong in (0, -1, np.nan, np.inf, "255", True):
        sdata.attrs["image_full_scale"] = {"he": wrong}
        with pytest.raises(ValueError, match="full scale of an image must be a positive number"):
            histology_of(sdata, "he", mpp=1.0).read(0, 0, 8, 8)
    sdata.attrs["image_full_scale"] = 255
    with pytest.raises(TypeError, match="'he': <value of full scale>"):
        histology_of(sdata, "he", mpp=1.0)


def test_negative_values_are_no_light():
    normalized = (PLAIN / 255 - 0.7) / 0.2
    with pytest.raises(ValueError, match="'he' has negative values"):
        read(normalized.astype(np.float32))
    with pytest.raises(ValueError, match="'he' has negative values"):
        read(PLAIN.astype(np.int16) - 200)
    assert np.isfinite(read(normalized[:2])).all()  # of stains a background may have been subtracted


# -- pyramids ----------------------------------------------------------------------------------------------------------
def test_levels_that_do_not_show_the_whole_image_are_left_out():
    fine = np.tile(PLAIN, (1, 4, 4))
    halves = level(fine[:, ::2, ::2], "rgb")
    kept = Histology([level(fine, "rgb"), halves, level(fine[:, ::7, ::7], "rgb")], mpp=1.0)
    assert len(kept.levels) == 3
    assert not kept.doubts
    cropped = Histology([level(fine[:, :100], "rgb"), halves], mpp=1.0, name="he")
    assert len(cropped.levels) == 1
    assert "'he' has 1 coarser level(s) that do not show the same area" in cropped.doubts[0]
    label = Histology(
        [level(fine, "rgb"), level(PLAIN[:, :, :20], "rgb")], mpp=1.0
    )  # as some slide files have beside the picture
    assert len(label.levels) == 1


def test_levels_that_contradict_their_transformations_are_left_out():
    image = Image2DModel.parse(np.tile(PLAIN, (1, 4, 4)), dims=("c", "y", "x"), scale_factors=[2, 2])
    levels = [next(iter(part.data_vars.values())) for part in image.children.values()]
    assert len(Histology(levels, mpp=1.0).levels) == 3
    assert (
        len(Histology([levels[0][:, :128, :160], *levels[1:]], mpp=1.0).levels) == 1
    )  # the shapes agree, the scales do not


def test_a_pyramid_that_was_cropped_as_a_whole_keeps_its_levels():
    image = Image2DModel.parse(np.tile(PLAIN, (1, 8, 8)), dims=("c", "y", "x"), scale_factors=[2, 2, 2])
    sdata = SpatialData(images={"he": image})
    part = bounding_box_query(sdata, ("x", "y"), [33.3, 57.1], [301.0, 400.4], "global")
    histology = histology_of(part, "he", mpp=1.0)
    assert len(histology.levels) == 4
    assert not histology.doubts


def test_an_image_that_was_cropped_by_indexing_is_refused():
    image = Image2DModel.parse(
        np.tile(PLAIN, (1, 4, 4)), dims=("c", "y", "x"), transformations={"um": Scale([1, 1], ("x", "y"))}
    )
    for part in (image.isel(x=slice(60, 200)), image[:, 5:], image[:, ::2, ::2]):
        with pytest.raises(ValueError, match="was cropped or thinned out by indexing"):
            stgen.pp.tile_grid(SpatialData(images={"he": part}))
    stgen.pp.tile_grid(SpatialData(images={"he": image[:, :200]}), spacing_um=20)  # its corner is where it was


# -- opacity -----------------------------------------------------------------------------------------------------------
def masked(fill, *, dtype=np.uint8, scale=1, alpha=255):
    """The slide with its right half transparent over a color."""
    pixels = PLAIN.astype(dtype) * scale
    opacity = np.full((1, *PLAIN.shape[1:]), alpha, dtype)
    pixels[:, :, 40:], opacity[:, :, 40:] = fill * scale, 0
    return np.concatenate([pixels, opacity])


ON_GLASS = np.where(np.arange(80) < 40, PLAIN / 255, 1.0)


@pytest.mark.parametrize("channels", [None, "rgba", ["R", "G", "B", "A"], ["red", "green", "blue", "alpha"]])
@pytest.mark.parametrize("fill", [0, 255])
def test_what_is_transparent_is_glass(fill, channels):
    image = histology(masked(fill), channels)
    assert image.n_channels == 3
    np.testing.assert_allclose(image.read(0, 0, 80, 64), ON_GLASS, atol=1e-6)
    np.testing.assert_allclose(image.thumbnail(mpp=2)[:, :, 21:], 1, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale", "alpha"),
    [
        ("uint16", 1, 255),
        ("uint16", 257, 65535),
        ("uint16", 16, 65535),
        ("uint16", 16, 1),
        ("float32", 1 / 255, 1),
        ("uint8", 1, 1),
    ],
)
def test_opacity_has_a_scale_of_its_own(dtype, scale, alpha):
    np.testing.assert_allclose(read(masked(0, dtype=dtype, scale=scale, alpha=alpha)), ON_GLASS, atol=1.0 / 255)


def test_channels_are_found_by_their_names():
    pixels = masked(0)
    np.testing.assert_allclose(read(pixels[[3, 0, 1, 2]], "argb"), ON_GLASS, atol=1e-6)
    np.testing.assert_allclose(read(pixels[[2, 1, 0, 3]], "bgra"), ON_GLASS, atol=1e-6)
    np.testing.assert_allclose(read(PLAIN[::-1], ["Blue", "Green", "Red"]), PLAIN / 255, atol=1e-6)


@pytest.mark.parametrize("premultiplied", [True, False])
def test_partly_transparent_colors_are_laid_on_glass(premultiplied):
    opacity = np.clip(np.linspace(1.5, -0.5, 80), 0, 1)
    colors = PLAIN / 255 * (opacity if premultiplied else 1)
    image = np.round(255 * np.concatenate([colors, np.broadcast_to(opacity, (1, 64, 80))])).astype(np.uint8)
    values = judged(image, "rgba")
    assert values.record() == {"image_alpha": "premultiplied" if premultiplied else "straight"}
    np.testing.assert_allclose(read(image, "rgba"), opacity * PLAIN / 255 + 1 - opacity, atol=4 / 255)


@pytest.mark.parametrize("fill", [0, 255])
def test_a_pyramid_of_a_masked_slide_has_no_gray_rim(fill):
    fine = masked(fill).astype(np.float32)
    levels = [level(fine, "rgba")]
    levels.append(level(fine.reshape(4, 16, 4, 16, 5).mean((2, 4)), "rgba"))
    coarse = Histology(levels, mpp=1.0)
    np.testing.assert_allclose(
        coarse.read(20, 0, 40, 64, mpp=4.5), histology(ON_GLASS).read(20, 0, 40, 64, mpp=4.5), atol=0.005
    )
    assert coarse.values == judge_pixels(levels[:1])


def test_stains_are_not_taken_for_opacity():
    rng = np.random.default_rng(0)
    stains = rng.integers(0, 256, (4, 64, 80)).astype(np.uint8)
    assert judged(stains).alpha is None
    assert judged(stains, ["DAPI", "CD45", "CD3", "A"]).alpha == 3
    stains[3] = 255 * (rng.random((64, 80)) < 0.2)  # bright spots, with background of other stains between them
    assert judged(stains).alpha is None
    assert "read as a stain" in histology(stains).doubts[0]
    assert histology(stains, ["DAPI", "CD45", "CD3", "CD8"]).doubts == ()


def test_gray_with_opacity_is_one_channel():
    image = masked(0)[[1, 3]]
    assert histology(image).n_channels == histology(image, ["gray", "alpha"]).n_channels == 1
    np.testing.assert_allclose(read(image)[:, :, 40:], 0)  # one channel is a stain, and dark where there is none
    assert histology(PLAIN[:2]).n_channels == 2


def test_transparent_everywhere_is_refused():
    image = masked(0)
    image[3] = 0
    with pytest.raises(ValueError, match="'he' is transparent everywhere: its channel 'a' is 0"):
        read(image, "rgba")


# -- NaN ---------------------------------------------------------------------------------------------------------------
def registered(**kwargs):
    values = (PLAIN / 255).astype(np.float32)
    values[:, :, 40:] = np.nan
    return values


def test_nan_is_outside_the_image():
    image = histology(registered())
    np.testing.assert_allclose(image.read(0, 0, 80, 64), ON_GLASS, atol=1e-6)
    seen, known = image.sketch(mpp=2)
    np.testing.assert_allclose(seen[:, :, 21:], 1, atol=1e-6)
    np.testing.assert_array_equal(known, np.broadcast_to(np.arange(40) < 20, (32, 40)))
    np.testing.assert_array_equal(
        image.covers([[5, 5], [39, 60], [41, 5], [79, 63], [-1, 5]]), [True, True, False, False, False]
    )
    assert histology(PLAIN).covers([[79, 63], [81, 5]]).tolist() == [True, False]


def test_nan_in_one_color_is_outside_but_of_one_stain_is_dark():
    values = np.full((3, 8, 8), 0.5, np.float32)
    values[1, :, 4:] = np.nan
    np.testing.assert_allclose(read(values)[:, :, 4:], 1)
    stains = read(values[:2], ["DAPI", "CD45"])
    np.testing.assert_allclose(stains[1, :, 4:], 0)
    np.testing.assert_allclose(stains[0], 0.5)
    assert histology(values[:2]).covers([[6, 6]]).all()


def test_a_channel_of_nan_is_named():
    values = np.full((3, 8, 8), 0.5, np.float32)
    values[1] = np.nan
    with pytest.raises(ValueError, match="'he' is NaN everywhere in 1 of its 3 channels: g"):
        read(values, "rgb")


def test_a_small_registered_area_of_a_large_image_is_found():
    values = np.full((3, 3000, 3000), np.nan, np.float32)
    values[:, 1570:1600, 1570:1600] = 200
    assert judge_pixels([level(values)]).full_scale == 255
    coarse = np.full((3, 300, 300), np.nan, np.float32)
    assert judge_pixels([level(values), level(coarse)]).full_scale == 255
    with pytest.raises(ValueError, match="NaN everywhere"):
        judge_pixels([level(coarse)])


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_values_are_refused(sign):
    values = (PLAIN / 255).astype(np.float32)
    values[1, 3, 3] = sign * np.inf
    with pytest.raises(ValueError, match="'he' has infinite values"):
        read(values)


# -- through the package -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def section():
    """A section of 480 µm whose image is NaN from 300 µm on. Look, don't touch."""
    sdata = stgen.datasets.simulated_section(seed=2, size_um=480, spot_pitch_um=45, spot_diameter_um=35, n_genes=6)
    he = (sdata["he"].values / 255).astype(np.float32)
    he[:, :, 300:] = np.nan
    sdata["he"] = Image2DModel.parse(
        he, dims=("c", "y", "x"), c_coords=list("rgb"), transformations={"um": Scale([1, 1], ("x", "y"))}
    )
    return sdata


def test_no_map_tile_or_nucleus_outside_the_registered_area(section):
    sdata = SpatialData(
        images=dict(section.images),
        shapes={"spots": section["spots"]},
        tables={"spot_counts": section["spot_counts"].copy()},
    )
    stgen.tl.superresolve(sdata, "he", low_res="spot_counts", n_samples=1, progress=False)
    found = np.isfinite(np.asarray(sdata["superresolved"].data)[0])
    left = np.arange(found.shape[1]) * sdata.attrs["stgen"]["superresolved"]["bin_um"]
    assert not found[:, left > 300].any()
    assert found[:, left < 280].mean() > 0.9
    entry = sdata.attrs["stgen"]["superresolved"]
    left_out = (section["spots"].geometry.x.to_numpy() > 300) | (
        np.asarray(section["spot_counts"].X.sum(1)).ravel() == 0
    )
    assert (entry["image_full_scale"], entry["n_spots_left_out"]) == (1.0, left_out.sum())
    stgen.pp.tile_grid(sdata, image_key="he", spacing_um=40)
    assert sdata["tiles"].geometry.x.max() < 320
    stgen.pp.segment_nuclei(sdata, image_key="he", progress=False)
    nuclei = np.asarray(sdata["nuclei"].data)
    assert nuclei.max() > 50
    assert not nuclei[:, 301:].any()


def test_locations_in_the_registered_area_are_embedded_and_those_beyond_are_outside(section):
    with pytest.raises(ValueError, match="locations lie outside the image"):
        stgen.pp.embed(section, image_key="he", table_key="spot_counts", copy=True, progress=False)
    kept = section["spots"].geometry.x.to_numpy() < 300
    sdata = SpatialData(
        images=dict(section.images),
        shapes={"spots": section["spots"][kept]},
        tables={"spot_counts": section["spot_counts"][kept].copy()},
    )
    stgen.pp.embed(sdata, image_key="he", progress=False)
    assert np.isfinite(sdata["spot_counts"].obsm["X_texture"]).all()
    assert sdata["spot_counts"].uns["stgen"]["X_texture"]["image_full_scale"] == 1.0
    report = stgen.pp.check_alignment(sdata, image_key="he")
    assert report.inside == 1.0


def test_tiles_that_no_memory_holds_are_refused_before_work(section):
    with pytest.raises(ValueError, match=r"more than\s+the 1e\+07 that can be held. Pass a larger spacing_um"):
        stgen.pp.tile_grid(section, image_key="he", spacing_um=1e-4)
