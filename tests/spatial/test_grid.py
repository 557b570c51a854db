"""The grid of maps: images read on it, and measurements brought onto it."""

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from shapely import box
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, set_transformation

from stgen._spatial.grid import Grid, get_map, map_counts_checked
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import write_image, write_table

XY = ("x", "y")


def affine(matrix, offset=(0.0, 0.0)):
    full = np.eye(3)
    full[:2, :2], full[:2, 2] = matrix, offset
    return Affine(full, XY, XY)


def random_image(height=60, width=80, channels=3, seed=0, dtype=np.uint8):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (channels, height, width), dtype=dtype, endpoint=True)


def image_element(array, transformation=None, **kwargs):
    kwargs.setdefault("dims", ("c", "y", "x"))
    return Image2DModel.parse(array, transformations={"um": transformation or Identity()}, **kwargs)


def with_grid(height=12, width=16, bin_um=5.0, offset=(0.0, 0.0), **elements):
    """An object with an image or more, and a grid that begins at ``offset`` (x, y) µm."""
    first = Affine(np.array([[bin_um, 0, offset[0]], [0, bin_um, offset[1]], [0, 0, 1]]), XY, XY)
    return SpatialData.init_from_elements(elements), Grid(height, width, bin_um, {"um": first})


def map_of(values, transformations, genes=None, key="low"):
    sdata = SpatialData()
    genes = [f"g{i}" for i in range(len(values))] if genes is None else genes
    write_image(sdata, key, np.asarray(values), channels=genes, transformations=transformations)
    return sdata


def unreadable(values):
    """The same dask array, of which no block can be computed."""
    return values.map_blocks(lambda block: pytest.fail("computed"), dtype=values.dtype, meta=values._meta)


# -- grids ------------------------------------------------------------------------------------------------------------
def test_the_grid_of_an_image_has_whole_bins_from_its_corner(sdata):
    grid = Grid.of_image(sdata, "he", bin_um=7)
    assert (grid.height, grid.width, grid.bin_um) == (85, 85, 7.0)
    np.testing.assert_allclose(grid.to_system("um"), np.diag([7, 7, 1]))
    assert grid.overlap(sdata, "he") == pytest.approx(1.0)


def test_the_grid_of_an_image_follows_all_its_transformations():
    image = image_element(random_image(), affine([[0, -0.5], [0.5, 0]], (70, 30)))
    set_transformation(image, Scale([3, 3], axes=XY), "other")
    sdata = SpatialData(images={"he": image})
    grid = Grid.of_image(sdata, "he", bin_um=10)
    assert (grid.height, grid.width) == (3, 4)
    np.testing.assert_allclose(grid.to_system("um"), [[0, -10, 70], [10, 0, 30], [0, 0, 1]])
    np.testing.assert_allclose(grid.to_system("other"), np.diag([60, 60, 1]))


def test_a_finer_grid_covers_the_same_area(sdata):
    grid = Grid.of_image(sdata, "he", bin_um=20)
    fine = grid.refined(4)
    assert (fine.height, fine.width, fine.bin_um) == (120, 120, 5.0)
    np.testing.assert_allclose(fine.to_system("um") @ [120, 120, 1], grid.to_system("um") @ [30, 30, 1])


def test_bins_larger_than_the_image_and_unknown_scales_are_refused(sdata):
    with pytest.raises(ValueError, match="Bins of 700 µm are larger than the image 'he', which is 600 x 600 µm"):
        Grid.of_image(sdata, "he", bin_um=700)
    with pytest.raises(ValueError, match="`bin_um` must be a positive number of µm"):
        Grid.of_image(sdata, "he", bin_um=-1)
    with pytest.raises(KeyError, match="found he. Pass image_key"):
        Grid.of_image(sdata, "HE", bin_um=10)
    pixels = map_of(np.ones((1, 4, 5)), {"global": Identity()})
    with pytest.raises(ValueError, match="µm per bin of the map 'low' are not known"):
        Grid.of_map(pixels, "low")
    pixels.attrs["stgen"] = {"low": {"bin_um": 8.0}}
    assert Grid.of_map(pixels, "low").bin_um == 8.0


