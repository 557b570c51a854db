"""Masks read on a grid of bins."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Affine, Identity, Scale, Translation
from spatialdata.transformations import Sequence as Chain

from stgen._spatial.grid import Grid
from stgen._spatial.labels import LabelsWindow, finest_mask, labels_window

GRID = (9, 12)  # bins


def mask_of(height, width, seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((height, width)) < share, rng.integers(1, 2**20, (height, width)), 0)


def affine(matrix):
    return Affine(np.asarray(matrix, float), ("x", "y"), ("x", "y"))


def section(mask, transformation, system="um", **kwargs):
    element = Labels2DModel.parse(mask, dims=("y", "x"), transformations={system: transformation}, **kwargs)
    return SpatialData(labels={"nuclei": element})


def grid(height=GRID[0], width=GRID[1], bin_um=10.0, offset=(0.0, 0.0)):
    to_um = Chain([Scale([bin_um, bin_um], axes=("x", "y")), Translation(list(offset), axes=("x", "y"))])
    return Grid(height, width, bin_um, {"um": to_um})


def by_brute_force(mask, to_um, grid, window, px):
    """Each pixel in plain numbers: of four places, brought to µm and from there to the mask, how many are labeled."""
    y0, x0, height, width = window
    from_um = np.linalg.inv(np.asarray(to_um, float))
    bins_to_um = grid.to_system("um")
    found = np.zeros((height * px, width * px))
    for i, j in np.ndindex(found.shape):
        for a in (0.25, 0.75):
            for b in (0.25, 0.75):
                um = bins_to_um @ [x0 + (j + b) / px, y0 + (i + a) / px, 1]
                column, row = np.floor((from_um @ um)[:2]).astype(int)
                if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]:
                    found[i, j] += 0.25 * (mask[row, column] > 0)
    return found[None]


TURN = np.deg2rad(25)
PLACES = {  # mask of 90 x 120 pixels (or so), to µm: the grid is 90 x 120 µm
    "identity": ((90, 120), np.eye(3)),
    "finer": ((180, 240), np.diag([0.5, 0.5, 1])),
    "coarser": ((30, 40), np.diag([3, 3, 1])),
    "rotated": ((120, 90), [[0, 1, 0], [-1, 0, 90], [0, 0, 1]]),
    "mirrored": ((90, 120), [[-1, 0, 120], [0, 1, 0], [0, 0, 1]]),
    "transposed": ((120, 90), [[0, 1, 0], [1, 0, 0], [0, 0, 1]]),
    "turned": ((100, 100), [[np.cos(TURN), -np.sin(TURN), 30], [np.sin(TURN), np.cos(TURN), -13], [0, 0, 1]]),
    "turned and mirrored": ((70, 80), [[1.2, 0.9, -20.3], [0.9, -1.2, 60.1], [0, 0, 1]]),
    "shifted beyond": ((90, 120), [[1, 0, 37.3], [0, 1, -24.7], [0, 0, 1]]),
}  # fmt: skip


@pytest.mark.parametrize("px", [1, 3, 4])
@pytest.mark.parametrize("place", PLACES)
def test_share_that_is_labeled_by_brute_force(place, px):
    shape, to_um = PLACES[place]
    mask = mask_of(*shape)
    moved = np.array(to_um, float)
    moved[:2, 2] += 0.013, 0.029  # no place falls on the border of two pixels
    window = labels_window(section(mask, affine(moved)), "nuclei", grid(), px_per_bin=px)
    assert (window.px_per_bin, window.n_channels) == (px, 1)
    for at in ((0, 0, *GRID), (2, 5, 4, 3), (-3, -2, 6, 5), (7, 9, 4, 6)):
        found = window(*at)
        np.testing.assert_allclose(found, by_brute_force(mask, moved, grid(), at, px), atol=1e-7)
        assert found.dtype == np.float32
    assert 0.1 < window(0, 0, *GRID).mean() < 0.5


def test_pixels_of_the_mask_are_counted():
    """Where two mask pixels lie along each side of one that is read, the share is that of the four."""
    mask = mask_of(18, 24)
    window = labels_window(section(mask, Scale([5, 5], axes=("x", "y"))), "nuclei", grid(), px_per_bin=1)
    expected = (mask > 0).reshape(9, 2, 12, 2).mean((1, 3))
    np.testing.assert_array_equal(window(0, 0, *GRID)[0], expected)
    np.testing.assert_array_equal(window(3, 2, 4, 5)[0], expected[3:7, 2:7])


def test_numbers_of_labels_do_not_matter():
    mask = mask_of(90, 120)
    windows = [
        labels_window(section(m, Identity()), "nuclei", grid(), px_per_bin=2) for m in (mask, (mask > 0).astype(int))
    ]
    assert np.array_equal(*(window(0, 0, *GRID) for window in windows))


def test_grid_of_its_own():
    """The grid begins elsewhere, and has bins of another size."""
    mask = mask_of(90, 120)
    own = grid(20, 30, 2.0, offset=(31.2, 17.4))
    window = labels_window(section(mask, Identity()), "nuclei", own, px_per_bin=2)
    for at in ((0, 0, 20, 30), (5, 7, 3, 3)):
        np.testing.assert_allclose(window(*at), by_brute_force(mask, np.eye(3), own, at, 2), atol=1e-7)


@pytest.mark.parametrize("px", [1, 3, 4, 5])
@pytest.mark.parametrize("place", [*PLACES, "on the borders"])
def test_bin_is_the_same_in_whatever_window_it_is_read(place, px):
    """Also where places that are looked at lie on the borders of the mask's pixels."""
    shape, to_um = PLACES.get(place, ((90 * px // 2, 60 * px), np.diag([2 / px, 2 / px, 1])))
    window = labels_window(section(mask_of(*shape), affine(to_um)), "nuclei", grid(), px_per_bin=px)
    whole = window(-2, -2, GRID[0] + 4, GRID[1] + 4)
    for y, x, height, width in ((0, 0, 9, 12), (1, 3, 5, 2), (7, 11, 1, 1), (-2, 4, 3, 10)):
        part = whole[:, (y + 2) * px : (y + 2 + height) * px, (x + 2) * px : (x + 2 + width) * px]
        np.testing.assert_array_equal(window(y, x, height, width), part)


def test_beyond_the_mask_nothing_is_labeled():
    window = labels_window(section(np.ones((90, 120), int), Identity()), "nuclei", grid(), px_per_bin=2)
    found = window(-4, -3, 20, 20)[0]
    inside = np.zeros_like(found)
    inside[8:26, 6:30] = 1
    np.testing.assert_array_equal(found, inside)
    far = window(100, 100, 3, 4)
    assert far.shape == (1, 6, 8)
    assert not far.any()


def test_only_what_is_needed_is_read():
    """A window into a large mask reads its part of it."""

    class Counting:
        dims, dtype, shape = ("y", "x"), np.dtype(int), (100_000, 100_000)

        def __getitem__(self, at):
            self.read = tuple(s.stop - s.start for s in at)
            return type("Part", (), {"data": np.ones(self.read, int)})

    mask = Counting()
    assert (LabelsWindow(mask, np.diag([10.0, 10, 1]), 2)(500, 700, 4, 6) == 1).all()
    assert all(n <= limit for n, limit in zip(mask.read, (40, 60), strict=True))


# ---- what a mask may be ---------------------------------------------------------------------------------------------


def test_the_finest_of_several_scales_is_read():
    mask = np.kron(mask_of(45, 60), np.ones((2, 2), int))
    mask[::2] = 0  # which the coarser level does not know
    sdata = section(mask, Identity(), scale_factors=[2])
    np.testing.assert_array_equal(finest_mask(sdata["nuclei"], "nuclei"), mask)
    found = labels_window(sdata, "nuclei", grid(), px_per_bin=5)(0, 0, *GRID)
    plain = labels_window(section(mask, Identity()), "nuclei", grid(), px_per_bin=5)(0, 0, *GRID)
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(found[0], (mask > 0).reshape(45, 2, 60, 2).mean((1, 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_any_whole_numbers(dtype):
    mask = (mask_of(90, 120) > 0).astype(dtype)
    found = labels_window(section(mask, Identity()), "nuclei", grid(), px_per_bin=2)(0, 0, *GRID)
    np.testing.assert_allclose(found, by_brute_force(mask, np.eye(3), grid(), (0, 0, *GRID), 2))


def test_axes_may_be_exchanged():
    mask = mask_of(90, 120)
    element = section(mask, Identity())["nuclei"]
    np.testing.assert_array_equal(finest_mask(element.transpose("x", "y"), "nuclei"), mask)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_missing_labels():
    sdata = section(mask_of(90, 120), Identity())
    with pytest.raises(KeyError, match=r"There is no mask in sdata.labels 'nuclie'; found nuclei\. Pass labels_key="):
        labels_window(sdata, "nuclie", grid(), px_per_bin=2)
    with pytest.raises(KeyError, match="no mask in sdata.labels 'nuclei'"):
        labels_window(SpatialData(), "nuclei", grid(), px_per_bin=2)


def test_an_image_is_no_mask():
    image = Image2DModel.parse(np.zeros((1, 90, 120)), dims=("c", "y", "x"), transformations={"um": Identity()})
    sdata = section(mask_of(90, 120), Identity())
    sdata.images["he"] = image
    with pytest.raises(KeyError, match="There is no mask in sdata.labels 'he'; found nuclei"):
        labels_window(sdata, "he", grid(), px_per_bin=2)
    with pytest.raises(TypeError, match=r"'he' must hold whole numbers with the dimensions y, x; found float64 with"):
        finest_mask(image, "he")


def test_shares_are_no_labels():
    sdata = section(mask_of(90, 120), Identity())
    sdata["nuclei"].data = sdata["nuclei"].data / 2.0
    with pytest.raises(TypeError, match="'nuclei' must hold whole numbers with the dimensions y, x; found float64"):
        labels_window(sdata, "nuclei", grid(), px_per_bin=2)


def test_pixels_must_be_square():
    sdata = section(mask_of(90, 120), Scale([1, 2], axes=("x", "y")))
    with pytest.raises(ValueError, match="stretches x by 1 and y by 2; pixels must be square"):
        labels_window(sdata, "nuclei", grid(), px_per_bin=2)


def test_no_shared_coordinate_system():
    sdata = section(mask_of(90, 120), Identity(), system="elsewhere")
    with pytest.raises(
        ValueError, match=r"The grid and 'nuclei' share no coordinate system \(the grid: um; 'nuclei': els"
    ):
        labels_window(sdata, "nuclei", grid(), px_per_bin=2)


@pytest.mark.parametrize("shift", [(120, 0), (0, -90), (5000, 5000)])
def test_no_overlap(shift):
    sdata = section(mask_of(90, 120), Translation(list(shift), axes=("x", "y")))
    message = (
        r"the labels 'nuclei' \(90 x 120 pixels\) and the map do not overlap in the coordinate system 'um'.*segment_nuc"
    )
    with pytest.raises(ValueError, match=message):
        labels_window(sdata, "nuclei", grid(), px_per_bin=2)


@pytest.mark.parametrize(("shift", "percent"), [(30, 75), (100, 17), (13, 89), (11, None), (0, None), (-12, None)])
def test_partial_overlap_is_warned_about(shift, percent, caplog):
    sdata = section(mask_of(90, 120), Translation([shift, 0], axes=("x", "y")))
    with caplog.at_level("WARNING", "stgen"):
        labels_window(sdata, "nuclei", grid(), px_per_bin=2)
    messages = [f"the labels 'nuclei' cover {percent} % of the map; beyond them there are none."] if percent else []
    assert [record.getMessage() for record in caplog.records] == messages


def test_mask_that_is_larger_than_the_map(caplog):
    mask = mask_of(300, 300)
    window = labels_window(section(mask, Translation([-50, -60], axes=("x", "y"))), "nuclei", grid(), px_per_bin=5)
    assert not caplog.records
    expected = (mask[60:150, 50:170] > 0).reshape(45, 2, 60, 2).mean((1, 3))
    np.testing.assert_array_equal(window(0, 0, *GRID)[0], expected)
