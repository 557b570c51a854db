"""What an AnnData in the convention of scanpy says of itself is read, or refused."""

from __future__ import annotations

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stgen import pp
from stgen._spatial.library import library_of
from stgen._spatial.section import get_section


def hexagonal(n_rows: int, n_columns: int, pitch: float, offset: float) -> np.ndarray:
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    return np.column_stack([(column + 0.5 * (row % 2)) * pitch, row * pitch * np.sqrt(3) / 2]) + offset


def pixels(height: int = 150, width: int = 180) -> np.ndarray:
    return np.random.default_rng(0).integers(40, 220, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def adata() -> ad.AnnData:
    """42 spots 100 µm or 80 pixels apart, and an image of a quarter of the resolution."""
    xy = hexagonal(6, 7, 80.0, 90.0)
    adata = ad.AnnData(np.ones((len(xy), 3), np.float32))
    adata.obs_names = [f"spot{i}" for i in range(len(xy))]
    adata.obsm["spatial"] = xy
    factors = {"tissue_hires_scalef": 0.25, "spot_diameter_fullres": 0.65 * 80}
    adata.uns["spatial"] = {"lib": {"images": {"hires": pixels()}, "scalefactors": factors}}
    return adata


def library(adata: ad.AnnData) -> dict:
    return adata.uns["spatial"]["lib"]


def same_section(adata: ad.AnnData, scale: float = 0.25) -> None:
    section = get_section(adata, need_image=True)
    np.testing.assert_allclose(section.xy_px, hexagonal(6, 7, 80.0, 90.0) * scale)
    assert section.mpp == pytest.approx(1.25 / scale)
    assert section.spot_diameter_um == pytest.approx(55)


# -- libraries --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "others",
    [{"is_single": True}, {"is_single": np.bool_(True)}, {"note": "x", "shape": np.ones(3), "none": None, "d": {}}],
)
def test_keys_that_hold_no_library_are_passed_over(adata, others):
    adata.uns["spatial"] = others | adata.uns["spatial"]
    same_section(adata)
    assert pp.check_alignment(adata).inside == 1


@pytest.mark.parametrize("spatial", [{"is_single": False}, {}, None, np.ones((3, 2)), "lib", {"lib": {"images": None}}])
def test_without_a_library_there_is_no_image(adata, spatial):
    adata.uns["spatial"] = spatial
    with pytest.raises(KeyError, match="There is no image"):
        get_section(adata, need_image=True)
    np.testing.assert_array_equal(get_section(adata).xy_px, adata.obsm["spatial"])


def test_a_library_without_a_name_is_read(adata):
    adata.uns["spatial"] = library(adata)
    same_section(adata)


# -- samples ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", ["library_id", "sample", "Batch", "orig.ident"])
def test_several_samples_with_one_library_are_refused(adata, column):
    other = adata.copy()
    other.obsm["spatial"] = other.obsm["spatial"] + 7.0
    both = ad.concat({"one": adata, "two": other}, label=column, index_unique="-", uns_merge="first")
    assert list(both.uns["spatial"]) == ["lib"]
    for need_image in (False, True):
        with pytest.raises(
            ValueError, match=rf"obs\['{column}'\] names 2 samples \(one, two\).*for name in \['one', 'two'\]"
        ):
            get_section(both, need_image=need_image)
    # what the message advises
    part = both[both.obs[column] == "one"].copy()
    part.uns["spatial"] = {"one": library(adata)}
    same_section(part)


def test_samples_on_one_slide_share_its_image(adata):
    """Cores of a microarray lie beside each other; so do spots of a batch that was cut in two."""
    adata.obs["sample"] = np.where(adata.obsm["spatial"][:, 0] < 350, "left", "right")
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) % 3 == 0, "a", "b")
    adata.obs["patient"] = "p1"
    same_section(adata)


def test_a_library_of_another_name_is_warned_of(adata, caplog):
    adata.obs["library_id"] = "other"
    same_section(adata)
    assert "obs['library_id'] is 'other' and the only library" in caplog.text


# -- scale factors ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value", ["0.25", np.float32(0.25), np.array(0.25), np.array([0.25]), b"0.25", np.str_(" 0.25 ")]
)
def test_scale_factors_as_files_carry_them(adata, value):
    library(adata)["scalefactors"]["tissue_hires_scalef"] = value
    library(adata)["scalefactors"]["spot_diameter_fullres"] = np.array("52.0")
    same_section(adata)
    assert pp.check_alignment(adata).inside == 1


@pytest.mark.parametrize("value", [0, -0.25, np.nan, "none", True, np.ones(2), {}])
def test_scale_factors_that_are_no_positive_numbers_are_refused(adata, value):
    library(adata)["scalefactors"]["tissue_hires_scalef"] = value
    with pytest.raises(ValueError, match=r'\["tissue_hires_scalef"\] must be a positive number, found'):
        get_section(adata, need_image=True)


@pytest.mark.parametrize("value", [0, np.nan, "?", None])
def test_a_diameter_that_is_not_known(adata, value, caplog):
    library(adata)["scalefactors"] |= {"spot_diameter_fullres": value, "microns_per_pixel": value}
    section = get_section(adata, need_image=True)
    assert section.mpp == pytest.approx(5.0)  # from the pitch
    assert section.spot_diameter_um is None
    assert ("taken as not known" in caplog.text) == (value is not None)
    del library(adata)["scalefactors"]["spot_diameter_fullres"]
    assert get_section(adata).mpp == pytest.approx(1.25)


