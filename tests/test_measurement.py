from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shapely import Point, box

from stgen.data import dihedral
from stgen.measurement import MOST_SCALED, Consistency, Footprints, Measurement

KERNELS = ["gaussian", "nearest", "linear", "cubic"]


def low_map(height=4, width=6, n_genes=2, seed=0):
    return np.random.default_rng(seed).gamma(0.7, 9.0, (n_genes, height, width)).astype(np.float32)


def hexagon(pitch, height, width, margin=0.0):
    """Centers of spots on a hexagonal grid, at no special place of the bins."""
    rows = np.arange(margin + 0.313, height - margin, pitch * 3**0.5 / 2)
    columns = np.arange(margin + 0.171, width, pitch)
    centers = [(y, x + pitch / 2 * (i % 2)) for i, y in enumerate(rows) for x in columns]
    return np.array([(y, x) for y, x in centers if x <= width - margin])


def discs(centers, diameter, counts=None, seed=0):
    centers = np.asarray(centers, float)
    if counts is None:
        counts = np.random.default_rng(seed).gamma(0.7, 20.0, (len(centers), 2))
    area = np.full(len(centers), np.pi * diameter**2 / 4)
    return Measurement(Footprints(centers, diameter, "disc", area), np.asarray(counts, np.float32))


# ---- footprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["square", "disc"])
def test_coverage_is_the_area_of_the_intersection(shape):
    rng = np.random.default_rng(1)
    diameter = 3.7
    centers = rng.uniform(diameter, 12 - diameter, (6, 2))
    measurement = Measurement(Footprints(centers, diameter, shape, np.ones(6)), np.zeros((6, 1)))
    rows, covered = measurement.footprints.coverage(0, 0, 12, 12)
    assert rows.tolist() == list(range(6))
    for (y, x), share in zip(centers, covered.toarray().reshape(6, 12, 12), strict=True):
        whole = Point(x, y).buffer(diameter / 2, quad_segs=64)
        if shape == "square":
            whole = box(x - diameter / 2, y - diameter / 2, x + diameter / 2, y + diameter / 2)
        exact = [[whole.intersection(box(j, i, j + 1, i + 1)).area for j in range(12)] for i in range(12)]
        np.testing.assert_allclose(share, exact, atol=1e-6 if shape == "square" else 0.05)


@pytest.mark.parametrize("diameter", [2.0, 3.3, 5.5, 11.0])
def test_area_of_a_disc(diameter):
    centers = np.random.default_rng(0).uniform(diameter, 30 - diameter, (20, 2))
    _, covered = discs(centers, diameter).footprints.coverage(0, 0, 30, 30)
    area = covered.sum(1)
    assert area.mean() == pytest.approx(np.pi * diameter**2 / 4, rel=0.01)
    np.testing.assert_allclose(area, np.pi * diameter**2 / 4, rtol=0.01 + 0.1 / diameter**2)


def test_area_of_a_square_is_exact_wherever_it_lies():
    centers = np.random.default_rng(0).uniform(3, 17, (20, 2))
    _, covered = Measurement(Footprints(centers, 4.6, "square", np.ones(20)), np.zeros((20, 1))).footprints.coverage(
        0, 0, 20, 20
    )
    np.testing.assert_allclose(covered.sum(1), 4.6**2, rtol=1e-5)


def test_coverage_is_of_footprints_wholly_inside():
    measurement = Measurement.from_map(low_map(4, 6), factor=3)
    rows, covered = measurement.footprints.coverage(3, 2, 7, 11)  # of the low bins, rows 1 and 2 and columns 1 to 3
    assert rows.tolist() == [7, 8, 9, 13, 14, 15]
    assert covered.shape == (6, 77)
    np.testing.assert_array_equal(covered.sum(1), 9)
    assert set(covered.data) == {1.0}
    rows, covered = measurement.footprints.coverage(0, 0, 2, 2)
    assert (len(rows), covered.shape) == (0, (0, 4))


