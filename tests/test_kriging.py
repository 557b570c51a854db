"""Kriging: closed forms, each written down again in a few lines of dense algebra."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from stgen import kriging
from stgen.kernels import FeatureSpace, Gaussian, Kernel, Linear, Matern, Places, WeightedSum, matern
from stgen.kriging import Kriging, kernels_of_image, kernels_of_space, mixtures

SPACE, IMAGE = "space 2", "image 0.7"
KERNELS = [
    pytest.param(((SPACE, 1.0),), id="space"),
    pytest.param(((IMAGE, 1.0),), id="image"),
    pytest.param((("image linear", 1.0),), id="linear"),
    pytest.param(((SPACE, 0.25), (IMAGE, 0.75)), id="both"),
    pytest.param((("space 1", 0.5), ("image linear", 0.5)), id="linear and space"),
]


def section(n=40, n_features=4, seed=0):
    """Spots at random places, whose features and columns depend on where they are."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 6, (n, 2))
    smooth = np.column_stack([np.sin(xy[:, 0]), np.cos(xy[:, 1]), xy[:, 0] / 3, np.sin(xy.sum(1) / 2)])[:, :n_features]
    features = 5 + np.array([1, 20, 0.3, 2])[:n_features] * (smooth + 0.5 * rng.normal(size=smooth.shape))
    y = np.column_stack([features[:, 0] + xy[:, 1], np.sin(xy[:, 0]) - 0.1 * features[:, 1], rng.normal(size=n)])
    return Places(xy, features), y + 0.2 * rng.normal(size=y.shape)


@pytest.fixture(scope="module")
def spots():
    return section()[0]


@pytest.fixture(scope="module")
def y():
    return section()[1]


@pytest.fixture(params=["equal", "unequal"])
def noise(request):
    return None if request.param == "equal" else np.random.default_rng(1).uniform(0.2, 5, 40)


def kernels_of(spots):
    """All kernels that are not sums, by name."""
    return {str(kernel): kernel for kernel in [*kernels_of_space(), *kernels_of_image(spots.features)]}


def sum_of(parts, kernels):
    """A kernel from names and weights."""
    by_name = {str(kernel): kernel for kernel in kernels}
    return WeightedSum(tuple((weight, by_name[name]) for name, weight in parts))


def named(kernels):
    return {str(kernel): value for kernel, value in kernels.items()}


def only(monkeypatch, *kernels, level=None):
    """Some kernels, and one level of noise if it is given, instead of all."""
    monkeypatch.setattr(
        kriging, "mixtures", lambda space, image: [sum_of(parts, [*space, *image]) for parts in kernels]
    )
    if level is not None:
        monkeypatch.setattr(kriging, "NOISE", np.array([level]))


def dense(kernel, a, b, spots):
    """A kernel between places, from its definition."""
    center, spread = spots.features.mean(0), spots.features.std(0)
    x, z, own = (np.clip((p.features - center) / spread, -4, 4) for p in (a, b, spots))
    unlike = cdist(own, own, "sqeuclidean")[np.triu_indices(len(own), 1)]
    out = 0
    for name, share in kernel:
        kind, scale = name.split()
        if kind == "space":
            r = np.sqrt(3) * cdist(a.xy, b.xy) / float(scale)
            out = out + share * (1 + r) * np.exp(-r)
        elif scale == "linear":
            out = out + share * x @ z.T / (own**2).sum(1).mean()
        else:
            out = out + share * np.exp(-cdist(x, z, "sqeuclidean") / np.median(unlike) / 2 / float(scale) ** 2)
    return out


def refitted(kernel, spots, y, level, noise):
    """Every spot predicted from all others by a fit without it, and the image's part of that prediction."""
    noise = np.ones(len(y)) if noise is None else noise
    mean = np.average(y, axis=0, weights=1 / noise)
    image = tuple(part for part in kernel if part[0].startswith("image"))
    out, of_image = np.empty_like(y), np.zeros_like(y)
    for i in range(len(y)):
        rest = np.delete(np.arange(len(y)), i)
        here, others = spots[[i]], spots[rest]
        weights = np.linalg.solve(dense(kernel, others, others, spots) + level * np.diag(noise[rest]), y[rest] - mean)
        out[i] = mean + (dense(kernel, here, others, spots) @ weights)[0]
        if image:
            of_image[i] = (dense(image, here, others, spots) @ weights)[0]
    return out, of_image, mean


