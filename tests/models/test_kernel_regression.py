"""KernelRegression: on one section, across sections, and both; closed forms against brute force."""

import numpy as np
import pytest
import torch
from scipy import sparse

from stgen import models
from stgen.data import MapInputs
from stgen.features import bin_features
from stgen.kernels import Places
from stgen.kriging import NOISE, WIDTHS_ACROSS, Kriging, kernels_of_image
from stgen.measurement import Footprints, Measurement
from stgen.models.kernel_regression.applied import blocks
from stgen.models.kernel_regression.regression import Regression, Spots, components, composition
from stgen.sampling import SamplingOptions

GENES = [f"g{i}" for i in range(12)]
BIN_UM, PX = 20.0, 4


class Image:
    """A color image of smooth random tissue, read by bins."""

    def __init__(self, height, width, seed, px_per_bin=PX, n_channels=3, finest=None):
        rng = np.random.default_rng(seed)
        y, x = (np.arange(n * PX) / PX for n in (height, width))
        waves = rng.uniform(0.1, 0.4, (n_channels, 4, 2)), rng.uniform(0, 6, (n_channels, 4))
        self.whole = np.stack(
            [
                0.5 + 0.1 * sum(np.sin(a * y[:, None] + b * x + c) for (a, b), c in zip(w, p, strict=True))
                for w, p in zip(*waves, strict=True)
            ]
        )
        self.whole = np.clip(self.whole + 0.02 * rng.normal(size=self.whole.shape), 0.02, 1).astype(np.float32)
        self.px_per_bin, self.n_channels, self.calls = px_per_bin, n_channels, 0
        if finest is not None:
            self.finest_px_per_bin = finest

    def __call__(self, y, x, height, width):
        self.calls += 1
        return self.whole[:, y * PX : (y + height) * PX, x * PX : (x + width) * PX]


def section(seed, *, n=7, image=True, depth=1.0, genes=GENES, **options):
    """Spots on a lattice whose counts follow what the image shows, and drift with the place."""
    height = width = 5 * n
    picture = Image(height, width, seed, **options)
    centers = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2) * 5 + 2.5
    spots = Footprints(centers, 4.4, "disc", np.full(n * n, np.pi * 2.2**2))
    shown = (
        spots.pool(picture.whole.reshape(len(picture.whole), height, PX, width, PX).mean((2, 4))) / spots.area[:, None]
    )
    rng = np.random.default_rng(seed + 100)
    slopes = np.random.default_rng(0).normal(size=(3, len(GENES)))
    rate = np.exp(2.5 + 3 * (shown[:, :3] - 0.5) @ slopes + 0.1 * np.sin(centers[:, :1] / 9))
    counts = rng.poisson(depth * rate).astype(np.float32)
    order = [GENES.index(gene) for gene in genes]
    measured = Measurement(spots, sparse.csc_array(counts[:, order]), tuple(genes))
    return MapInputs(np.ones((height, width), bool), BIN_UM, picture if image else None, measurement=measured)


def without_spots(inputs):
    return MapInputs(inputs.tissue, inputs.bin_um, inputs.image)


def regression(*sections, **options):
    model = models.KernelRegression(GENES, bin_um=BIN_UM, px_per_bin=PX, **options)
    model.fit(list(sections))
    return model