@pytest.mark.parametrize("shape", ["square", "disc"])
def test_coverage_moves_with_the_window(shape):
    measurement = Measurement(Footprints(np.array([[8.3, 9.6]]), 4.4, shape, np.ones(1)), np.zeros((1, 1)))
    whole = measurement.footprints.coverage(0, 0, 16, 16)[1].toarray().reshape(16, 16)
    part = measurement.footprints.coverage(-2, 5, 14, 9)[1].toarray().reshape(14, 9)
    np.testing.assert_array_equal(part[2:], whole[:12, 5:14])
    np.testing.assert_array_equal(part[:2], 0)


@pytest.mark.parametrize("shape", ["square", "disc"])
def test_many_footprints_are_taken_some_at_a_time(shape, monkeypatch):
    centers = np.random.default_rng(0).uniform(3, 27, (20, 2))
    measurement = Measurement(Footprints(centers, 4.5, shape, np.ones(20)), np.zeros((20, 1)))
    rows, covered = measurement.footprints.coverage(0, 0, 30, 30)
    monkeypatch.setattr("stgen.measurement.AT_A_TIME", 7)
    np.testing.assert_array_equal(measurement.footprints.coverage(0, 0, 30, 30)[0], rows)
    np.testing.assert_array_equal(measurement.footprints.coverage(0, 0, 30, 30)[1].toarray(), covered.toarray())


def test_pooling_sums_the_covered_shares():
    measurement = Measurement(Footprints(np.array([[2.0, 3.5]]), 3.0, "square", np.ones(1)), np.zeros((1, 2)))
    counts = np.random.default_rng(0).poisson(4.0, (2, 6, 7)).astype(float)
    rows, columns = np.array([0.5, 1, 1, 0.5, 0, 0]), np.array([0, 0, 1, 1, 1, 0, 0])
    expected = (counts * rows[:, None] * columns).sum((1, 2))
    np.testing.assert_allclose(measurement.footprints.pool(counts), expected[None], rtol=1e-6)
    counts[:, 2, 3] = np.nan  # nothing is known there
    np.testing.assert_allclose(measurement.footprints.pool(counts), measurement.footprints.pool(np.nan_to_num(counts)))


def test_pooling_beyond_the_map_finds_nothing():
    measurement = Measurement.from_map(low_map(3, 3), factor=4)
    pooled = measurement.footprints.pool(np.ones((2, 10, 7))).reshape(3, 3, 2)
    expected = np.array([4, 4, 2])[:, None] * np.array([4, 3, 0])
    np.testing.assert_allclose(pooled, expected[..., None] * np.ones(2))


def test_squares_that_tile_the_plane_keep_every_count():
    counts = np.random.default_rng(0).poisson(1.0, (3, 12, 20))
    measurement = Measurement.from_map(np.zeros((3, 3, 5)), factor=4)
    assert measurement.footprints.pool(counts).sum(0).tolist() == counts.sum((1, 2)).tolist()


def test_from_map_leaves_out_what_was_not_measured():
    low = low_map(2, 3)
    low[1, 0, 2] = np.nan  # one gene is enough
    area = np.array([[16, 16, 16], [8, 0, 12]])
    measurement = Measurement.from_map(low, 4, area)
    assert measurement.footprints.centers.tolist() == [[2, 2], [2, 6], [6, 2], [6, 10]]
    assert measurement.footprints.area.tolist() == [16, 16, 8, 12]
    np.testing.assert_array_equal(measurement.counts, low[:, [0, 0, 1, 1], [0, 1, 0, 2]].T)
    np.testing.assert_allclose(measurement.density[2], low[:, 1, 0] / 8)
    assert (
        len(measurement),
        measurement.footprints.pitch,
        measurement.footprints.diameter,
        measurement.footprints.shape,
    ) == (4, 4.0, 4.0, "square")


def test_pitch_of_spots():
    assert discs(hexagon(10.0, 60, 60), 5.5).footprints.pitch == pytest.approx(10)
    assert discs([[5, 5]], 5.5).footprints.pitch == 5.5  # one spot alone