# ---- kernels ---------------------------------------------------------------------------------------------------------


def test_matern_is_the_bessel_function_of_order_three_halves():
    from scipy.special import gamma, kv

    r = np.linspace(0.1, 5, 20)
    scaled = np.sqrt(3) * r / 2.0
    expected = 2 ** (1 - 1.5) / gamma(1.5) * scaled**1.5 * kv(1.5, scaled)
    np.testing.assert_allclose(matern(r, 2.0), expected, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_their_definitions(spots, kernel):
    places = section(seed=1)[0]
    found = sum_of(kernel, kernels_of(spots).values())(places, spots)
    np.testing.assert_allclose(found, dense(kernel, places, spots, spots), rtol=1e-9, atol=1e-12)


def test_kernels_have_a_mean_variance_of_one_over_the_spots(spots):
    for name, kernel in kernels_of(spots).items():
        assert np.diag(kernel(spots, spots)).mean() == pytest.approx(1), name


def test_kernels_add_and_are_multiplied(spots):
    places, space = section(seed=1)[0], FeatureSpace.of(spots.features)
    a, b, c = Matern(2.0), Gaussian(0.7, space), Linear(space)
    in_one = 0.5 * (a + 3 * b) + a * c * 2
    expected = 0.5 * (a(places, spots) + 3 * b(places, spots)) + 2 * a(places, spots) * c(places, spots)
    np.testing.assert_allclose(in_one(places, spots), expected, rtol=1e-12)
    assert str(in_one) == "0.5 space 2 + 1.5 image 0.7 + 2 (space 2) x (image linear)"
    assert [weight for weight, _ in in_one.terms] == [0.5, 1.5, 2]
    assert in_one.of_image
    assert not (a + Matern(1.0)).of_image
    assert a + b == Matern(2.0) + Gaussian(0.7, space) != a + Gaussian(0.7, FeatureSpace.of(spots.features))


def test_a_kernel_of_features_needs_them(spots):
    with pytest.raises(ValueError, match="needs places with features"):
        Linear(FeatureSpace.of(spots.features))(Places(spots.xy), spots)


def test_places_of_different_sections_and_of_none_are_not_near_each_other(spots):
    section = np.arange(40) % 3 - 1
    kernel = 0.5 * Matern(2.0) + 0.5 * Linear(FeatureSpace.of(spots.features))
    placed = Places(spots.xy, spots.features, section)
    same = (section[:, None] == section) & (section >= 0)
    expected = 0.5 * Matern(2.0)(spots, spots) * same + 0.5 * kernel.terms[1][1](spots, spots)
    np.testing.assert_allclose(kernel(placed, placed), expected, rtol=1e-12)
    np.testing.assert_array_equal(kernel(placed[section == 0], spots), kernel(spots[section == 0], spots))


def test_mixtures_are_kernels_alone_and_each_of_space_with_each_of_the_image(spots):
    space, image = kernels_of_space(), kernels_of_image(spots.features)
    found = mixtures(space, image)
    assert len(set(found)) == len(found) == 7 + 4 * 3 * 3
    assert {kernel for kernel in found if len(kernel.terms) == 1} == {*space, *image}
    for kernel in found:
        assert sum(weight for weight, _ in kernel.terms) == pytest.approx(1)
        assert len({term.of_image for _, term in kernel.terms}) == len(kernel.terms)
    assert mixtures(space, kernels_of_image(None)) == space


def test_nothing_is_extrapolated_beyond_four_standard_deviations(spots):
    center, spread = spots.features.mean(0), spots.features.std(0)
    far, edge = (Places(np.zeros((2, 2)), center + s * spread * np.array([[1.0], [-1.0]])) for s in (100, 4))
    for kernel in kernels_of_image(spots.features):
        np.testing.assert_allclose(kernel(far, spots), kernel(edge, spots), rtol=1e-9)


def test_whole_numbers_are_places_too():
    spots = Places(np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2))
    y = np.sin(spots.xy[:, :1] / 2)
    found = Kriging(spots, guide=y).solve(y).out_of_fold
    expected = Kriging(Places(spots.xy.astype(float)), guide=y).solve(y).out_of_fold
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# ---- solve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_out_of_fold_is_a_fit_without_the_spot(monkeypatch, spots, y, noise, kernel):
    only(monkeypatch, kernel, level=0.3)
    found = Kriging(spots, noise=noise, guide=y).solve(y)
    expected, _, mean = refitted(kernel, spots, y, 0.3, noise)
    np.testing.assert_allclose(found.out_of_fold, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.noise, 0.3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shares_of_image_and_neighbors_are_those_of_a_fit_without_the_spot(monkeypatch, spots, y, noise, kernel):
    only(monkeypatch, kernel, level=0.3)
    found = Kriging(spots, noise=noise, guide=y).solve(y)
    predicted, of_image, mean = refitted(kernel, spots, y, 0.3, noise)
    weight = np.ones(len(y)) if noise is None else 1 / noise
    power = weight @ (y - mean) ** 2
    np.testing.assert_allclose(found.from_image, weight @ (of_image * (y - mean)) / power, rtol=1e-7, atol=1e-9)
    explained = weight @ ((predicted - mean) * (y - mean)) / power
    np.testing.assert_allclose(found.from_image + found.from_neighbors, explained, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_prediction_is_its_closed_form(monkeypatch, spots, y, noise, kernel):
    only(monkeypatch, kernel, level=0.3)
    model = Kriging(spots, noise=noise, guide=y)
    places = section(seed=1)[0]
    _, _, mean = refitted(kernel, spots, y, 0.3, noise)
    covariance = dense(kernel, spots, spots, spots) + 0.3 * np.diag(np.ones(40) if noise is None else noise)
    expected = mean + dense(kernel, places, spots, spots) @ np.linalg.solve(covariance, y - mean)
    np.testing.assert_allclose(model.predict(model.solve(y), places), expected, rtol=1e-7, atol=1e-7)


def test_noise_is_what_predicts_the_others_best(monkeypatch, spots, y, noise):
    kernel = ((SPACE, 0.5), ("image 1.4", 0.5))
    only(monkeypatch, kernel)
    weight = np.ones(40) if noise is None else 1 / noise
    errors = [weight @ (refitted(kernel, spots, y, level, noise)[0] - y) ** 2 for level in kriging.NOISE]
    found = Kriging(spots, noise=noise, guide=y).solve(y)
    np.testing.assert_array_equal(found.noise, kriging.NOISE[np.argmin(errors, 0)])


def test_kernels_are_weighted_by_their_likelihood(monkeypatch, spots, y):
    level, pair = 0.3, [((SPACE, 1.0),), (("space 1", 0.25), (IMAGE, 0.75))]
    only(monkeypatch, *pair, level=level)
    found = Kriging(spots, guide=y).solve(y)
    predicted = [refitted(kernel, spots, y, level, None)[0] for kernel in pair]
    error = np.stack([((p - y) ** 2).mean(0) for p in predicted])
    share = error ** (-len(y) / 2) / (error ** (-len(y) / 2)).sum(0)
    share = np.where(share < kriging.MIN_WEIGHT, 0, share)
    share = share / share.sum(0)
    assert ((share > 0.01) & (share < 0.99)).any()
    np.testing.assert_allclose(found.out_of_fold, (share[:, None] * np.stack(predicted)).sum(0), rtol=1e-6)
    np.testing.assert_allclose(named(found.kernels)[IMAGE], 0.75 * share[1], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(sum(found.kernels.values()), 1, rtol=1e-9)
    length = (2 * share[0] + 0.25 * share[1]) / (share[0] + 0.25 * share[1])
    np.testing.assert_allclose(found.length, length, rtol=1e-6)


def test_spots_almost_without_noise_are_interpolated(monkeypatch, spots, y, noise):
    only(monkeypatch, ((SPACE, 0.5), (IMAGE, 0.5)), level=1e-9)
    model = Kriging(spots, noise=noise, guide=y)
    np.testing.assert_allclose(model.predict(model.solve(y), spots), y, atol=1e-5)


def test_a_constant_column_is_its_constant_everywhere(spots, y, noise):
    y = np.column_stack([np.full(40, 3.5), y, np.zeros(40)])
    model = Kriging(spots, noise=noise, guide=y)
    field = model.solve(y)
    predicted = model.predict(field, section(seed=1)[0])
    for column, value in ((0, 3.5), (-1, 0.0)):
        np.testing.assert_allclose(field.out_of_fold[:, column], value, rtol=1e-12)
        np.testing.assert_allclose(predicted[:, column], value, rtol=1e-12)
        assert field.from_image[column] == field.from_neighbors[column] == 0
        assert all(share[column] == 0 for share in field.kernels.values())
        assert np.isnan(field.length[column])


def test_columns_are_fitted_by_themselves(spots, y, noise):
    y = np.column_stack([y, y**2, np.roll(y, 1, 0)])
    model = Kriging(spots, noise=noise, guide=y)
    some, places = np.array([7, 0, 4]), section(seed=1)[0]
    whole, part = model.solve(y), model.solve(y[:, some])
    for name in ("mean", "from_image", "from_neighbors", "noise", "length"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[some], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(part.out_of_fold, whole.out_of_fold[:, some], rtol=1e-8)
    np.testing.assert_allclose(model.predict(part, places), model.predict(whole, places)[:, some], rtol=1e-8)


def test_predictions_follow_the_unit_and_the_origin_of_a_column(spots, y):
    model, places = Kriging(spots, guide=y), section(seed=1)[0]
    a, b = model.solve(y), model.solve(100 * y - 7)
    np.testing.assert_allclose(model.predict(b, places), 100 * model.predict(a, places) - 7, rtol=1e-7)
    np.testing.assert_allclose(b.from_image, a.from_image, rtol=1e-7)


def test_turned_and_mirrored_sections_give_the_same(spots, y):
    places = section(seed=1)[0]
    turn = np.array([[0.6, -0.8], [-0.8, -0.6]])
    moved = Places(spots.xy @ turn + 100, spots.features)
    a, b = Kriging(spots, guide=y), Kriging(moved, guide=y)
    np.testing.assert_allclose(
        b.predict(b.solve(y), Places(places.xy @ turn + 100, places.features)), a.predict(a.solve(y), places), rtol=1e-6
    )


def test_the_order_of_the_spots_does_not_matter(spots, y, noise):
    order, places = np.random.default_rng(0).permutation(40), section(seed=1)[0]
    a = Kriging(spots, noise=noise, guide=y)
    b = Kriging(spots[order], noise=None if noise is None else noise[order], guide=y[order])
    np.testing.assert_allclose(b.solve(y[order]).out_of_fold, a.solve(y).out_of_fold[order], rtol=1e-7)
    np.testing.assert_allclose(b.predict(b.solve(y[order]), places), a.predict(a.solve(y), places), rtol=1e-7)


def test_features_have_no_unit_and_constant_ones_say_nothing(spots, y):
    places = section(seed=1)[0]
    factor = np.array([1e3, -2.0, 0.01, 7.0])

    def changed(p):
        return Places(p.xy, np.column_stack([p.features * factor + 5, np.full(len(p), 9.0)]))

    a, b = Kriging(spots, guide=y), Kriging(changed(spots), guide=y)
    np.testing.assert_allclose(b.predict(b.solve(y), changed(places)), a.predict(a.solve(y), places), rtol=1e-6)


def test_an_image_that_is_the_same_everywhere_is_no_image(spots, y):
    blank = Places(spots.xy, np.full((40, 3), 2.0))
    places = section(seed=1)[0]
    model = Kriging(blank, guide=y)
    field = model.solve(y)
    predicted = model.predict(field, Places(places.xy, np.full((40, 3), 2.0)))
    assert np.isfinite(predicted).all()
    assert (np.abs(field.from_image) < 0.02).all()


def test_without_an_image_nothing_comes_from_it(spots, y):
    model = Kriging(Places(spots.xy), guide=y)
    field = model.solve(y)
    assert (field.from_image == 0).all()
    assert not any(kernel.of_image for kernel in field.kernels)
    assert field.from_neighbors[0] > 0.3


def test_a_column_of_the_image_comes_from_the_image(spots):
    x = (spots.features - spots.features.mean(0)) / spots.features.std(0)
    y = np.column_stack([x[:, 1] - x[:, 0], np.random.default_rng(3).normal(size=len(x))])
    field = Kriging(spots, guide=y).solve(y)
    assert field.from_image[0] > 0.8
    assert abs(field.from_image[1] + field.from_neighbors[1]) < 0.2


# ---- many spots ------------------------------------------------------------------------------------------------------


def smooth(n_side=20):
    xy = np.stack(np.meshgrid(np.arange(n_side), np.arange(n_side)), -1).reshape(-1, 2).astype(float)
    rng = np.random.default_rng(0)
    features = np.column_stack([np.sin(xy[:, 0] / 2) + 0.3 * rng.normal(size=len(xy)), rng.normal(size=len(xy))])
    y = np.column_stack([features[:, 0] + np.cos(xy[:, 1] / 4), np.sin(xy[:, 0] / 3), features[:, 1] * 2])
    return Places(xy, features), y + 0.3 * rng.normal(size=y.shape)


def test_with_more_spots_kernels_are_chosen_on_patches_and_the_result_is_close(monkeypatch):
    spots, y = smooth()
    every = Kriging(spots, guide=y)
    monkeypatch.setattr(kriging, "ALL_KERNELS_UP_TO", 160)
    chosen = Kriging(spots, guide=y)
    kernels = [str(spectrum.kernel) for spectrum in chosen.spectra]
    assert len(kernels) == int(43 * (160 / 400) ** 3) == 2
    assert set(kernels) < {str(spectrum.kernel) for spectrum in every.spectra}
    a, b = every.solve(y), chosen.solve(y)
    off = ((a.out_of_fold - b.out_of_fold) ** 2).mean(0) / y.var(0)
    assert (off < 0.03).all()
    explained = [1 - ((f.out_of_fold - y) ** 2).mean(0) / y.var(0) for f in (a, b)]
    assert (explained[0] > 0.5).all()
    assert (np.abs(explained[0] - explained[1]) < 0.06).all()


def test_up_to_600_spots_all_kernels_are_solved_and_beyond_some():
    xy = np.stack(np.meshgrid(np.arange(25.0), np.arange(25.0)), -1).reshape(-1, 2)
    y = np.sin(xy[:, :1] / 3)
    assert [s.kernel for s in Kriging(Places(xy[:600]), guide=y[:600]).spectra] == kernels_of_space()
    few = Kriging(Places(xy), guide=y)
    assert len(few.spectra) == int(4 * (600 / 625) ** 3)
    again = Kriging(Places(xy), guide=y)
    assert [s.kernel for s in few.spectra] == [s.kernel for s in again.spectra]


@pytest.mark.parametrize(("column", "kind"), [(1, "space"), (2, "image")])
def test_the_kernels_chosen_are_those_that_predict_the_guide(monkeypatch, column, kind):
    spots, y = smooth(12)
    monkeypatch.setattr(kriging, "ALL_KERNELS_UP_TO", 80)
    best = Kriging(spots, guide=y[:, [column]]).spectra[0].kernel
    assert sum(share for share, term in best.terms if term.of_image == (kind == "image")) >= 0.5


# ---- draws -----------------------------------------------------------------------------------------------------------


WAVES = {
    **{name: [(name, 1.0)] for name in ("space 1", "space 4", "image linear", "image 0.7", "image 1.4")},
    "sum": [("space 2", 0.3), ("image linear", 0.7)],
}


def covariance_of_waves(kernel, places, n=60, n_fields=200):
    total = 0
    for seed in range(n):
        fields = kernel.wave(n_fields, np.random.default_rng(seed))(places)
        assert fields.shape == (len(places), n_fields)
        total = total + fields @ fields.T / n_fields / n
    return total


@pytest.mark.parametrize("name", WAVES)
def test_waves_have_the_covariance_of_their_kernel(spots, name):
    places = spots[:12]
    kernel = sum_of(WAVES[name], kernels_of(spots).values())
    expected = kernel(places, places)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    found = covariance_of_waves(kernel, places)
    assert np.abs((found - expected) / scale).max() < 0.06  # several standard errors of a mean over 12,000 draws


def test_waves_of_a_product_and_of_sections_have_the_covariance_of_the_kernel(spots):
    places = Places(spots.xy[:12], spots.features[:12], np.arange(12) % 3 - 1)
    kernel: Kernel = Matern(4.0) * Gaussian(1.4, FeatureSpace.of(spots.features))
    found, expected = covariance_of_waves(kernel, places), kernel(places, places)
    assert np.abs(found - expected).max() < 0.08
    assert (found[places.section < 0] == 0).all()
    assert np.abs(covariance_of_waves(kernel, spots[:12]) - kernel(spots[:12], spots[:12])).max() < 0.08


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[3], KERNELS[4]])
def test_draws_have_the_covariance_of_the_posterior(monkeypatch, spots, y, noise, kernel):
    only(monkeypatch, kernel, level=0.3)
    model, y = Kriging(spots, noise=noise, guide=y), y[:, :2]
    field = model.solve(y)
    places = Places(np.array([[1.0, 1.0], [1.5, 1.2], [9.0, 9.0]]), spots.features[:3] * 1.1)
    n, n_samples = 120, 40
    draws = np.concatenate([model.draw(y, field, n_samples, seed)(places) for seed in range(n)], 1)
    assert draws.shape == (3, n * n_samples, 2)

    level = 0.3 * np.diag(np.ones(40) if noise is None else noise)
    over, across = dense(kernel, spots, spots, spots) + level, dense(kernel, places, spots, spots)
    left = dense(kernel, places, places, spots) - across @ np.linalg.solve(over, across.T)
    mean = np.average(y, axis=0, weights=None if noise is None else 1 / noise)
    signal = ((y - mean) * np.linalg.solve(over, y - mean)).sum(0) / 40  # the variance that makes y most likely
    for column in range(2):
        expected = signal[column] * left
        scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        found = draws[..., column] @ draws[..., column].T / draws.shape[1]
        assert np.abs((found - expected) / scale).max() < 0.12
        assert np.abs(draws[..., column].mean(1) / np.sqrt(np.diag(expected))).max() < 0.1
    between = np.corrcoef(draws[0].T)[0, 1]
    assert abs(between) < 0.1  # columns are drawn by themselves


def test_the_same_seed_gives_the_same_draws_however_places_are_batched(spots, y):
    model, places = Kriging(spots, guide=y), section(seed=1)[0]
    field = model.solve(y)
    whole = model.draw(y, field, 3, 5)(places)
    assert whole.shape == (40, 3, 3)
    np.testing.assert_array_equal(model.draw(y, field, 3, 5)(places), whole)
    again = model.draw(y, field, 3, 5)
    order = np.random.default_rng(0).permutation(40)
    pieces = np.concatenate([again(places[order[i : i + 7]]) for i in range(0, 40, 7)])
    np.testing.assert_allclose(pieces, whole[order], rtol=1e-9, atol=1e-9)
    assert np.abs(model.draw(y, field, 3, 6)(places) - whole).max() > 0.1


def test_draws_leave_nothing_open_where_there_is_nothing_to_know(spots):
    y = np.full((40, 2), 3.0)
    model = Kriging(spots, guide=y)
    assert (model.draw(y, model.solve(y), 2, 0)(spots) == 0).all()


def test_draws_agree_at_spots_almost_without_noise(monkeypatch, spots, y):
    only(monkeypatch, ((SPACE, 1.0),), level=1e-9)
    model = Kriging(spots, guide=y)
    draw = model.draw(y, model.solve(y), 4, 0)
    far = Places(np.array([[40.0, 40.0]]), spots.features[:1])
    assert np.abs(draw(spots)).max() < 1e-3 * np.abs(draw(far)).max()


def test_draws_follow_the_seed_and_not_the_global_random_state(untouched_rng, spots, y):
    def drawn():
        model = Kriging(spots, guide=y, seed=3)
        return model.draw(y, model.solve(y), 2, 0)(spots)

    np.testing.assert_array_equal(drawn(), drawn())
