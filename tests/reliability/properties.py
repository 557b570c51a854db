"""What holds for every input: round trips, conserved mass, symmetries, exact solutions; each tried on many with hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stgen.data import dihedral, group_folds
from stgen.diffusion import Diffusion, centered_noise, weighted_mean
from stgen.kernels import Matern, Places
from stgen.measurement import Consistency, Footprints, Measurement
from stgen.transforms import inverse_transform, transform_counts
from stgen.windows import Tiling

PROPERTIES: dict[str, Callable[[], None]] = {}

small = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)
levels = st.integers(0, 999)
views = st.integers(0, 7)
predictions = st.sampled_from(["epsilon", "x_0", "v"])
schedules = st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])
finite = st.floats(0, 1e6, width=32)
counts_2d = arrays.arrays(np.float32, st.tuples(small, small), elements=finite)
counts_3d = arrays.arrays(
    np.float32, st.tuples(small, st.integers(1, 12), st.integers(1, 12)), elements=st.floats(0, 1e4, width=32)
)


def holds(**given_values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a property, tried on all values that strategies give."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        PROPERTIES[function.__name__] = given(**given_values)(function)
        return function

    return register


def run(name: str, n: int) -> None:
    """Try a property on ``n`` inputs, the same every time."""
    allowed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=allowed)
    chosen(PROPERTIES[name])()


def random_map(seed: int, *shape: int) -> np.ndarray:
    """Counts of about four per bin, some of them zero."""
    return np.random.default_rng(seed).poisson(4.0, shape).astype(np.float64)


def turned(values: np.ndarray, view: int) -> np.ndarray:
    """One of the eight views of a square, of an array."""
    return dihedral(torch.as_tensor(values), view).numpy()


# -- transforms ----------------------------------------------------------------------------------------------------------


@holds(counts=counts_2d, name=st.sampled_from(["log1p_raw", "log2p1_raw", "none"]))
def transforms_go_back(counts: np.ndarray, name: Any) -> None:
    """Counts come back from every scale that can be undone."""
    back = inverse_transform(transform_counts(counts, counts.sum(1), name), name)
    np.testing.assert_allclose(back, counts, rtol=2e-5, atol=1e-4)


@holds(counts=counts_2d, name=st.sampled_from(["log1p_norm", "log1p_raw", "log2p1_raw", "none"]))
def transforms_keep_zero_and_order(counts: np.ndarray, name: Any) -> None:
    """Zero stays zero, and of two genes in a location the larger stays the larger."""
    scaled = transform_counts(counts, counts.sum(1), name)
    assert (scaled[counts == 0] == 0).all()
    assert np.isfinite(scaled).all()
    order = np.argsort(counts, 1, kind="stable")
    assert (np.diff(np.take_along_axis(scaled, order, 1), axis=1) >= 0).all()


@holds(counts=counts_2d, factor=st.integers(2, 9))
def normalized_counts_know_no_depth(counts: np.ndarray, factor: int) -> None:
    """Locations that were sequenced deeper have the same normalized values."""
    total = np.maximum(counts.sum(1), 1)
    one, more = (transform_counts(counts * k, total * k, "log1p_norm") for k in (1, factor))
    np.testing.assert_allclose(one, more, rtol=1e-4, atol=1e-5)


# -- the eight views of a square -----------------------------------------------------------------------------------------


@holds(seed=seeds, a=views, b=views)
def views_are_a_group(seed: int, a: int, b: int) -> None:
    """One view of another is again a view, and only one."""
    x = torch.as_tensor(random_map(seed % 99, 2, 3, 3)) + torch.arange(18).reshape(2, 3, 3) / 100
    both = dihedral(dihedral(x, a), b)
    assert sum(torch.equal(both, dihedral(x, view)) for view in range(8)) == 1


@holds(seed=seeds, view=views)
def views_can_be_undone(seed: int, view: int) -> None:
    """Every view has another that brings it back, and keeps every value."""
    x = torch.as_tensor(random_map(seed, 2, 3, 4)) + torch.arange(24).reshape(2, 3, 4) / 100
    back = -view % 4 if view < 4 else view
    assert torch.equal(dihedral(dihedral(x, view), back), x)
    assert torch.equal(dihedral(x, view).sort().values.flatten().sort().values, x.flatten().sort().values)


# -- measuring -----------------------------------------------------------------------------------------------------------


@holds(seed=seeds, n=small, rows=small, columns=small, factor=st.integers(1, 5))
def pooling_conserves_counts(seed: int, n: int, rows: int, columns: int, factor: int) -> None:
    """Low-resolution bins that tile a map hold all of its counts."""
    fine = random_map(seed, n, rows * factor, columns * factor)
    measured = Measurement.from_map(np.ones((n, rows, columns)), factor).footprints.pool(fine)
    np.testing.assert_allclose(measured.sum(0), fine.sum((1, 2)))
    blocks = fine.reshape(n, rows, factor, columns, factor).sum((2, 4))
    np.testing.assert_allclose(measured.T.reshape(n, rows, columns), blocks)


@holds(seed=seeds, side=small, factor=st.integers(1, 4), view=views)
def pooling_turns_with_the_map(seed: int, side: int, factor: int, view: int) -> None:
    """What is measured of a turned map is what was measured, turned."""
    fine = random_map(seed, 2, side * factor, side * factor)
    footprints = Measurement.from_map(np.ones((2, side, side)), factor).footprints
    straight, moved = (footprints.pool(x).T.reshape(2, side, side) for x in (fine, turned(fine, view).copy()))
    np.testing.assert_allclose(moved, turned(straight, view))


def discs(seed: int, n: int, size: float, diameter: float) -> Footprints:
    """Discs wholly on a square grid."""
    centers = np.random.default_rng(seed).uniform(diameter / 2, size - diameter / 2, (n, 2))
    return Footprints(centers, diameter, "disc", np.full(n, math.pi * diameter**2 / 4))


@holds(seed=seeds, n=small, diameter=st.floats(2, 8), view=views)
def discs_turn_with_the_map(seed: int, n: int, diameter: float, view: int) -> None:
    """Spots that are turned with the map measure the same."""
    size = 12
    fine = random_map(seed, 2, size, size)
    spots = discs(seed, n, size, diameter)
    y, x = spots.centers.T - size / 2
    x = -x if view >= 4 else x
    for _ in range(view % 4):
        y, x = -x, y
    moved = Footprints(np.column_stack([y, x]) + size / 2, diameter, "disc", spots.area)
    np.testing.assert_allclose(moved.pool(turned(fine, view).copy()), spots.pool(fine), rtol=0.1, atol=0.2 * diameter)


@holds(seed=seeds, n=small, diameter=st.floats(1, 8), shape=st.sampled_from(["disc", "square"]))
def footprints_cover_their_area(seed: int, n: int, diameter: float, shape: Any) -> None:
    """The bins of a footprint add up to its area, and none is covered less than not at all or more than wholly."""
    spots = discs(seed, n, 14, diameter)
    footprints = Footprints(spots.centers, diameter, shape, spots.area)
    rows, covered = footprints.coverage(0, 0, 14, 14)
    assert len(rows) == n
    assert (covered.data > 0).all()
    assert (covered.data <= 1 + 1e-6).all()
    tolerance = 1e-4 if shape == "square" else 0.35 / diameter
    np.testing.assert_allclose(covered.sum(1), footprints.size, rtol=tolerance)


@holds(corner=st.integers(0, 6), side=st.integers(1, 5), error=st.floats(-1e-10, 1e-10))
def rounding_covers_no_bin(corner: int, side: int, error: float) -> None:
    """A square whose corners are off by the last digits covers its own bins and none beside them."""
    center = np.array([[corner + side / 2 + error] * 2])
    footprints = Footprints(center, float(side), "square", np.array([float(side**2)]))
    covered = footprints.coverage(0, 0, 12, 12)[1].toarray().reshape(12, 12)
    expected = np.zeros((12, 12))
    expected[corner : corner + side, corner : corner + side] = 1
    np.testing.assert_array_equal(covered > 0, expected > 0)


@holds(seed=seeds, dy=st.integers(0, 5), dx=st.integers(0, 5))
def windows_see_the_same_footprints(seed: int, dy: int, dx: int) -> None:
    """What a window sees of footprints is what the whole map has there."""
    spots = discs(seed, 5, 14, 3.0)
    rows, covered = spots.coverage(dy, dx, 9, 9)
    whole = spots.coverage(0, 0, 14, 14)[1].toarray().reshape(5, 14, 14)[rows]
    np.testing.assert_allclose(covered.toarray().reshape(-1, 9, 9), whole[:, dy : dy + 9, dx : dx + 9])


# -- consistency ---------------------------------------------------------------------------------------------------------


@holds(seed=seeds, n=st.integers(1, 3), side=st.integers(1, 4), factor=st.integers(1, 4))
def consistent_maps_sum_to_what_was_measured(seed: int, n: int, side: int, factor: int) -> None:
    """After the projection, every low-resolution bin has its counts, and no bin less than none."""
    low = random_map(seed, n, side, side)
    prediction = torch.as_tensor(np.random.default_rng(seed).normal(1, 1, (2, n, side * factor, side * factor))).float()
    agree = Consistency(Measurement.from_map(low, factor), 0, 0, side * factor, side * factor)
    result = agree(prediction).numpy()
    assert (result >= 0).all()
    pooled = result.reshape(2, n, side, factor, side, factor).sum((3, 5))
    np.testing.assert_allclose(pooled, np.broadcast_to(low, pooled.shape), rtol=1e-4, atol=1e-3)


@holds(seed=seeds, side=st.integers(1, 4), factor=st.integers(1, 4))
def consistency_leaves_the_truth(seed: int, side: int, factor: int) -> None:
    """A map that agrees already stays as it is, and projecting twice is projecting once."""
    fine = random_map(seed, 2, side * factor, side * factor)
    low = fine.reshape(2, side, factor, side, factor).sum((2, 4))
    agree = Consistency(Measurement.from_map(low, factor), 0, 0, side * factor, side * factor)
    np.testing.assert_allclose(agree(torch.as_tensor(fine[None]).float()).numpy()[0], fine, rtol=1e-4, atol=1e-4)
    once = agree(torch.rand(1, 2, side * factor, side * factor, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(agree(once), once, rtol=1e-3, atol=1e-3)


@holds(seed=seeds, scale=st.floats(0.01, 100))
def consistency_does_not_see_the_scale(seed: int, scale: float) -> None:
    """Only the proportions within a footprint matter: a prediction of other height gives the same map."""
    agree = Consistency(Measurement.from_map(random_map(seed, 1, 3, 3), 2), 0, 0, 6, 6)
    x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) + 0.1
    torch.testing.assert_close(agree(x * scale), agree(x), rtol=1e-3, atol=1e-4)


@holds(seed=seeds, n=st.integers(1, 4))
def bins_beside_footprints_stay(seed: int, n: int) -> None:
    """What no spot measured is not changed by what they measured."""
    spots = discs(seed, n, 16, 4.0)
    counts = np.random.default_rng(seed).poisson(20, (n, 1)).astype(np.float32)
    agree = Consistency(Measurement(spots, counts), 0, 0, 16, 16)
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) + 0.1
    outside = spots.coverage(0, 0, 16, 16)[1].sum(0).reshape(16, 16) == 0
    np.testing.assert_array_equal(agree(x).numpy()[0, 0][outside], x.numpy()[0, 0][outside])


# -- tiling --------------------------------------------------------------------------------------------------------------


@holds(height=st.integers(1, 60), width=st.integers(1, 60), tile=st.integers(1, 25), margin=st.integers(0, 9))
def windows_keep_each_bin_once(height: int, width: int, tile: int, margin: int) -> None:
    """The cores of all windows are every bin once, and each window holds its core."""
    tiling, seen = Tiling(tile, margin, height, width), np.zeros((height, width), int)
    for window in tiling.windows(np.ones((height, width), bool)):
        y, x, rows, columns = window.outer
        assert y >= 0
        assert x >= 0
        assert y + rows <= height
        assert x + columns <= width
        seen[y : y + rows, x : x + columns] += tiling.kept(window)
    assert (seen == 1).all()


@holds(seed=seeds, n=st.integers(1, 8), tile=st.integers(4, 12))
def windows_keep_each_bin_once_with_spots(seed: int, n: int, tile: int) -> None:
    """So they do where discs lie across the borders of windows, and each disc is wholly of one window."""
    spots = discs(seed, n, 24, 4.0)
    tiling, seen = Tiling(tile, 6, 24, 24, spots), np.zeros((24, 24), int)
    for window in tiling.windows(np.ones((24, 24), bool)):
        y, x, rows, columns = window.outer
        seen[y : y + rows, x : x + columns] += tiling.kept(window)
    covered = spots.coverage(0, 0, 24, 24)[1]
    overlapping = np.asarray((covered > 0).sum(0)).reshape(24, 24) > 1
    assert (seen[~overlapping] == 1).all()
    assert (seen >= 1).all()


@holds(n=st.integers(10, 60), groups=st.integers(2, 9), folds=st.integers(2, 5), seed=seeds)
def folds_keep_groups_whole(n: int, groups: int, folds: int, seed: int) -> None:
    """A group is in one fold, where there are enough groups."""
    group = np.random.default_rng(seed).permutation(np.arange(n) % (groups + folds))
    fold = group_folds(group, folds)
    assert all(len(np.unique(fold[group == g])) == 1 for g in np.unique(group))


# -- diffusion -----------------------------------------------------------------------------------------------------------


def process(prediction: Any, schedule: Any) -> Diffusion:
    """A process of that kind."""
    return Diffusion(prediction=prediction, schedule=schedule)


@holds(schedule=schedules)
def less_signal_is_left_at_every_level(schedule: Any) -> None:
    """The share of the signal falls from nearly one to nearly nothing."""
    left = process("v", schedule).alpha_bars
    assert (left.diff() < 0).all()
    assert 0.99 < left[0] < 1
    assert 0 <= left[-1] < 0.01


@holds(seed=seeds, t=levels, prediction=predictions, schedule=schedules)
def targets_give_back_the_clean_value(seed: int, t: int, prediction: Any, schedule: Any) -> None:
    """What a network should say of a noised value gives its clean value."""
    d, generator = process(prediction, schedule), torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.full((3,), t)
    x_t = d.add_noise(x_0, eps, level)
    tolerance = 1e-9 / float(d.alpha_bars[t].sqrt().clamp(min=1e-9))
    torch.testing.assert_close(d.to_x_0(d.target(x_0, eps, level), x_t, level), x_0, rtol=tolerance, atol=tolerance)


@holds(seed=seeds, t=levels)
def noise_keeps_the_variance(seed: int, t: int) -> None:
    """Noised values are of variance one if clean values and noise are: their factors are a point on the circle."""
    d = process("v", "linear")
    level = torch.tensor([t])
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    total = d.add_noise(one, none, level) ** 2 + d.add_noise(none, one, level) ** 2
    torch.testing.assert_close(total, one)


@holds(seed=seeds, t=st.integers(1, 999), back=st.integers(1, 400))
def posteriors_agree_with_the_process(seed: int, t: int, back: int) -> None:
    """Noising to an earlier level, or noising further and stepping back, is the same in the mean and the variance."""
    d, s = process("x_0", "linear"), max(t - back, 0)
    x_0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    now, then = torch.full((2,), t), torch.full((2,), s)
    bar_t, bar_s = d.alpha_bars[t], d.alpha_bars[s]
    mean, log_var = d.posterior(x_0, bar_t.sqrt() * x_0, now, then)
    torch.testing.assert_close(mean, bar_s.sqrt() * x_0, rtol=1e-6, atol=1e-9)
    factor = d.posterior(torch.zeros_like(x_0), torch.ones_like(x_0), now, then)[0]
    torch.testing.assert_close(log_var.exp() + factor**2 * (1 - bar_t), (1 - bar_s).expand(2, 3), rtol=1e-6, atol=1e-9)


@holds(seed=seeds, steps=st.integers(1, 30), solver=st.sampled_from(["dpm++", "ddim", "ddpm"]), prediction=predictions)
def solvers_find_what_a_network_knows(seed: int, steps: int, solver: Any, prediction: Any) -> None:
    """A network that knows the clean value leads every solver to it, in any number of steps."""
    d, generator = process(prediction, "linear"), torch.Generator().manual_seed(seed)
    x_0, x_t = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def knows(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = d.alpha_bar(t, x)
        return d.target(x_0, (x - bar.sqrt() * x_0) / (1 - bar).sqrt(), t)

    torch.testing.assert_close(d.sample(knows, x_t, steps=steps, solver=solver), x_0, rtol=1e-4, atol=1e-4)


@holds(seed=seeds, steps=st.integers(2, 30), solver=st.sampled_from(["dpm++", "ddim", "ddpm"]))
def samples_are_what_was_projected(seed: int, steps: int, solver: Any) -> None:
    """The last estimate is the sample: what the projection says of it holds."""
    d = process("x_0", "linear")
    x_t = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    made = d.sample(lambda x, t: x, x_t, steps=steps, solver=solver, project=lambda x: torch.full_like(x, 2.0))
    torch.testing.assert_close(made, torch.full((2, 3), 2.0), rtol=1e-4, atol=1e-4)


@holds(seed=seeds, n_samples=st.integers(2, 9), items=st.integers(1, 4))
def noise_is_centered_and_of_its_item(seed: int, n_samples: int, items: int) -> None:
    """Noise of several samples is zero in the mean, and does not depend on what else is in the batch."""

    def drawn(numbers: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        return centered_noise(n_samples, (5,), generators)

    together = drawn(list(range(items)))
    torch.testing.assert_close(together.mean(1), torch.zeros(items, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[-1:], drawn([items - 1]))


@holds(
    values=arrays.arrays(np.float64, st.tuples(small, small), elements=st.floats(-1e3, 1e3)),
    weight=st.floats(1e-3, 1e3),
)
def equal_weights_are_no_weights(values: np.ndarray, weight: float) -> None:
    """A mean with one weight for all is the mean; with none at all it is zero."""
    x = torch.as_tensor(values)
    torch.testing.assert_close(weighted_mean(x, torch.full_like(x, weight)), x.mean(), rtol=1e-9, atol=1e-9)
    assert weighted_mean(x, torch.zeros_like(x)) == 0


# -- kernels and kriging -------------------------------------------------------------------------------------------------


@holds(seed=seeds, length=st.floats(0.1, 9), n=st.integers(2, 12))
def kernels_are_covariances(seed: int, length: float, n: int) -> None:
    """Symmetric, one on the diagonal, and no combination of places has a negative variance."""
    xy = np.random.default_rng(seed).uniform(0, 10, (n, 2))
    between = Matern(length)(Places(xy), Places(xy))
    np.testing.assert_allclose(between, between.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(between), 1, atol=1e-6)
    assert np.linalg.eigvalsh(between).min() > -1e-8


@holds(seed=seeds, a=st.floats(0.1, 5), b=st.floats(0.1, 5))
def kernels_add_and_multiply(seed: int, a: float, b: float) -> None:
    """The kernel of a sum is the sum of the kernels, and that of a product their product."""
    xy = np.random.default_rng(seed).uniform(0, 5, (6, 2))
    places, (one, two) = Places(xy), (Matern(a), Matern(b))
    np.testing.assert_allclose(
        (0.25 * one + 0.75 * two)(places, places), 0.25 * one(places, places) + 0.75 * two(places, places)
    )
    np.testing.assert_allclose((one * two)(places, places), one(places, places) * two(places, places))


@holds(seed=seeds, dx=st.floats(-99, 99), dy=st.floats(-99, 99), angle=st.floats(0, 6.3))
def kernels_of_space_do_not_see_where(seed: int, dx: float, dy: float, angle: float) -> None:
    """A section that is moved and turned has the same covariances."""
    xy = np.random.default_rng(seed).uniform(0, 5, (6, 2))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = xy @ turn.T + [dx, dy]
    kernel = Matern(1.5)
    np.testing.assert_allclose(kernel(Places(moved), Places(moved)), kernel(Places(xy), Places(xy)), atol=1e-6)


@holds(seed=seeds, length=st.floats(0.5, 4), noise=st.floats(0.01, 2), n=st.integers(3, 10))
def kriging_is_gaussian_process_regression(seed: int, length: float, noise: float, n: int) -> None:
    """The kriging weights of a kernel and noise predict what scikit-learn's Gaussian process predicts."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Kernel as Base

    rng = np.random.default_rng(seed)
    xy, new, y = rng.uniform(0, 5, (n, 2)), rng.uniform(0, 5, (4, 2)), rng.normal(size=n)
    ours = Matern(length)

    class Same(Base):
        def __call__(self, X: np.ndarray, Y: np.ndarray | None = None, eval_gradient: bool = False) -> np.ndarray:
            return ours(Places(X), Places(X if Y is None else Y))

        def diag(self, X: np.ndarray) -> np.ndarray:
            return np.ones(len(X))

        def is_stationary(self) -> bool:
            return True

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {}

    theirs = GaussianProcessRegressor(Same(), alpha=noise, optimizer=None).fit(xy, y)
    mean, covariance = theirs.predict(new, return_cov=True)
    gram = ours(Places(xy), Places(xy)) + noise * np.eye(n)
    cross = ours(Places(new), Places(xy))
    np.testing.assert_allclose(cross @ np.linalg.solve(gram, y), mean, atol=1e-8)
    left = ours(Places(new), Places(new)) - cross @ np.linalg.solve(gram, cross.T)
    np.testing.assert_allclose(left, covariance, atol=1e-8)


def main() -> int:
    """Try all properties on 20,000 inputs in all, or on as many as are asked for: ``python properties.py [N]``."""
    import sys
    import traceback

    total = int(sys.argv[1]) if sys.argv[1:] else 20_000
    n, failed = -(-total // len(PROPERTIES)), 0
    for name in PROPERTIES:
        try:
            run(name, n)
        except Exception:  # noqa: BLE001  reported, and the others are tried too
            failed += 1
            print(f"fails: {name}\n{traceback.format_exc()[-900:]}", flush=True)
    print(table(n, failed))
    return int(failed > 0)


def table(n: int, failed: int) -> str:
    """The figures of a run."""
    rows = [("properties", len(PROPERTIES)), ("cases", n * len(PROPERTIES)), ("properties that do not hold", failed)]
    return "\n".join(f"  {name:36}{n:7,}" for name, n in rows)


if __name__ == "__main__":
    raise SystemExit(main())