def test_the_scale_of_a_map_is_that_of_its_micrometer_system():
    sdata = map_of(np.ones((1, 4, 5)), {"px": Identity(), "um": Scale([2.5, 2.5], axes=XY)})
    sdata.attrs["stgen"] = {"low": {"bin_um": 99.0}}
    grid = Grid.of_map(sdata, "low")
    assert (grid.height, grid.width, grid.bin_um) == (4, 5, 2.5)


def test_the_shared_system_is_a_micrometer_one_then_global():
    sdata = map_of(np.ones((1, 4, 5)), {"a": Identity(), "global": Identity(), "um": Identity()})
    assert Grid.of_map(sdata, "low").shared_system(sdata, "low") == "um"
    assert Grid(4, 5, 1.0, {"a": Identity(), "global": Identity()}).shared_system(sdata, "low") == "global"
    assert Grid(4, 5, 1.0, {"a": Identity()}).shared_system(sdata, "low") == "a"
    assert Grid.of_map(sdata, "low").shared_system(sdata, "low", "a") == "a"
    with pytest.raises(KeyError, match="do not share the coordinate system 'b'"):
        Grid.of_map(sdata, "low").shared_system(sdata, "low", "b")
    with pytest.raises(
        ValueError, match=r"share no coordinate system \(the grid: z; 'low': a, global, um\).*Align them"
    ):
        Grid(4, 5, 1.0, {"z": Identity()}).shared_system(sdata, "low")
    with pytest.raises(KeyError, match="no element 'nothing'; found low"):
        Grid.of_map(sdata, "low").shared_system(sdata, "nothing")


def test_locations_are_given_in_bins_rows_first():
    xy = np.array([[10.0, 20.0], [35.0, 5.0]])
    points = PointsModel.parse(xy, transformations={"um": Scale([2, 2], axes=XY)})
    circles = ShapesModel.parse(xy, geometry=0, radius=3.0, transformations={"um": Scale([2, 2], axes=XY)})
    sdata, grid = with_grid(points=points, circles=circles, he=image_element(random_image()), offset=(10, 0))
    expected = np.array([[8.0, 2.0], [2.0, 12.0]])
    np.testing.assert_allclose(grid.locate(sdata, "points"), expected)
    np.testing.assert_allclose(grid.locate(sdata, "circles"), expected)
    with pytest.raises(TypeError, match="'he' is neither points nor shapes"):
        grid.locate(sdata, "he")


def test_overlap_is_the_share_of_the_grid_that_the_image_covers():
    sdata, grid = with_grid(he=image_element(random_image(60, 80)))  # the grid is 80 x 60 µm
    assert grid.overlap(sdata, "he") == pytest.approx(1.0)
    set_transformation(sdata["he"], Translation([60, 30], axes=XY), "um")
    assert grid.overlap(sdata, "he") == pytest.approx(1 / 8)
    set_transformation(sdata["he"], Translation([80, 60], axes=XY), "um")
    assert grid.overlap(sdata, "he") == 0
    set_transformation(sdata["he"], affine([[0, -1], [1, 0]], (40, 0)), "um")  # a quarter turn: 60 x 80 from x = -20
    assert grid.overlap(sdata, "he") == pytest.approx(0.5)


# -- images on a grid --------------------------------------------------------------------------------------------------
def test_an_image_on_its_own_grid_is_itself():
    array = random_image()
    sdata, grid = with_grid(he=image_element(array, c_coords=["r", "g", "b"]))
    window = grid.image_window(sdata, "he", px_per_bin=5)
    assert (window.channels, window.n_channels, window.px_per_bin) == (["r", "g", "b"], 3, 5)
    read = window(2, 3, 4, 7)
    assert (read.dtype, read.shape) == (np.float32, (3, 20, 35))
    np.testing.assert_allclose(read, array[:, 10:30, 15:50] / 255, atol=1e-6)