@pytest.fixture(scope="module")
def sections():
    return [section(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def several(sections):
    return regression(*sections[:2])


def maps_of(model, inputs, genes=GENES, **options):
    """The maps of a whole section in one window: samples and expectation, and the total."""
    sampler = model.sampler(inputs, genes, SamplingOptions(**{"n_samples": 1, **options}))
    window, parts = (0, 0, inputs.height, inputs.width), []
    for part in sampler.parts:
        found = sampler.maps(window, part)
        parts.append((np.stack(list(found.maps)), found.total))
    return np.concatenate([maps for maps, _ in parts], 1), parts[0][1], sampler


# ---- one section -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [True, False])
def test_of_one_section_it_is_the_kriging_of_its_spots(image):
    """Each gene kriged by itself and through components, and the mean of both taken; depth is one field more."""
    inputs = section(0, image=image)
    model = regression(inputs, image_channels=3 if image else None)
    found, total, _ = maps_of(model, inputs)

    spots, measured = inputs.measurement.footprints, inputs.measurement
    counts, totals = measured.counts.toarray().astype(float), measured.totals.astype(float)
    features = None
    if image:
        features = bin_features(inputs.image, 35, 35, bin_um=BIN_UM, px_per_bin=PX)
    pooled = None if features is None else spots.pool(features) / spots.pool(np.ones((1, 35, 35)))
    places = Places(spots.centers[:, ::-1] / 5, pooled)
    y = np.log1p(counts / totals[:, None] * np.median(totals))
    precision = 1 / np.clip(np.median(totals) / totals, 0.05, 50)
    order = np.argsort(-y.var(0), kind="stable")
    scores, depth = components(y[:, order], precision), np.log(totals / spots.area)[:, None]
    kriging = Kriging(places, noise=1 / precision, guide=np.hstack([scores, depth]))
    yx = np.stack(np.meshgrid(np.arange(35), np.arange(35), indexing="ij"), -1).reshape(-1, 2) + 0.5
    bins = Places(
        (yx[:, ::-1] / 5).astype(np.float32), None if features is None else features.reshape(len(features), -1).T
    )
    shared = kriging.predict(kriging.solve(np.hstack([scores, depth])), bins)
    direct = kriging.predict(kriging.solve(y), bins)
    loadings = ((precision[:, None] * scores) / (precision @ scores**2)).T @ y
    both = (direct + precision @ y / precision.sum() + shared[:, :-1] @ loadings) / 2
    density = np.exp(np.minimum(shared[:, -1], depth.max() + np.log(2)))
    expected = np.expm1(np.clip(both, 0, y.max(0) + np.log(2))) * (density / np.median(totals))[:, None]
    np.testing.assert_allclose(found[-1].reshape(12, -1).T, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total.ravel(), density, rtol=1e-5)


def test_of_its_own_section_it_reports_each_spot_predicted_from_the_others(sections):
    model = regression(sections[0])
    _, _, sampler = maps_of(model, sections[0], GENES[:5])
    rows, predicted, scores = sampler.report()
    assert predicted.shape == (49, 5)
    assert list(scores.index) == GENES[:5]
    np.testing.assert_array_equal(rows, np.arange(49))
    measured = sections[0].measurement.counts.toarray()[:, :5]
    inside = np.abs(np.log1p(predicted) - np.log1p(measured)) <= scores["interval_90"].to_numpy() + 1e-6
    assert (inside.mean(0) >= 0.9).all()
    assert sampler.record()["n_spots"] == 49
    assert sampler.record()["n_trusted"] == scores["trusted"].sum()


def test_a_gene_without_a_count_is_zero_everywhere():
    inputs = section(0)
    counts = inputs.measurement.counts.toarray()
    counts[:, 3] = 0
    measured = Measurement(inputs.measurement.footprints, counts, tuple(GENES))
    inputs = MapInputs(inputs.tissue, BIN_UM, inputs.image, measurement=measured)
    for model, target in ((regression(inputs), inputs), (regression(inputs), section(1))):
        found, _, _ = maps_of(model, target)
        assert np.isfinite(found).all()
    found, _, _ = maps_of(regression(inputs), inputs)
    assert (found[-1][3] == 0).all()
    assert (found[-1][[2, 4]] > 0).any()


# ---- other sections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_noise", [False, True])
def test_leaving_out_a_section_is_a_fit_without_it(with_noise):
    rng = np.random.default_rng(0)
    group, features = np.repeat([0, 1, 2], [12, 9, 15]), rng.normal(size=(36, 3))
    y = np.column_stack([features[:, 0] + 0.3 * group, np.sin(features[:, 1])]) + 0.2 * rng.normal(size=(36, 2))
    noise = rng.uniform(0.3, 3, 36) if with_noise else np.ones(36)
    places = Places(np.zeros((36, 2)), features, group)
    kriging = Kriging(places, noise=noise, guide=y, groups=group)
    mean = np.stack([np.average(y[group == g], axis=0, weights=1 / noise[group == g]) for g in range(3)])
    rest = y - mean[group]
    for kernel, spectrum in zip(kernels_of_image(features, WIDTHS_ACROSS), kriging.spectra, strict=True):
        between, errors = kernel(places, places), np.zeros((len(NOISE), 2))
        for number, level in enumerate(NOISE):
            for g in range(3):
                here, others = group == g, group != g
                over = between[np.ix_(others, others)] + level * np.diag(noise[others])
                left = rest[here] - between[np.ix_(here, others)] @ np.linalg.solve(over, rest[others])
                errors[number] += (left**2 / noise[here, None]).sum(0) / 36
        np.testing.assert_allclose(spectrum.errors(rest / np.sqrt(noise)[:, None], group), errors, rtol=1e-7)


def test_across_sections_out_of_fold_is_a_fit_without_the_section(monkeypatch):
    """By components whose loadings and means are those of the other sections."""
    monkeypatch.setattr("stgen.kriging.NOISE", np.array([0.5]))
    sections = [section(seed) for seed in range(3)]
    model = regression(*sections)
    base = model.other_sections()
    counts, groups, spots = base.counts, base.regression.groups, base.regression.spots
    genes = base.regression.genes(counts)
    found = genes._composition_out_of_fold()
    y, kernels = base.regression.composition(counts), kernels_of_image(spots.places.features, WIDTHS_ACROSS)
    scores, precision = base.regression.scores, base.regression.precision
    for g in range(3):
        here, others = groups == g, groups != g
        predicted = 0
        for kernel in kernels:
            over = kernel(spots.places[others], spots.places[others]) + 0.5 * np.diag(1 / precision[others])
            across = kernel(spots.places[here], spots.places[others])
            predicted = predicted + across @ np.linalg.solve(over, scores[others]) / len(kernels)
        means = {k: np.average(y[groups == k], axis=0, weights=precision[groups == k]) for k in range(3) if k != g}
        within = y[others] - np.stack([means[k] for k in groups[others]])
        weighted = precision[others, None] * scores[others]
        loadings = (weighted / (weighted * scores[others]).sum(0)).T @ within
        expected = np.mean(list(means.values()), 0) + predicted @ loadings
        np.testing.assert_allclose(found[here], expected, rtol=1e-5, atol=1e-6)


def test_what_it_learned_elsewhere_predicts_another_section(sections, several):
    target = sections[2]
    measured = target.measurement.counts.toarray()
    expected = np.log1p(measured / target.measurement.totals[:, None] * 1e4)
    found, spread = several.predict_locations(without_spots(target), target.measurement.footprints)
    assert found.dtype == np.float32
    assert spread is None
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, expected.T, strict=True)]
    assert np.mean(r) > 0.5