# -- images -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "carried",
    [
        Image.fromarray,
        lambda x: da.from_array(x, chunks=(50, 50, 3)),
        lambda x: x.astype(np.float32) / 255,
        lambda x: x[::-1][::-1],
        np.asfortranarray,
        lambda x: x.astype(">u2"),
    ],
)
def test_images_as_buffers(adata, carried, tmp_path):
    plain = get_section(adata, need_image=True).image.read(10, 10, 40, 30)
    library(adata)["images"]["hires"] = carried(pixels())
    np.testing.assert_allclose(get_section(adata, need_image=True).image.read(10, 10, 40, 30), plain, atol=1e-6)
    np.save(tmp_path / "a.npy", pixels())
    library(adata)["images"]["hires"] = np.load(tmp_path / "a.npy", mmap_mode="r")
    np.testing.assert_array_equal(get_section(adata, need_image=True).image.read(10, 10, 40, 30), plain)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/data/tissue_hires_image.png", "holds no pixels but str; read it first"),
        (b"\x89PNG", "holds no pixels but bytes"),
        (np.moveaxis(pixels(), -1, 0), "channels come first.*np.moveaxis"),
        (np.ones(5), "must have the shape"),
    ],
)
def test_what_is_no_image_is_refused(adata, image, message):
    library(adata)["images"]["hires"] = image
    with pytest.raises(ValueError, match=message):
        get_section(adata, need_image=True)


def test_an_image_that_was_cropped_contradicts_the_other(adata):
    library(adata)["images"]["lowres"] = pixels(45, 54)
    library(adata)["scalefactors"]["tissue_lowres_scalef"] = 0.075
    same_section(adata)
    library(adata)["images"]["hires"] = pixels()[:120, :140]
    for key in ("hires", "lowres"):
        with pytest.raises(ValueError, match=r"do not show the same area.*One of them was cropped or resized"):
            get_section(adata, image_key=key)
    del library(adata)["images"]["lowres"]  # what the message advises
    same_section(adata)


def test_an_image_that_was_cropped_does_not_reach_the_locations(adata):
    library(adata)["images"]["hires"] = pixels()[:120, :140]
    with pytest.raises(ValueError, match="locations lie outside the image"):
        pp.check_alignment(adata)


# -- coordinates ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stated", [{}, {"microns_per_pixel": 1.25}])
def test_coordinates_in_pixels_of_an_image_are_refused(adata, stated):
    library(adata)["scalefactors"] |= stated
    adata.obsm["spatial"] = adata.obsm["spatial"] * 0.25
    for arguments in ({}, {"mpp": 1.25}, {"need_image": True, "mpp": 1.25}):
        with pytest.raises(ValueError, match=r"in pixels of the image 'hires'.*adata.obsm\[\"spatial\"\] / 0.25"):
            get_section(adata, **arguments)
    adata.obsm["spatial"] = adata.obsm["spatial"] / 0.25  # what the message advises
    same_section(adata)


def test_coordinates_of_bins_are_not_mistaken(adata):
    """Bins of Visium HD are as wide as they are apart."""
    row, column = np.divmod(np.arange(42), 7)
    adata.obsm["spatial"] = 80.0 * np.column_stack([column, row]) + 90
    library(adata)["scalefactors"] |= {"spot_diameter_fullres": 80.0, "microns_per_pixel": 0.2}
    assert get_section(adata, need_image=True).mpp == pytest.approx(0.8)
    adata.obsm["spatial"] = adata.obsm["spatial"] * 0.25
    with pytest.raises(ValueError, match="in pixels of the image 'hires'"):
        get_section(adata, need_image=True)


@pytest.mark.parametrize(
    "columns",
    [
        ["x", "y"],
        ["X", "Y"],
        ["imagecol", "imagerow"],
        ["pxl_col_in_fullres", "pxl_row_in_fullres"],
        ["x_centroid", "y_centroid"],
    ],
)
def test_columns_of_coordinates_are_taken_by_their_names(adata, columns):
    xy = pd.DataFrame(adata.obsm["spatial"], columns=columns, index=adata.obs_names)
    for order in (columns, columns[::-1]):
        adata.obsm["spatial"] = xy[order]
        same_section(adata)
    del adata.obsm["spatial"]
    adata.obs[columns] = xy
    with pytest.raises(KeyError, match=f"adata.obs.*{columns[0]}.*{columns[1]}.*to_numpy"):
        get_section(adata)


def test_columns_that_do_not_say_what_they_are(adata):
    xy = adata.obsm["spatial"]
    adata.obsm["spatial"] = pd.DataFrame(xy, columns=["array_row", "array_col"], index=adata.obs_names)
    with pytest.raises(ValueError, match=r"columns array_row, array_col.*not known which of them"):
        get_section(adata)
    adata.obsm["spatial"] = pd.DataFrame(xy, index=adata.obs_names)  # numbered: in their order
    same_section(adata)
    adata.obsm["spatial"] = np.full(xy.shape, "left", dtype=object)
    with pytest.raises(ValueError, match="must hold numbers as x, y; found object"):
        get_section(adata)


def test_the_library_is_by_reference(adata):
    assert library_of(adata).images["hires"] is library(adata)["images"]["hires"]