def test_fractional_offsets_shift_by_part_of_a_pixel():
    array = random_image()
    sdata, grid = with_grid(he=image_element(array), offset=(0.25, 0.5))
    read = grid.image_window(sdata, "he", px_per_bin=5)(2, 3, 4, 7)
    x = 0.75 * array[:, :, 15:50] + 0.25 * array[:, :, 16:51]
    np.testing.assert_allclose(read, (x[:, 10:30] + x[:, 11:31]) / 2 / 255, atol=1e-6)


DIHEDRAL = [(turns, mirror) for turns in range(4) for mirror in (False, True)]


def stored_turned(array, turns, mirror, element):
    """The same picture in the same place, stored turned and mirrored."""
    to_um = element.to_affine_matrix(XY, XY)
    stored = array
    for _ in range(turns):  # rot90: stored[i, j] = array[j, n - 1 - i], so x = n - i', y = j'
        to_um = to_um @ np.array([[0, -1, stored.shape[2]], [1, 0, 0], [0, 0, 1.0]])
        stored = np.rot90(stored, axes=(1, 2))
    if mirror:
        to_um = to_um @ np.array([[-1, 0, stored.shape[2]], [0, 1, 0], [0, 0, 1.0]])
        stored = stored[:, :, ::-1]
    return np.ascontiguousarray(stored), Affine(to_um, XY, XY)


@pytest.mark.parametrize(("turns", "mirror"), DIHEDRAL)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_right_angles_and_mirrors_change_nothing(turns, mirror, scale):
    array = random_image()
    placed = affine([[scale, 0], [0, scale]], (0.3, -0.2))
    stored, turned = stored_turned(array, turns, mirror, placed)
    sdata, grid = with_grid(he=image_element(array, placed), turned=image_element(stored, turned), bin_um=4.0)
    for args in [(0, 0, 12, 16), (-2, 3, 5, 4), (3, 2, 1, 6)]:
        expected = grid.image_window(sdata, "he", px_per_bin=3)(*args)
        np.testing.assert_allclose(grid.image_window(sdata, "turned", px_per_bin=3)(*args), expected, atol=2e-6)


def test_a_quarter_turn_and_a_reflection_are_rot90_and_flip():
    array = random_image(40, 40)
    turn, mirror = affine([[0, -1], [1, 0]], (40, 0)), affine([[-1, 0], [0, 1]], (40, 0))
    sdata, grid = with_grid(8, 8, turned=image_element(array, turn), mirrored=image_element(array, mirror))
    read = grid.image_window(sdata, "turned", px_per_bin=5)(0, 0, 8, 8)
    np.testing.assert_allclose(read, np.rot90(array, -1, axes=(1, 2)) / 255, atol=1e-6)
    read = grid.image_window(sdata, "mirrored", px_per_bin=5)(0, 0, 8, 8)
    np.testing.assert_allclose(read, array[:, :, ::-1] / 255, atol=1e-6)


def rotation(degrees, scale=1.0):
    angle = np.deg2rad(degrees)
    return scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def test_a_rotated_image_is_read_where_it_lies():
    y, x = np.mgrid[:200, :300] + 0.5
    array = np.stack([x / 300, y / 200, (x + y) / 500]).astype(np.float32)  # linear, so interpolation is exact
    place = affine(rotation(30, 0.5), (40, -20))
    sdata, grid = with_grid(10, 10, 3.0, (50, 40), he=image_element(array, place))
    read = grid.image_window(sdata, "he", px_per_bin=8)(1, 2, 5, 6)
    row, column = np.mgrid[8:48, 16:64] + 0.5
    um = np.stack([50 + 3 * column / 8, 40 + 3 * row / 8, np.ones_like(row)])
    px, py, _ = np.einsum("ij,jyx->iyx", np.linalg.inv(place.to_affine_matrix(XY, XY)), um)
    assert (px > 3).all()
    assert (px < 297).all()
    np.testing.assert_allclose(read, [px / 300, py / 200, (px + py) / 500], atol=1e-5)