def test_own_spots_add_to_what_other_sections_say(sections, several):
    """Spots of the section itself bring a map closer to what it has in the places that were hidden."""
    target = sections[2]
    hidden = np.arange(49) % 3 == 0
    measured = target.measurement[np.flatnonzero(~hidden)]
    with_spots = MapInputs(target.tissue, BIN_UM, target.image, measurement=measured)
    truth = target.measurement.counts.toarray()[hidden]
    truth = np.log1p(truth / target.measurement.totals[hidden, None] * 1e4)
    places = target.measurement.footprints[np.flatnonzero(hidden)]
    error = {
        name: np.square(several.predict_locations(inputs, places)[0] - truth).mean()
        for name, inputs in {"own": with_spots, "looks": without_spots(target)}.items()
    }
    assert error["own"] < error["looks"]
    _, _, sampler = maps_of(several, with_spots)
    assert len(sampler.report().rows) == (~hidden).sum()


def test_a_section_that_it_was_fitted_on_does_not_predict_itself_by_looks(sections):
    """Of three sections, one that is predicted again is left out of what others say of it."""
    model, others = regression(*sections), regression(*sections[:2])
    again, _, _ = maps_of(model, sections[2])
    expected, _, _ = maps_of(others, sections[2])
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-7)


def test_the_order_of_sections_does_not_matter(sections):
    target = without_spots(sections[2])
    a, b = regression(*sections[:2]), regression(*sections[:2][::-1])
    np.testing.assert_allclose(maps_of(a, target)[0], maps_of(b, target)[0], rtol=1e-6)


