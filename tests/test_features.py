"""Features of bins: what turns with the image, does not depend on how it is read, and is known in closed form."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import stgen.features
from stgen.features import FEATURE_UM, bin_features, pixel_quantities

N, PX, BIN_UM = 48, 4, 8.0
PER_SCALE = 21  # of brightfield, with nuclei


def histology(n=N * PX, channels=3, seed=0):
    """An image in [0, 1] with gradients, edges and dark blobs; its left half is paler."""
    rng = np.random.default_rng(seed)
    image = 0.75 + 0.1 * gaussian_filter(rng.normal(size=(channels, n, n)), (0, 6, 6)) * 20
    y, x = rng.integers(0, n, (2, n * n // 120))
    dots = np.zeros((n, n))
    dots[y, x] = 1
    blobs = np.clip(gaussian_filter(dots, 1.5) * 12, 0, 1)
    image -= np.array([0.5, 0.6, 0.3, 0.4])[:channels, None, None] * blobs * np.linspace(0.2, 1, n)
    return np.clip(image, 0.02, 1).astype(np.float32)


def features(image, px=PX, bin_um=BIN_UM, **options):
    height, width = image.shape[1] // px, image.shape[2] // px

    def read(y, x, h, w):
        assert y >= 0
        assert x >= 0
        assert y + h <= height
        assert x + w <= width
        return image[:, y * px : (y + h) * px, x * px : (x + w) * px]

    return bin_features(read, height, width, bin_um=bin_um, px_per_bin=px, **options)


def turned(values, k):
    """One of the eight symmetries of a square."""
    return np.ascontiguousarray(np.rot90(values[..., ::-1] if k >= 4 else values, k % 4, (-2, -1)))


def by_bin(values, px=PX):
    return values.reshape(*values.shape[:-2], values.shape[-2] // px, px, values.shape[-1] // px, px).mean((-3, -1))


@pytest.fixture(scope="module")
def image():
    return histology()


@pytest.fixture(scope="module")
def found(image):
    return features(image)


def test_shape_and_type(found):
    assert found.shape == (PER_SCALE * len(FEATURE_UM), N, N)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert (found.std((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("k", range(1, 8))
def test_features_turn_and_mirror_with_the_image(
    image, found, k
):  # also at scales whose blocks do not divide the image
    np.testing.assert_allclose(features(turned(image, k)), turned(found, k), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("px", "bin_um"), [(4, 8.0), (2, 8.0), (1, 2.0), (1, 6.0), (1, 10.0), (1, 30.0), (2, 11.0), (8, 2.0)]
)
@pytest.mark.parametrize("rows", [1, 7])
def test_features_do_not_depend_on_strips(monkeypatch, image, px, bin_um, rows):
    image = image[:, : 24 * px, : 16 * px]
    whole = features(image, px, bin_um, scales_um=(0.0, 20.0))
    monkeypatch.setattr(stgen.features, "AT_A_TIME", rows * 16 * px**2)
    np.testing.assert_allclose(features(image, px, bin_um, scales_um=(0.0, 20.0)), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_an_image_of_one_color_has_features_of_one_value(channels, value):
    found = features(np.full((channels, 24 * PX, 24 * PX), value, np.float32))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, np.broadcast_to(found[:, :1, :1], found.shape), rtol=1e-5, atol=1e-4)
    color = -np.log(max(value, 1 / 255)) if channels == 3 else value
    np.testing.assert_allclose(found[:channels], color, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "px", "n_features"),
    [(3, 4, 21), (3, 2, 18), (1, 4, 6), (4, 4, 24), (2, 4, 12)],
    ids=["brightfield", "too coarse for nuclei", "one stain", "four stains", "two stains"],
)
def test_number_of_features_a_scale(channels, px, n_features):
    image = histology(channels=channels)[:, : 24 * px, : 24 * px]
    assert len(features(image, px, scales_um=(0.0,))) == n_features
    assert len(features(image, px, scales_um=(0.0, 10.0, 80.0))) == 3 * n_features


def test_scales_are_computed_by_themselves_and_in_the_order_asked_for(image, found):
    some = features(image, scales_um=(80.0, 0.0))
    of_scale = found.reshape(len(FEATURE_UM), PER_SCALE, N, N)
    np.testing.assert_allclose(
        some, np.concatenate([of_scale[FEATURE_UM.index(80.0)], of_scale[FEATURE_UM.index(0.0)]]), rtol=1e-6
    )


def test_color_of_a_bin_is_its_mean_optical_density(image, found):
    density = by_bin(-np.log(np.clip(image, 1 / 255, 1)))
    np.testing.assert_allclose(found[:3], density, rtol=1e-5)
    blurred = gaussian_filter(density, (0, 10 / BIN_UM, 10 / BIN_UM), mode="nearest", truncate=3.0)
    np.testing.assert_allclose(found[PER_SCALE : PER_SCALE + 3], blurred, rtol=1e-4)


def test_spread_is_that_of_the_pixels_of_a_bin(image, found):
    density = -np.log(np.clip(image, 1 / 255, 1)).astype(float)
    spread = np.sqrt(np.maximum(by_bin(density**2) - by_bin(density) ** 2, 0))
    np.testing.assert_allclose(np.exp(found[3:6]) - stgen.features.FLOOR, spread, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("sigma", [1.0, 1.9, 4.0, 8.5, 16.0])
def test_wide_averages_are_gaussians(sigma):
    n = 201
    values = np.zeros((1, n, n))
    values[0, n // 2, n // 2] = 1
    found = stgen.features._averaged(values, sigma)[0].sum(0)
    assert found.sum() == pytest.approx(1, rel=1e-3)  # nothing is lost
    at = np.arange(n) - n // 2
    assert found @ at == pytest.approx(0, abs=1e-6)
    assert found @ at**2 == pytest.approx(sigma**2, rel=0.06)  # truncated at three standard deviations


@pytest.mark.parametrize("sigma", [5.0, 12.0])
def test_wide_averages_are_near_those_at_full_resolution(sigma):
    values = gaussian_filter(np.random.default_rng(0).normal(size=(1, 101, 143)), (0, 3, 3))
    expected = gaussian_filter(values, (0, sigma, sigma), mode="nearest", truncate=3.0)
    off = stgen.features._averaged(values, sigma) - expected
    assert np.sqrt((off**2).mean()) < 0.1 * expected.std()


def test_a_ramp_stays_a_ramp_inside():
    ramp = np.broadcast_to(np.arange(128.0, dtype=np.float32), (1, 128, 128))
    for sigma in (1.5, 6.0, 11.0):
        found = stgen.features._averaged(ramp, sigma)[0, 64, 48:80]
        np.testing.assert_allclose(found, ramp[0, 64, 48:80], atol=0.02)


def test_of_stains_only_the_mean_depends_on_the_background():
    image = histology(channels=1) * 0.5
    a, b = (features(part, scales_um=(0.0, 20.0)).reshape(2, 6, N, N) for part in (image, image + 0.25))
    np.testing.assert_allclose(b[:, 0], a[:, 0] + 0.25, rtol=1e-4)
    np.testing.assert_allclose(b[:, 1:], a[:, 1:], atol=2e-2)


def test_edges_are_those_of_a_ramp():
    """The structure tensor of a plane: its slope squared, wholly coherent, per standard deviation of the filter."""
    n, mpp = 24 * PX, BIN_UM / PX
    ramp = np.broadcast_to(np.linspace(0, 1, n, dtype=np.float32), (1, n, n))
    quantities = stgen.features.pixel_quantities(stgen.features.torch.as_tensor(ramp.copy()), mpp)["structure"].numpy()
    inside = quantities[:, 20:-20, 20:-20]
    for number, sigma in enumerate(stgen.features.EDGE_UM):
        slope = sigma / mpp / (n - 1)
        expected = np.array([slope**2, slope**2, 0])[:, None, None]
        np.testing.assert_allclose(
            inside[3 * number : 3 * number + 3], np.broadcast_to(expected, (3, n - 40, n - 40)), atol=1e-6
        )


def test_nuclei_are_counted():
    n = 64 * PX  # 512 µm
    y, x = np.mgrid[:n, :n]
    places = np.array([[60, 60], [60, 140], [140, 100], [200, 200], [30, 220]])
    density = 0.05 + sum(np.exp(-((y - i) ** 2 + (x - j) ** 2) / 2 / 1.2**2) for i, j in places)
    stain = np.array([0.65, 0.70, 0.29])[:, None, None]
    found = features(np.exp(-density * stain).astype(np.float32), scales_um=(0.0,))
    per_100_um2 = np.exp(found[18]) - 0.1
    assert per_100_um2.sum() * BIN_UM**2 / 100 == pytest.approx(len(places), rel=1e-3)
    row, column = np.nonzero(per_100_um2 > 0.5)
    assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == sorted(map(tuple, (places // PX).tolist()))


def test_nothing_is_shown_unless_asked_for(image, capfd):
    features(image[:, : 8 * PX, : 8 * PX])
    assert capfd.readouterr() == ("", "")
    features(image[:, : 8 * PX, : 8 * PX], progress=True)
    assert "histology" in capfd.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value):
    image = torch.full((3, 8, 8), 0.5)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite values"):
        pixel_quantities(image, 1.0)