@pytest.mark.parametrize("place", [affine(rotation(0, 0.73), (1.7, 2.1)), affine(rotation(17, 0.73), (1.7, 2.1))])
@pytest.mark.parametrize("scale_factors", [None, [2, 2]])
def test_windows_that_overlap_agree(place, scale_factors):
    array = random_image(128, 160)
    image = image_element(array, place, scale_factors=scale_factors)
    sdata, grid = with_grid(20, 24, 4.1, (0.3, 0.7), he=image)
    window = grid.image_window(sdata, "he", px_per_bin=2)
    whole = window(-3, -3, 26, 30)
    for y0, x0, height, width in [(-3, -3, 7, 9), (0, 0, 20, 24), (11, 5, 4, 3), (19, 23, 4, 4)]:
        part = whole[:, 2 * (y0 + 3) : 2 * (y0 + 3 + height), 2 * (x0 + 3) : 2 * (x0 + 3 + width)]
        np.testing.assert_allclose(window(y0, x0, height, width), part, atol=2e-6)


def test_a_coarse_window_of_a_multiscale_image_reads_the_coarse_level():
    y, x = np.mgrid[:480, :640]
    array = (127 + 60 * np.stack([np.sin(y / 50), np.cos(x / 40), np.sin((x + y) / 60)])).astype(np.uint8)
    sdata, grid = with_grid(
        he=image_element(array, scale_factors=[2, 2], chunks=(3, 64, 64)), plain=image_element(array), bin_um=40.0
    )
    finest = next(iter(sdata["he"].children.values()))["image"]
    finest.data = unreadable(finest.data)
    read = grid.image_window(sdata, "he", px_per_bin=10)(0, 0, 12, 16)
    np.testing.assert_allclose(read, grid.image_window(sdata, "plain", px_per_bin=10)(0, 0, 12, 16), atol=0.015)


@pytest.mark.parametrize("degrees", [0, 90, 20])
def test_beyond_the_image_its_edge_is_repeated(degrees):
    array = random_image(40, 40)
    array[:, :, :4], array[:, :, -4:], array[:, :4], array[:, -4:] = 51, 102, 153, 204
    sdata, grid = with_grid(8, 8, he=image_element(array, affine(rotation(degrees))))
    window = grid.image_window(sdata, "he", px_per_bin=1)
    far = {0: [(3, -60), (3, 60), (-60, 3), (60, 3)], 90: [(-60, -3), (60, -3), (3, 60), (3, -60)], 20: []}[degrees]
    for (y0, x0), value in zip(far, [51, 102, 153, 204], strict=False):
        np.testing.assert_allclose(window(y0, x0, 2, 2), value / 255, atol=1e-6)
    outside = window(500, 500, 3, 3)
    assert np.isfinite(outside).all()
    assert len(np.unique(outside.round(4))) == 1


def test_rgba_uint16_and_single_channel_images():
    rgba = random_image(channels=4)
    deep = random_image(channels=2, dtype=np.uint16)
    one = random_image(channels=1)
    sdata, grid = with_grid(
        rgba=image_element(rgba, c_coords=["r", "g", "b", "a"]), deep=image_element(deep), one=image_element(one)
    )
    window = grid.image_window(sdata, "rgba", px_per_bin=5)
    assert window.channels == ["r", "g", "b"]
    on_white = 1 - rgba[3] / 255 * (1 - rgba[:3] / 255)
    np.testing.assert_allclose(window(0, 0, 12, 16), on_white, atol=1e-6)
    np.testing.assert_allclose(grid.image_window(sdata, "deep", px_per_bin=5)(0, 0, 12, 16), deep / 65535, atol=1e-6)
    np.testing.assert_allclose(grid.image_window(sdata, "one", px_per_bin=5)(0, 0, 12, 16), one / 255, atol=1e-6)