def test_one_section_predicts_another_by_looks(sections):
    model, target = regression(sections[0]), sections[1]
    groups = model.other_sections().regression.groups
    assert len(np.unique(groups)) == 16
    found, _ = model.predict_locations(without_spots(target), target.measurement.footprints)
    expected = np.log1p(target.measurement.counts.toarray() / target.measurement.totals[:, None] * 1e4)
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, expected.T, strict=True)]) > 0.4


def test_blocks_are_of_equal_size_and_in_one_place():
    xy = np.random.default_rng(0).uniform(0, 10, (103, 2))
    found = blocks(xy, 16)
    sizes = np.bincount(found)
    assert len(sizes) == 16
    assert sizes.max() - sizes.min() <= 1
    assert np.mean([np.ptp(xy[found == i], axis=0).max() for i in range(16)]) < 4


# ---- maps and locations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_pooled_maps_are_what_is_predicted_of_the_locations(sections, several, own):
    target = sections[2]
    inputs = target if own else without_spots(target)
    found, total, _ = maps_of(several, inputs)
    spots = target.measurement.footprints
    pooled = np.log1p(spots.pool(found[-1]) / spots.pool(total) * 1e4)
    predicted, _ = several.predict_locations(inputs, spots)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(pooled.T, predicted.T, strict=True)]
    assert np.min(r) > 0.95
    assert np.abs(pooled - predicted).mean() < 0.1


def test_windows_and_parts_of_the_genes_do_not_matter(monkeypatch, sections, several):
    target = without_spots(sections[2])
    whole, total, _ = maps_of(several, target, n_samples=3, keep_samples=True)
    monkeypatch.setattr("stgen.models.kernel_regression.sampler.MOST_VALUES", 7 * 98 * 5.0)
    sampler = several.sampler(target, GENES, SamplingOptions(n_samples=3, keep_samples=True, tile=16))
    assert [part.stop for part in sampler.parts] == [5, 10, 12]
    found, found_total = np.full_like(whole, np.nan), np.full_like(total, np.nan)
    for part in sampler.parts:
        for window in sampler.tiling.windows(target.tissue):
            y, x, height, width = window.outer
            result = sampler.maps(window.outer, part)
            found[:, part, y : y + height, x : x + width] = np.stack(list(result.maps))
            if part.start == 0:
                found_total[:, y : y + height, x : x + width] = result.total
            else:
                assert result.total is None
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found_total, total, rtol=1e-6)


def test_samples_scatter_around_the_expected_map_as_the_spread_says(sections, several):
    target = without_spots(sections[2])
    spots = sections[2].measurement.footprints
    predicted, spread = several.predict_locations(target, spots, n_samples=40, seed=1)
    again, same = several.predict_locations(target, spots, n_samples=40, seed=1)
    np.testing.assert_array_equal(same, spread)
    np.testing.assert_array_equal(again, predicted)
    assert spread.shape == predicted.shape
    assert (spread > 0).any(0).all()
    assert np.abs(several.predict_locations(target, spots, n_samples=40, seed=2)[1] - spread).max() > 0


