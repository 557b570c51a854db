"""What was measured, and where a map has values: bins drawn as circles, bare glass, pixels that are not square."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, get_transformation

from stgen import datasets, tl
from stgen._spatial.grid import Grid
from stgen._spatial.image import affine_to
from stgen._spatial.measured import footprints_of
from stgen._spatial.section import Locations


def located(key, turn=0.0, side=16.0):
    y, x = (np.mgrid[:6, :6].reshape(2, -1) + 0.5) * side
    turned = np.column_stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)])
    circles = gpd.GeoDataFrame({"radius": np.full(36, side / 2)}, geometry=shapely.points(turned))
    element = ShapesModel.parse(circles, transformations={"um": Identity()})
    return Locations(key, element, "um", turned, side)


def grid():
    return Grid(
        bin_um=4.0,
        height=24,
        width=24,
        transformations={"um": Affine(np.diag([4.0, 4.0, 1.0]), ("x", "y"), ("x", "y"))},
    )


@pytest.mark.parametrize("key", ["square_016um", "mouse_square_016um"])
def test_bins_drawn_as_circles_measured_squares(key):
    footprints = footprints_of(located(key), "hd", grid())
    assert (footprints.shape, footprints.blocks) == ("square", 4)
    np.testing.assert_allclose(footprints.area, 16)


def test_bins_drawn_as_circles_that_are_turned_measured_the_same_area():
    footprints = footprints_of(located("square_016um", 0.3), "hd", grid())
    np.testing.assert_allclose([footprints.size, *footprints.area], 16)


def test_spots_measured_discs():
    footprints = footprints_of(located("spots"), "spots", grid())
    assert footprints.shape == "disc"
    np.testing.assert_allclose(footprints.area, 4 * np.pi)


@pytest.mark.parametrize(
    "matrix", [[[1, 0.25], [0.25, 1]], [[1, -0.25], [-0.25, 1]], [[0, 2], [1, 0]], [[1, 0.3], [0, 1]]]
)
def test_stretched_pixels_are_refused_whatever_the_direction(matrix):
    whole = np.eye(3)
    whole[:2, :2] = matrix
    image = Image2DModel.parse(
        np.ones((3, 8, 8), np.uint8),
        dims=("c", "y", "x"),
        transformations={"um": Affine(whole, ("x", "y"), ("x", "y"))},
    )
    with pytest.raises(ValueError, match="pixels must be square"):
        affine_to(image, "um")


def test_bare_glass_has_no_values_but_what_was_measured_there():
    full = datasets.simulated_section(seed=1, size_um=900, mpp=2.0, n_genes=2)
    pixels = full["he"].values.copy()
    pixels[:, :, 250:] = 243  # from 500 µm on
    transformations = get_transformation(full["he"], get_all=True)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list("rgb"), transformations=transformations)
    x = full["spots"].geometry.x.to_numpy()
    kept = (x < 500) | (x > 800)  # some were measured on glass
    parts = {"spots": full["spots"][kept]}, {"spot_counts": full["spot_counts"][kept].copy()}
    section = SpatialData(images={"he": image}, shapes=parts[0], tables=parts[1])
    tl.superresolve(section, "he", low_res="spot_counts", bin_um=10, n_samples=1, progress=False)
    known = np.isfinite(np.asarray(section["superresolved"].data)[0])
    assert not known[:, 56:75].any()
    assert known[10:-10, 10:40].mean() > 0.9
    on_glass = parts[0]["spots"].geometry[x[kept] > 800]
    centers = np.column_stack([on_glass.y, on_glass.x]).astype(int) // 10
    inside = (centers < np.array(known.shape)).all(1)
    assert known[tuple(centers[inside].T)].all()
    discs = shapely.union_all(on_glass.buffer(28).to_numpy())
    rows, columns = np.nonzero(known[:, 76:])
    assert (shapely.distance(discs, shapely.points((columns + 76.5) * 10, (rows + 0.5) * 10)) < 8).all()