def test_windows_of_missing_images_and_odd_resolutions_are_refused():
    sdata, grid = with_grid(he=image_element(random_image()))
    for px_per_bin in (0, 2.5, True):
        with pytest.raises(ValueError, match="`px_per_bin` must be a whole number"):
            grid.image_window(sdata, "he", px_per_bin=px_per_bin)
    with pytest.raises(KeyError, match="found he. Pass image_key"):
        grid.image_window(sdata, "stain", px_per_bin=1)
    set_transformation(sdata["he"], {"elsewhere": Identity()}, set_all=True)
    with pytest.raises(ValueError, match="share no coordinate system"):
        grid.image_window(sdata, "he", px_per_bin=1)


# -- maps ---------------------------------------------------------------------------------------------------------------
def test_get_map_takes_genes_in_order_without_computing():
    values = da.from_array(np.arange(24.0).reshape(3, 2, 4), chunks=(1, 2, 4))
    sdata = map_of(values, {"um": Identity()}, ["a", "b", "c"])
    chosen = get_map(sdata, "low", ["c", "a"])
    np.testing.assert_array_equal(chosen, np.arange(24.0).reshape(3, 2, 4)[[2, 0]])
    sdata["low"].data = unreadable(values)
    assert get_map(sdata, "low", ["c", "a"]).shape == (2, 2, 4)
    assert get_map(sdata, "low").shape == (3, 2, 4)


def test_get_map_says_what_is_wrong():
    sdata = map_of(np.ones((2, 4, 4)), {"um": Identity()}, ["a", "b"])
    with pytest.raises(KeyError, match=r"2 of 3 genes are not in the map 'low' \(x, y\); its channels are a, b"):
        get_map(sdata, "low", ["x", "a", "y"])
    with pytest.raises(KeyError, match="found low. Pass map_key="):
        get_map(sdata, "high")
    sdata["many"] = image_element(random_image(), scale_factors=[2])
    with pytest.raises(ValueError, match="no map of genes.*found several scales.*stgen.pp.rasterize"):
        get_map(sdata, "many")
    sdata["twins"] = image_element(np.ones((2, 4, 4)), c_coords=["a", "a"])
    with pytest.raises(ValueError, match="one name each; found a, a"):
        get_map(sdata, "twins")


def test_counts_of_maps_may_be_unknown_but_not_negative_or_infinite():
    np.testing.assert_array_equal(map_counts_checked(np.array([np.nan, 2.0]), "m"), [np.nan, 2.0])
    with pytest.raises(ValueError, match=r"m holds negative values \(down to -1\)"):
        map_counts_checked(np.array([np.nan, -1.0]), "m")
    with pytest.raises(ValueError, match="m holds infinite values"):
        map_counts_checked(np.array([np.inf]), "m")


# -- measurements ---------------------------------------------------------------------------------------------------------
def low_map(factor=4, offset=(0.0, 0.0), **kwargs):
    """A map of blocks of bins of 5 µm, and the grid of these bins."""
    values = np.random.default_rng(0).poisson(5.0, (2, 3, 4)).astype(np.float32)
    place = affine(5.0 * factor * np.eye(2), offset)
    return map_of(values, {"um": place}, **kwargs), Grid(12, 16, 5.0, {"um": Scale([5, 5], axes=XY)}), values


def test_a_map_measures_whole_blocks():
    sdata, grid, values = low_map()
    measured = measurement_of(sdata, "low", grid, ["g1", "g0"])
    assert (measured.footprints.shape, measured.footprints.diameter) == ("square", 4.0)
    np.testing.assert_array_equal(measured.counts, values[[1, 0]].reshape(2, -1).T)
    np.testing.assert_allclose(measured.footprints.centers[:5], [[2, 2], [2, 6], [2, 10], [2, 14], [6, 2]])
    np.testing.assert_array_equal(measured.footprints.area, 16.0)
    fine = np.repeat(np.repeat(values, 4, 1), 4, 2)[[1, 0]] / 16
    np.testing.assert_allclose(measured.footprints.pool(fine), measured.counts, rtol=1e-6)