def test_consistent_maps_sum_to_what_was_measured(sections, several):
    found, total, _ = maps_of(several, sections[2], consistency=True)
    spots = sections[2].measurement.footprints
    inside = spots.within(35, 35)
    measured = sections[2].measurement.counts.toarray()
    np.testing.assert_allclose(spots.pool(found[-1])[inside], measured[inside], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(spots.pool(total)[inside, 0], measured.sum(1)[inside], rtol=1e-3)


def test_features_of_places_are_all_that_a_sample_takes(several):
    base = several.other_sections().regression
    h = torch.as_tensor(base.spots.places.features[:6])
    expected, _ = base.genes(several.other_sections().counts).at(base.spots.places[np.arange(6)])
    found = several.sample({"h": h})
    assert found.shape == (6, 1, 12)
    np.testing.assert_allclose(
        found[:, 0], np.log1p(np.expm1(np.clip(expected, 0, None)) / base.target * 1e4), rtol=0.02, atol=0.02
    )
    draws = [several.sample({"h": h}, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0].shape == (6, 5, 12)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("transform", ["log1p_raw", "log2p1_raw", "none"])
def test_locations_are_predicted_on_the_scale_of_the_model(sections, transform):
    target, spots = without_spots(sections[2]), sections[2].measurement.footprints
    counts, _ = regression(*sections[:2], transform="none").predict_locations(target, spots)
    found, _ = regression(*sections[:2], transform=transform).predict_locations(target, spots)
    undone = {"log1p_raw": np.expm1, "log2p1_raw": lambda x: 2**x - 1, "none": np.asarray}[transform]
    np.testing.assert_allclose(undone(found), counts, rtol=1e-4)


# ---- keeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_saved_and_loaded_it_gives_the_same_bits(tmp_path, sections, n):
    model = regression(*sections[:n], transform="log1p_raw")
    loaded = models.load(model.save(tmp_path / "model"))
    assert type(loaded) is models.KernelRegression
    assert loaded.config == model.config
    assert loaded.weights_sha256() == model.weights_sha256()
    for target in (sections[0], without_spots(sections[2]), sections[2]):
        a, b = (maps_of(m, target, n_samples=2, keep_samples=True)[0] for m in (model, loaded))
        np.testing.assert_array_equal(a, b)


def test_fitting_again_forgets_the_sections_before(sections):
    model = regression(*sections[:2])
    target = without_spots(sections[2])
    before = maps_of(model, target)[0]
    model.fit([sections[1]])
    found = maps_of(model, target)[0]
    assert np.abs(found - before).max() > 0
    np.testing.assert_array_equal(found, maps_of(regression(sections[1]), target)[0])


def test_of_many_spots_as_many_are_remembered_of_each_section(sections):
    model = regression(*[section(seed, n=9) for seed in range(2)], max_spots=100)
    assert np.bincount(model.section).tolist() == [50, 50]
    again = regression(*[section(seed, n=9) for seed in range(2)], max_spots=100)
    assert again.weights_sha256() == model.weights_sha256()
    assert len(regression(section(0, n=11), max_spots=100).total) == 121  # of one section, all are


def test_the_image_is_read_once_to_fit_and_apply():
    inputs = section(0)
    model = regression(inputs)
    calls = inputs.image.calls
    maps_of(model, inputs)
    assert inputs.image.calls == calls > 0


def test_the_global_random_states_are_left_alone(untouched_rng, sections):
    model = regression(sections[0])
    maps_of(model, sections[1], n_samples=2, keep_samples=True)


# ---- bad input -------------------------------------------------------------------------------------------------------


def changed(inputs, **values):
    return MapInputs(**{**inputs.__dict__, **values})


def spots_of(inputs, rows):
    return changed(inputs, measurement=inputs.measurement[np.asarray(rows)])


BAD = {
    "no spots": (lambda s: without_spots(s), ValueError, "none were measured"),
    "too few spots": (lambda s: spots_of(s, range(29)), ValueError, "fewer than 30 spots"),
    "too few that are seen": (lambda s: changed(s, seen=np.arange(49) < 20), ValueError, "29 off the grid"),
    "another gene": (lambda s: section(0, genes=GENES[1:]), KeyError, "1 of the 12 genes .* not measured: g0"),
    "two in one place": (lambda s: spots_of(s, [*range(49), 4]), ValueError, "1 of 50 spots lie where another"),
    "no image": (lambda s: changed(s, image=None), ValueError, "image_channels=None"),
    "other channels": (lambda s: section(0, n_channels=4), ValueError, "3 channels, found 4"),
    "other pixels": (lambda s: section(0, px_per_bin=2), ValueError, "4 pixels along a bin, and the image has 2"),
    "other bins": (lambda s: changed(s, bin_um=10.0), ValueError, "bins of 10 µm and the model is for 20 µm"),
    "bins larger than spots": (
        lambda s: changed(s, measurement=Measurement(Footprints(s.measurement.footprints.centers, 0.5, "disc", np.full(49, 0.2)),
                                                     s.measurement.counts, s.measurement.genes)),
        ValueError, "larger than the spots",
    ),
    "a coarse image": (lambda s: section(1, finest=2.0), ValueError, "pixels of 10 µm and of 5 µm .* px_per_bin=2"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_sections_are_refused_before_any_work(sections, bad):
    change, error, match = BAD[bad]
    model = models.KernelRegression(GENES, bin_um=BIN_UM, px_per_bin=PX)
    model.fit([section(5)])
    before, inputs = model.weights_sha256(), change(sections[0])
    calls = [s.image.calls for s in sections]
    with pytest.raises(error, match=match):
        model.fit([*sections, inputs])
    assert model.weights_sha256() == before
    assert [s.image.calls for s in sections] == calls
    if bad not in ("no spots", "too few spots", "too few that are seen"):
        with pytest.raises(error, match=match):
            model.sampler(inputs, GENES, SamplingOptions())


def test_no_section_and_no_fit_are_refused(sections):
    model = models.KernelRegression(GENES, bin_um=BIN_UM, px_per_bin=PX)
    with pytest.raises(ValueError, match="at least one section"):
        model.fit([])
    with pytest.raises(ValueError, match="has not been fitted"):
        model.applied_to(sections[0])


def test_without_an_image_it_knows_its_own_section_only(sections):
    own = section(0, image=False)
    model = regression(own, image_channels=None)
    with pytest.raises(ValueError, match="and no other"):
        model.applied_to(section(1, image=False))
    with pytest.raises(ValueError, match="and no other"):
        model.applied_to(without_spots(own))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bin_um": 0.0}, "bin_um"),
        ({"image_channels": 0}, "image_channels"),
        ({"px_per_bin": 0}, "px_per_bin"),
        ({"n_components": 0}, "n_components"),
        ({"max_spots": 10}, "max_spots"),
        ({"seed": -1}, "seed"),
        ({"transform": "log"}, "transform"),
    ],
)
def test_impossible_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        models.KernelRegression(GENES, **options)


# ---- regression ------------------------------------------------------------------------------------------------------


def test_what_is_the_same_in_all_sections_has_no_unit_and_no_total():
    counts, total = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([4.0, 8.0])
    np.testing.assert_allclose(composition(counts, total), np.log1p(counts / total[:, None] * 6))
    np.testing.assert_allclose(composition(counts, total, 10.0), composition(5 * counts, 5 * total, 10.0))


def test_a_target_of_its_own_leaves_the_counts_where_they_are(sections):
    """Compositions refer to another total, and counts that are predicted hardly change."""
    measured = sections[0].measurement
    counts, totals = measured.counts.toarray().astype(float), measured.totals.astype(float)
    spots = Spots(Places(measured.footprints.centers[:, ::-1] / 5), totals, measured.footprints.area)
    found = []
    for target in (None, 1.2 * float(np.median(totals))):
        model = Regression(spots, composition(counts, totals, target), target=target)
        genes = model.genes(counts)
        found.append(genes.counts_of(*genes.at(spots.places)))
    np.testing.assert_allclose(found[0], found[1], rtol=0.05, atol=0.01)