def test_same_footprints_other_counts():
    measurement = discs(hexagon(10.0, 40, 40), 5.5)
    other = measurement.with_counts(measurement.counts[:, :1] + 1)
    assert other.counts.shape == (len(measurement), 1)
    np.testing.assert_array_equal(
        other.footprints.coverage(0, 0, 40, 40)[1].toarray(), measurement.footprints.coverage(0, 0, 40, 40)[1].toarray()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.zeros(3)}, r"do not fit together: found shape \(3,\)"),
        ({"centers": np.zeros((2, 2))}, "do not fit together"),
        ({"area": np.ones((3, 1))}, "do not fit together"),
        ({"counts": np.array([[1.0], [-1.0], [0.0]])}, "finite and not negative"),
        ({"counts": np.array([[1.0], [np.nan], [0.0]])}, "finite and not negative"),
        ({"counts": np.array([[1.0], [np.inf], [0.0]])}, "finite and not negative"),
    ],
)
def test_refused(changes, message):
    content = {"counts": np.zeros((3, 1)), "centers": np.zeros((3, 2)), "area": np.ones(3), **changes}
    with pytest.raises(ValueError, match=message):
        Measurement(Footprints(content["centers"], 2.0, "disc", content["area"]), content["counts"])


# ---- interpolation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 10])
def test_nearest_interpolation_then_pooling_is_the_identity(factor):
    low = low_map()
    low[:, 1, 2] = np.nan
    measurement = Measurement.from_map(low, factor)
    fine, _ = measurement.interpolate(0, 0, 4 * factor, 6 * factor, "nearest")
    np.testing.assert_allclose(measurement.footprints.pool(fine), measurement.counts, rtol=1e-5, atol=1e-6)


def test_and_so_it_is_where_the_section_ends_inside_a_bin():
    low, (height, width) = low_map(3, 3), (10, 7)
    area = np.array([4, 4, 2])[:, None] * np.array([4, 3, 0])
    measurement = Measurement.from_map(low, 4, area)
    fine, _ = measurement.interpolate(0, 0, height, width, "nearest")
    np.testing.assert_allclose(measurement.footprints.pool(fine), measurement.counts, rtol=1e-5)


@pytest.mark.parametrize("factor", [2, 5])
@pytest.mark.parametrize(("kernel", "mode"), [("nearest", "nearest"), ("linear", "bilinear")])
def test_on_a_lattice_it_is_what_image_libraries_do(kernel, mode, factor):
    low = low_map()
    fine, valid = Measurement.from_map(low * factor**2, factor).interpolate(0, 0, 4 * factor, 6 * factor, kernel)
    expected = F.interpolate(torch.as_tensor(low)[None], scale_factor=factor, mode=mode)[0]
    np.testing.assert_allclose(fine, expected, rtol=1e-4, atol=1e-5)
    assert (valid == 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_is_reproduced(kernel):
    squares = Measurement.from_map(np.full((1, 5, 5), 3.0 * 16), factor=4, area=None)
    fine, valid = squares.interpolate(-2, 1, 20, 15, kernel)
    assert (valid[0, 2:] == 1).all()
    np.testing.assert_allclose(fine[0, 2:], 3, rtol=1e-5)
    spots = discs(hexagon(8.0, 40, 40), 5.5)
    spots = spots.with_counts(3 * spots.footprints.area[:, None])
    fine, valid = spots.interpolate(5, 5, 30, 30, kernel)
    reached = fine > 0 if kernel == "nearest" else valid == 1  # squares around hexagonal spots leave gaps
    assert reached.mean() > 0.8
    np.testing.assert_allclose(fine[reached], 3, rtol=1e-5)


def test_parts_of_bins_count_by_what_they_measured():
    """Half a bin with half of the counts is as dense as the others."""
    area = np.full((3, 4), 16.0)
    area[:, 3] = [8, 4, 2]
    for kernel in KERNELS:
        fine, _ = Measurement.from_map(2 * area[None], 4, area).interpolate(0, 0, 12, 16, kernel)
        np.testing.assert_allclose(fine, 2, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "power"), [("linear", 1), ("cubic", 1), ("cubic", 2)])