def test_blocks_may_begin_at_any_bin():
    sdata, grid, _ = low_map(offset=(-10, 25))
    measured = measurement_of(sdata, "low", grid, ["g0"])
    np.testing.assert_allclose(measured.footprints.centers[0], [2 + 5, 2 - 2])


def test_the_area_comes_from_the_labels_and_unknown_blocks_are_left_out():
    sdata, grid, values = low_map()
    area = np.full((3, 4), 16, np.uint16)
    area[0, 0] = 7
    sdata["low_area"] = Labels2DModel.parse(area, dims=("y", "x"))
    known = values.copy()
    known[:, 1, 1] = np.nan
    sdata["low"].data = da.from_array(known)
    measured = measurement_of(sdata, "low", grid, ["g0"])
    assert len(measured.counts) == 11
    np.testing.assert_array_equal(measured.footprints.area, [7] + [16] * 10)
    sdata["low_area"] = Labels2DModel.parse(area[:2], dims=("y", "x"))
    with pytest.raises(ValueError, match=r"labels\['low_area'\] has the shape \(2, 4\)"):
        measurement_of(sdata, "low", grid, ["g0"])


def test_blocks_that_do_not_fit_the_grid_are_named():
    sdata, grid, _ = low_map(factor=2.5)
    with pytest.raises(
        ValueError, match=r"A bin of 'low' is 2.5 bins of the grid \(5 µm\) wide; it must be a whole block"
    ):
        measurement_of(sdata, "low", grid, ["g0"])
    sdata, grid, _ = low_map(factor=0.5)
    with pytest.raises(ValueError, match="is 0.5 bins of the grid"):
        measurement_of(sdata, "low", grid, ["g0"])
    sdata, grid, _ = low_map(offset=(2.0, 5.0))
    with pytest.raises(
        ValueError, match=r"upper left corner is at \(y, x\) = \(1, 0.4\) bins, not at a corner of a bin"
    ):
        measurement_of(sdata, "low", grid, ["g0"])
    sdata, grid, _ = low_map()
    set_transformation(sdata["low"], affine(20 * rotation(90), (100, 0)), "um")
    with pytest.raises(ValueError, match="is 4 bins of the grid.*turned or mirrored"):
        measurement_of(sdata, "low", grid, ["g0"])
    sdata, grid, _ = low_map(offset=(500, 500))
    with pytest.raises(ValueError, match="Nothing of 'low' was measured on the grid of 16 x 12 bins"):
        measurement_of(sdata, "low", grid, ["g0"])


def test_bad_counts_of_a_map_are_refused():
    for bad, message in ((-1.0, "negative values"), (np.inf, "infinite values")):
        sdata, grid, values = low_map()
        values[0, 0, 0] = bad
        sdata["low"].data = da.from_array(values)
        with pytest.raises(ValueError, match=f"The map 'low' holds {message}"):
            measurement_of(sdata, "low", grid, ["g0"])
    sdata["low"].data = da.full((2, 3, 4), np.nan)
    with pytest.raises(ValueError, match="it holds no values"):
        measurement_of(sdata, "low", grid, ["g0"])


def test_spots_measure_discs(sdata):
    grid = Grid.of_image(sdata, "he", bin_um=10)
    table = sdata["spot_counts"]
    measured = measurement_of(sdata, "spot_counts", grid, ["ACTB", "EPCAM"])
    assert measured.footprints.shape == "disc"
    assert measured.footprints.diameter == pytest.approx(5.5)
    np.testing.assert_array_equal(measured.counts, table[:, ["ACTB", "EPCAM"]].X.toarray())
    np.testing.assert_allclose(measured.footprints.centers, table.obsm["spatial"][:, ::-1] / 10)
    np.testing.assert_allclose(measured.footprints.area, np.pi * 2.75**2)


def test_spots_may_have_another_system_of_other_units(sdata):
    grid = Grid.of_image(sdata, "he", bin_um=10)
    expected = measurement_of(sdata, "spot_counts", grid, ["ACTB"])
    spots = sdata["spots"].copy()
    spots["geometry"] = spots.geometry.scale(4, 4, origin=(0, 0))
    spots["radius"] *= 4
    set_transformation(spots, Scale([0.25, 0.25], axes=XY), "um")
    sdata["spots"] = spots
    measured = measurement_of(sdata, "spot_counts", grid, ["ACTB"])
    np.testing.assert_allclose(measured.footprints.centers, expected.footprints.centers)
    assert measured.footprints.diameter == pytest.approx(expected.footprints.diameter)


def squares_table(side=8.0, n=5, turn=0.0, growth=0.0):
    row, column = np.divmod(np.arange(n * n), n)
    frame = gpd.GeoDataFrame(
        geometry=[
            box(side * j, side * i, side * (j + 1) + growth * i, side * (i + 1))
            for i, j in zip(row, column, strict=True)
        ]
    )
    sdata = SpatialData(shapes={"squares": ShapesModel.parse(frame, transformations={"um": affine(rotation(turn))})})
    counts = np.random.default_rng(0).poisson(4, (n * n, 2)).astype(np.float32)
    write_table(sdata, "bins", AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=["a", "b"])), region="squares")
    return sdata, Grid(2 * n, 2 * n, side / 2, {"um": Scale([side / 2, side / 2], axes=XY)}), counts


def test_squares_that_tile_the_plane_measure_blocks():
    sdata, grid, counts = squares_table()
    measured = measurement_of(sdata, "bins", grid, ["a", "b"])
    assert (measured.footprints.shape, measured.footprints.diameter) == ("square", 2.0)
    np.testing.assert_array_equal(measured.footprints.area, 4.0)
    fine = counts.T.reshape(2, 5, 5).repeat(2, 1).repeat(2, 2) / 4
    np.testing.assert_allclose(measured.footprints.pool(fine), counts, rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{"turn": 10}, {"growth": 1}])
def test_other_polygons_are_refused(kwargs):
    sdata, grid, _ = squares_table(**kwargs)
    with pytest.raises(
        ValueError, match="neither circles of one size nor squares of one size along the grid.*rasterize"
    ):
        measurement_of(sdata, "bins", grid, ["a"])


def test_what_is_missing_is_named(sdata):
    grid = Grid.of_image(sdata, "he", bin_um=10)
    with pytest.raises(KeyError, match=r"no map or table 'x'; the images are he, the tables cell_counts, spot_counts"):
        measurement_of(sdata, "x", grid, ["ACTB"])
    with pytest.raises(KeyError, match=r"1 of 2 genes are not in the table \(NOPE\)"):
        measurement_of(sdata, "spot_counts", grid, ["ACTB", "NOPE"])
    with pytest.raises(ValueError, match="'cells', which are neither circles of one size"):
        measurement_of(sdata, "cell_counts", grid, ["ACTB"])
    table = sdata["spot_counts"]
    table.X[0, 0] = -1
    with pytest.raises(ValueError, match="negative values"):
        measurement_of(sdata, "spot_counts", grid, list(table.var_names))
    set_transformation(sdata["spots"], {"elsewhere": Identity()}, set_all=True)
    with pytest.raises(ValueError, match="share no coordinate system"):
        measurement_of(sdata, "spot_counts", grid, ["ACTB"])


def test_a_table_without_a_region_measures_nothing(sdata):
    loose = TableModel.parse(AnnData(np.ones((3, 1), np.float32), var=pd.DataFrame(index=["ACTB"])))
    sdata["loose"] = loose
    with pytest.raises(ValueError, match="'loose' annotates no element"):
        measurement_of(sdata, "loose", Grid.of_image(sdata, "he", bin_um=10), ["ACTB"])