def test_ramps_are_reproduced(kernel, power):
    factor, n = 4, 8
    center = (np.arange(n) + 0.5) * factor
    low = ((center[:, None] ** power + 1) * (2 * center**power + 3) * factor**2)[None]
    margin = 2 * factor
    fine, _ = Measurement.from_map(low, factor).interpolate(margin, margin, 16, 16, kernel)
    bins = margin + np.arange(16) + 0.5
    np.testing.assert_allclose(fine[0], (bins[:, None] ** power + 1) * (2 * bins**power + 3), rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spots", [False, True])
def test_windows_that_overlap_agree(kernel, spots):
    measurement = discs(hexagon(9.0, 60, 60), 5.5) if spots else Measurement.from_map(low_map(8, 8), factor=6)
    whole, valid = measurement.interpolate(-12, -7, 70, 72, kernel)
    for y, x, height, width in [(-12, -7, 5, 9), (3, 10, 20, 20), (40, 50, 18, 15), (30, 0, 1, 1)]:
        part = measurement.interpolate(y, x, height, width, kernel)
        inside = np.s_[:, y + 12 : y + 12 + height, x + 7 : x + 7 + width]
        np.testing.assert_allclose(part[0], whole[inside], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(part[1], valid[inside])


def turned(measurement, side, view):
    """The footprints after :func:`stgen.data.dihedral` of a square section."""
    y, x = measurement.footprints.centers.T
    x = side - x if view >= 4 else x
    for _ in range(view % 4):
        y, x = side - x, y
    footprints = dataclasses.replace(measurement.footprints, centers=np.column_stack([y, x]))
    return Measurement(footprints, measurement.counts)


@pytest.mark.parametrize("view", range(8))
@pytest.mark.parametrize("spots", [False, True])
def test_turns_and_mirrors_with_the_data(view, spots):
    side = 30
    measurement = discs(hexagon(9.0, side, side), 5.5) if spots else Measurement.from_map(low_map(5, 5), factor=6)
    other = turned(measurement, side, view)
    if not spots:
        low = dihedral(torch.as_tensor(low_map(5, 5)), view).numpy()
        again = Measurement.from_map(low, 6)
        order = np.lexsort(other.footprints.centers.T[::-1])
        np.testing.assert_allclose(other.footprints.centers[order], again.footprints.centers)
        np.testing.assert_array_equal(other.counts[order], again.counts)
    for kernel in KERNELS:
        for a, b in zip(
            measurement.interpolate(0, 0, side, side, kernel), other.interpolate(0, 0, side, side, kernel), strict=True
        ):
            np.testing.assert_allclose(dihedral(torch.as_tensor(a), view), b, rtol=1e-4, atol=1e-5)


def test_nothing_is_known_far_from_every_footprint():
    fine, valid = discs([[10, 10], [10, 18]], 5.5).interpolate(0, 0, 20, 60)
    assert valid[0, 10, 10] == valid[0, 10, 18] == 1
    assert (valid[0, :, 30:] == 0).all()
    assert (fine[:, valid[0] == 0] == 0).all()
    assert (fine[:, valid[0] == 1] > 0).all()
    for values in Measurement(Footprints(np.zeros((0, 2)), 5.5, "disc", np.zeros(0)), np.zeros((0, 2))).interpolate(
        0, 0, 4, 4
    ):
        assert (values == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_density_is_never_negative(kernel):
    low = np.zeros((1, 6, 6))
    low[0, 2:4, 2:4] = 1e4  # a cubic kernel undershoots beside an edge
    assert Measurement.from_map(low, 4).interpolate(0, 0, 24, 24, kernel)[0].min() >= 0


# ---- consistency ----------------------------------------------------------------------------------------------------

SIDE = 24
PLACES = {
    "squares": lambda: Measurement.from_map(np.zeros((2, 4, 4)), factor=6),
    "discs": lambda: discs(hexagon(8.0, SIDE, SIDE, margin=3.2), 5.5),
    "overlapping discs": lambda: discs(hexagon(5.0, SIDE, SIDE, margin=4), 6.5),
}


def prediction(n_samples=2, n_genes=2, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).gamma(0.5, 2.0, (n_samples, n_genes, SIDE, SIDE))).float()


def measured(kind, seed=9):
    """What the footprints of that kind would measure of some map."""
    measurement = PLACES[kind]()
    truth = np.random.default_rng(seed).gamma(0.5, 1.5, (2, SIDE, SIDE))
    measurement = measurement.with_counts(measurement.footprints.pool(truth))
    assert (
        len(measurement.footprints.coverage(0, 0, SIDE, SIDE)[0]) == len(measurement) > 3
    )  # none is cut by the window
    return measurement


def pooled(measurement, counts):
    return np.stack([measurement.footprints.pool(sample.numpy()) for sample in counts])


@pytest.mark.parametrize("kind", PLACES)
def test_pooled_is_what_was_measured(kind):
    measurement = measured(kind)
    agree = Consistency(measurement, 0, 0, SIDE, SIDE)
    x = agree(prediction())
    assert x.shape == (2, 2, SIDE, SIDE)
    assert (x >= 0).all()
    np.testing.assert_allclose(pooled(measurement, x), np.stack([measurement.counts] * 2), rtol=3e-4)
    assert agree.disjoint == (kind == "squares" or kind == "discs")


@pytest.mark.parametrize("kind", PLACES)
def test_a_map_that_agrees_is_left_as_it_is(kind):
    agree = Consistency(measured(kind), 0, 0, SIDE, SIDE)
    x = agree(prediction())
    torch.testing.assert_close(agree(x), x, rtol=3e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PLACES)
def test_bins_in_no_footprint_are_left_as_they_are(kind):
    measurement = measured(kind)
    outside = measurement.footprints.coverage(0, 0, SIDE, SIDE)[1].sum(0).reshape(SIDE, SIDE) == 0
    assert outside.any() == (kind != "squares")
    counts = prediction()
    x = Consistency(measurement, 0, 0, SIDE, SIDE)(counts)
    torch.testing.assert_close(x[:, :, outside], counts[:, :, outside], rtol=0, atol=0)


def test_proportions_within_a_footprint_are_kept():
    counts = prediction()
    x = Consistency(measured("squares"), 0, 0, SIDE, SIDE)(counts)
    ratio = (x / counts).unflatten(3, (4, 6)).unflatten(2, (4, 6)).transpose(3, 4).flatten(4)  # (S, G, 4, 4, 36)
    large = counts.unflatten(3, (4, 6)).unflatten(2, (4, 6)).transpose(3, 4).flatten(4) > 0.1
    middle = ratio.median(-1, keepdim=True).values.expand_as(ratio)
    torch.testing.assert_close(ratio[large], middle[large], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", PLACES)
def test_samples_and_genes_do_not_see_each_other(kind):
    measurement = measured(kind)
    counts = prediction(n_samples=3)
    together = Consistency(measurement, 0, 0, SIDE, SIDE)(counts)
    for gene in range(2):
        alone = Consistency(measurement.with_counts(measurement.counts[:, [gene]]), 0, 0, SIDE, SIDE)
        torch.testing.assert_close(alone(counts[1:2, [gene]]), together[1:2, [gene]], rtol=1e-3, atol=1e-4)


def test_counts_of_any_precision():
    measurement = measured("discs")
    double = Measurement(
        Footprints(measurement.footprints.centers, 5.5, "disc", measurement.footprints.area),
        measurement.counts.astype(float),
    )
    x = Consistency(double, 0, 0, SIDE, SIDE)(prediction())
    assert torch.equal(x, Consistency(measurement, 0, 0, SIDE, SIDE)(prediction()))
    assert x.dtype == torch.float32


def test_negative_predictions_become_zero():
    x = Consistency(measured("discs"), 0, 0, SIDE, SIDE)(prediction() - 1)
    assert (x >= 0).all()
    empty = Measurement.from_map(np.ones((2, 1, 1)), factor=30)  # no footprint lies inside
    assert (Consistency(empty, 0, 0, SIDE, SIDE)(prediction() - 1) == (prediction() - 1).clamp(min=0)).all()


def test_zero_stays_zero():
    measurement = measured("squares")
    counts = measurement.counts.copy()
    counts[5] = 0
    predicted = prediction()
    predicted[:, :, 3:9, 10] = 0
    x = Consistency(measurement.with_counts(counts), 0, 0, SIDE, SIDE)(predicted)
    assert (x[:, :, 6:12, 6:12] == 0).all()  # a footprint in which nothing was measured
    assert (x[:, :, 3:9, 10] == 0).all()  # and bins in which nothing was predicted


@pytest.mark.parametrize("kind", ["squares", "discs"])
def test_footprint_without_a_prediction_is_filled_evenly(kind):
    measurement = measured(kind)
    x = Consistency(measurement, 0, 0, SIDE, SIDE)(torch.zeros(1, 2, SIDE, SIDE))
    np.testing.assert_allclose(pooled(measurement, x)[0], measurement.counts, rtol=1e-4)
    _, covered = measurement.footprints.coverage(0, 0, SIDE, SIDE)
    for counts, share in zip(measurement.counts, covered.toarray().reshape(-1, SIDE, SIDE), strict=True):
        even = np.broadcast_to(counts[:, None] / share.sum(), (2, (share > 0).sum()))
        np.testing.assert_allclose(x[0][:, share > 0], even, rtol=1e-4)


@pytest.mark.parametrize("kind", PLACES)
def test_what_was_measured_lies_on_the_tissue(kind):
    measurement = measured(kind)
    tissue = np.random.default_rng(3).random((SIDE, SIDE)) < 0.7
    x = Consistency(measurement, 0, 0, SIDE, SIDE, tissue=tissue)(prediction())
    np.testing.assert_allclose(pooled(measurement, x * torch.as_tensor(tissue))[0], measurement.counts, rtol=1e-3)
    torch.testing.assert_close(x[:, :, ~tissue], prediction()[:, :, ~tissue], rtol=0, atol=0)


def test_footprint_without_tissue_asks_for_nothing():
    measurement = measured("squares")
    tissue = np.ones((SIDE, SIDE), bool)
    tissue[:6, :6] = False
    agree = Consistency(measurement, 0, 0, SIDE, SIDE, tissue=tissue)
    assert agree.rows.tolist() == list(range(1, 16))
    assert torch.equal(agree(prediction())[:, :, :6, :6], prediction()[:, :, :6, :6])


@pytest.mark.parametrize("kind", PLACES)
def test_footprints_cut_by_the_window_are_left_alone(kind):
    measurement = measured(kind)
    y0, x0, side = 3, 2, 17
    agree = Consistency(measurement, y0, x0, side, side)
    inside = (
        np.abs(measurement.footprints.centers - [y0 + side / 2, x0 + side / 2])
        <= (side - measurement.footprints.diameter) / 2
    ).all(1)
    assert agree.rows.tolist() == np.flatnonzero(inside).tolist()
    assert 0 < inside.sum() < len(measurement)
    counts = prediction()[:, :, y0 : y0 + side, x0 : x0 + side]
    x = agree(counts)
    within = measurement.footprints.coverage(y0, x0, side, side)[1].sum(0).reshape(side, side) > 0
    assert torch.equal(x[:, :, ~within], counts[:, :, ~within])
    whole = F.pad(x, (x0, SIDE - x0 - side, y0, SIDE - y0 - side))
    np.testing.assert_allclose(pooled(measurement, whole)[0][inside], measurement.counts[inside], rtol=3e-4)


def test_each_window_agrees_as_the_whole_does():
    """Squares do not share bins: a window projects its footprints exactly as the whole section does."""
    measurement = measured("squares")
    whole = Consistency(measurement, 0, 0, SIDE, SIDE)(prediction())
    part = Consistency(measurement, 6, 12, 12, 12)(prediction()[:, :, 6:18, 12:])
    torch.testing.assert_close(part, whole[:, :, 6:18, 12:])


@pytest.mark.parametrize("kind", ["squares", "discs"])
def test_on_the_way_estimates_are_scaled_toward_the_measurement(kind):
    """Once, at most a few times up or down, and with their negative bins."""
    measurement = measured(kind)
    agree = Consistency(measurement, 0, 0, SIDE, SIDE)
    counts = prediction(n_samples=3) * torch.tensor([0.05, 1.0, 50.0])[:, None, None, None]
    counts[:, :, ::5, ::3] *= -0.1
    x = agree.toward(counts)
    before, after = pooled(measurement, counts), pooled(measurement, x)
    assert (before > 0).all()
    nearest = np.clip(measurement.counts, before / MOST_SCALED, before * MOST_SCALED)
    np.testing.assert_allclose(after, nearest, rtol=1e-3)
    assert (x.sign() == counts.sign()).all()
    outside = measurement.footprints.coverage(0, 0, SIDE, SIDE)[1].sum(0).reshape(SIDE, SIDE) == 0
    assert torch.equal(x[:, :, outside], counts[:, :, outside])
    agreed = agree(prediction())
    torch.testing.assert_close(agree.toward(agreed), agreed, rtol=1e-3, atol=1e-4)
    cut = Consistency(measurement, 30, 30, SIDE, SIDE)  # a window without a footprint
    assert torch.equal(cut.toward(counts), counts)


@pytest.mark.parametrize("kind", PLACES)
def test_measurements_that_contradict_each_other_are_met_halfway(kind):
    """Noise on overlapping footprints leaves no map that agrees with all; the result is still finite and sums up."""
    measurement = measured(kind)
    noise = np.random.default_rng(4).uniform(0.5, 2, measurement.counts.shape)
    x = Consistency(measurement.with_counts(measurement.counts * noise), 0, 0, SIDE, SIDE)(prediction())
    assert torch.isfinite(x).all()
    assert (x >= 0).all()
    ratio = measurement.footprints.pool(x[0].numpy()) / (measurement.counts * noise)
    assert 0.5 < ratio.min() <= ratio.max() < 2


# ---- rounding --------------------------------------------------------------------------------------------------------

OFF_BY = [0.0, 1e-15, -1e-15, 1e-9, -1e-9, 1e-6, -1e-6, 1e-4, -1e-4]


@pytest.mark.parametrize("off_center", OFF_BY)
@pytest.mark.parametrize("off_side", OFF_BY)
def test_rounding_covers_no_bin_and_loses_nothing(off_side, off_center):
    side = 4.0 * (1 + off_side)
    footprints = Footprints(np.array([[8.0, 8.0]]) + off_center, side, "square", np.array([16.0]))
    for window in [(0, 0, 16, 16), (6, 6, 4, 4)]:  # the second is the square itself
        rows, covered = footprints.coverage(*window)
        assert (len(rows), covered.nnz) == (1, 16)
        np.testing.assert_allclose(covered.sum(), side**2, rtol=1e-6)
        y, x = np.divmod(covered.indices, window[3])
        assert {*(y + window[0])} == {*(x + window[1])} == {6, 7, 8, 9}


@pytest.mark.parametrize("off", OFF_BY)
def test_agreeing_leaves_what_is_beside_a_square(off):
    outside = np.ones((16, 16), bool)
    outside[6:10, 6:10] = False
    square = Footprints(np.array([[8.0, 8.0]]) - off, 4.0 + off, "square", np.array([16.0]))
    agree = Consistency(Measurement(square, np.array([[16.0]])), 0, 0, 16, 16)
    maps = torch.full((1, 1, 16, 16), 2.0)
    for agreed in (agree(maps)[0, 0].numpy(), agree.toward(maps)[0, 0].numpy()):
        np.testing.assert_array_equal(agreed[outside], 2)
        assert agreed[~outside].sum() == pytest.approx(16, rel=1e-3)


def test_thin_parts_of_bins_that_are_no_rounding_are_covered():
    square = Footprints(np.array([[8.0, 8.01]]), 4.0, "square", np.array([16.0]))
    covered = square.coverage(0, 0, 16, 16)[1].toarray().reshape(16, 16)
    np.testing.assert_allclose(covered[6:10, 10], 0.01, rtol=1e-4)
    np.testing.assert_allclose(covered[6:10, 6], 0.99, rtol=1e-4)


def test_a_measurement_of_places():
    centers, area, counts = np.array([[1.0, 1.0], [1.0, 3.0]]), np.full(2, 4.0), np.array([[4.0], [8.0]])
    expected = Measurement(Footprints(centers, 2.0, "square", area), counts)
    for found in (
        Measurement(counts, centers, 2.0, "square", area),
        Measurement(counts, centers, diameter=2.0, shape="square", area=area),
        Measurement(counts=counts, centers=centers, diameter=2.0, shape="square", area=area),
    ):
        np.testing.assert_array_equal(found.density, expected.density)
        np.testing.assert_array_equal(found.centers, centers)
        np.testing.assert_array_equal(found.area, area)
        assert (found.diameter, found.shape, found.pitch, found.blocks) == (2.0, "square", 2.0, 2)
        np.testing.assert_array_equal(found.pool(np.ones((1, 2, 4))), np.full((2, 1), 4))
        np.testing.assert_array_equal(found.near(0, 0, 2, 2, 0.5), [0])
        assert found.coverage(0, 0, 2, 4)[1].nnz == 8
    with pytest.raises(TypeError, match="area"):
        Measurement(counts, centers, 2.0, "square")
