"""What models of maps are made of, and the baselines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from tests.models.conftest import batch_of, randomized

from stgen import models
from stgen.data import MapData, MapInputs, dihedral
from stgen.features import gaussian_blur
from stgen.measurement import Measurement
from stgen.models import DiffST, Interpolate, LinearProbe, PixelProbe, RegressionUNet
from stgen.models._layers import ChannelNorm, ImageStem, PixelAttention, ResBlock, UNet, draw_weights, prime_factors
from stgen.models._maps import GeneScale, ImageScale

GENES = ["A", "B"]
FACTOR, PX = 4, 2


def map_data(seed=0, side=32, tile=16, n_genes=2, channels=3, **options):
    """Tiles of a section whose counts depend on the image."""
    rng = np.random.default_rng(seed)
    pixels = gaussian_filter(rng.normal(size=(channels, side * PX, side * PX)), (0, 3, 3)) * 4
    mean = pixels.reshape(channels, side, PX, side, PX).mean((2, 4))
    rate = np.exp(0.5 + np.einsum("gc,chw->ghw", rng.normal(size=(n_genes, channels)) / 2, mean))
    counts = rng.poisson(rate).astype(np.float32)
    counts[:, :2, :3] = np.nan
    low = np.nan_to_num(counts).reshape(n_genes, side // FACTOR, FACTOR, side // FACTOR, FACTOR).sum((2, 4))
    padded = np.pad(pixels, ((0, 0), (64, 64), (64, 64)), mode="edge").astype(np.float32)

    def image(y0, x0, height, width):
        y, x = y0 * PX + 64, x0 * PX + 64
        return padded[:, y : y + height * PX, x : x + width * PX]

    section = MapInputs(
        np.isfinite(counts[0]), image=image, measurement=Measurement.from_map(low, FACTOR), truth=counts
    )
    return MapData([section], tile=tile, stride=4, **options)


@pytest.fixture(scope="module")
def data():
    return map_data()


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_pixels_are_normalized_on_their_own():
    norm = ChannelNorm(5)
    x = torch.randn(2, 5, 3, 4)
    z = norm(x)
    torch.testing.assert_close(z.square().mean(1), torch.ones(2, 3, 4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm(100 * x), z, rtol=1e-3, atol=1e-3)
    assert torch.equal(norm(x[:1, :, 1:2, 2:3]), z[:1, :, 1:2, 2:3])
    randomized(norm)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (6, 4)])
@pytest.mark.parametrize("time_dim", [None, 7])
def test_residual_block_starts_as_its_skip(inputs, outputs, time_dim):
    block = ResBlock(inputs, outputs, time_dim)
    draw_weights(block)
    x, time = torch.randn(2, inputs, 5, 5), None if time_dim is None else torch.randn(2, time_dim)
    assert torch.equal(block(x, time), block.skip(x))
    assert torch.equal(block.skip(x), x) == (inputs == outputs)
    assert not torch.allclose(randomized(block)(x, time), block.skip(x), atol=0.1)


def test_residual_block_written_out():
    block = randomized(ResBlock(4, 6, 7))
    x, time = torch.randn(2, 4, 5, 5), torch.randn(2, 7)
    scale, shift = block.time(time)[:, :6, None, None], block.time(time)[:, 6:, None, None]
    z = block.norm_in(x)
    z = block.norm_out(block.conv_in(z * z.sigmoid())) * (1 + scale) + shift
    torch.testing.assert_close(block(x, time), block.skip(x) + block.conv_out(z * z.sigmoid()))


def test_pixel_attention_written_out():
    attention = randomized(PixelAttention(6, head_dim=3))
    x = torch.randn(2, 6, 2, 4)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).split(6, 1)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        weight = (q[:, head].mT @ k[:, head] / 3**0.5).softmax(-1)  # (B, pixels, pixels)
        heads.append(v[:, head] @ weight.mT)
    torch.testing.assert_close(attention(x), x + attention.out(torch.cat(heads, 1).unflatten(2, (2, 4))))
    draw_weights(attention)
    assert torch.equal(attention(x), x)


def test_weights_are_drawn_from_the_global_generator():
    unet = UNet(3, 2, [4, 8], 5, attention=[1])
    weights = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draw_weights(unet)
        weights.append(torch.cat([p.detach().flatten() for p in unet.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    norms = [layer for layer in unet.modules() if isinstance(layer, ChannelNorm)]
    assert all((layer.weight == 1).all() and (layer.bias == 0).all() for layer in norms)


@pytest.mark.parametrize("options", [{}, {"time_dim": 5}, {"blocks": 2, "attention": [0, 1]}])
def test_unet_starts_at_zero_and_keeps_the_size(options):
    unet = UNet(3, 2, [4, 8, 8], **options)
    x, time = torch.randn(2, 3, 8, 12), torch.randn(2, 5) if options.get("time_dim") else None
    assert (unet(x, time) != 0).any()
    draw_weights(unet)
    assert torch.equal(unet(x, time), torch.zeros(2, 2, 8, 12))


def reach(levels):
    """Bins that a U-Net sees at most: four convolutions at each level, one pixel for resampling, two at its ends."""
    return 2 + sum(5 * 2**level for level in range(levels))


def test_unet_sees_no_farther_than_its_convolutions():
    unet = randomized(UNet(2, 2, [8, 8]))
    far = reach(2)
    side = 2 * (far + 4)
    x = torch.randn(1, 2, side, side)
    other = torch.randn(1, 2, side, side)
    near = (torch.arange(side) - side // 2).abs() <= far
    other[:, :, near[:, None] & near] = x[:, :, near[:, None] & near]
    middle = np.s_[:, :, side // 2, side // 2]
    torch.testing.assert_close(unet(other)[middle], unet(x)[middle], rtol=1e-6, atol=1e-6)
    other[:, :, side // 2 + 2, side // 2] += 1
    assert (unet(other)[middle] - unet(x)[middle]).abs().max() > 1e-3


def test_unet_is_equivariant_to_shifts_by_its_stride():
    unet = randomized(UNet(2, 3, [8, 8]))
    far = reach(2)
    x = torch.randn(1, 2, 2 * far + 8, 2 * far + 8)
    moved = unet(x.roll((2, 4), (2, 3))).roll((-2, -4), (2, 3))
    inside = np.s_[:, :, far : far + 4, far : far + 4]
    torch.testing.assert_close(moved[inside], unet(x)[inside], rtol=1e-4, atol=1e-4)
    odd = unet(x.roll(1, 2)).roll(-1, 2)
    assert not torch.allclose(odd[inside], unet(x)[inside], atol=1e-3)  # windows must be aligned


def test_attention_sees_the_whole_tile():
    unet = randomized(UNet(2, 2, [8, 8], attention=[1]))
    x = torch.randn(1, 2, 64, 64)
    other = x.clone()
    other[:, :, 0, 0] += 10
    assert (unet(other)[:, :, 60, 60] - unet(x)[:, :, 60, 60]).abs().max() > 1e-6


@pytest.mark.parametrize("px", [1, 2, 3, 4, 5, 6, 7, 8, 10])
def test_image_stem_gives_one_value_per_bin(px):
    stem = ImageStem(2, 8, px)
    assert stem(torch.randn(3, 2, 4 * px, 6 * px)).shape == (3, 8, 4, 6)
    assert int(np.prod(prime_factors(px))) == px


@pytest.mark.parametrize("px", [1, 3, 4])
def test_image_stem_is_equivariant_to_shifts_by_a_bin(px):
    stem = randomized(ImageStem(2, 8, px))
    h = torch.randn(1, 2, 10 * px, 10 * px)
    moved = stem(h.roll((px, 2 * px), (2, 3)))
    torch.testing.assert_close(moved[:, :, 4:7, 5:8], stem(h)[:, :, 3:6, 3:6], rtol=1e-4, atol=1e-4)


# ---- scales ---------------------------------------------------------------------------------------------------------


def known_bins(data):
    return torch.cat([b["x"][0][:, b["tissue"][0, 0] > 0] for b in data.some(len(data))], 1)


def test_gene_scale_by_standard_deviation(data):
    scale = GeneScale(2, "std").fit(data)
    torch.testing.assert_close(scale.scale, known_bins(data).std(1, correction=0))
    assert scale.of(torch.rand(3, 2, 4, 4)).shape == (1, 2, 1, 1)


def test_gene_scale_by_quantile(data):
    scale = GeneScale(2, "quantile").fit(data)
    x = known_bins(data)
    for gene in range(2):
        above = float((x[gene] > scale.scale[gene]).float().mean())
        assert above <= 0.005
        assert float((x[gene] >= scale.scale[gene]).float().mean()) >= 0.005


def test_quantile_of_a_rare_gene_is_a_single_count():
    rare = map_data()
    counts = rare.sections[0].truth
    counts[1] = np.where(np.isfinite(counts[1]), 0, np.nan)
    counts[1, 9, 9:11] = [1, 2]
    assert float(GeneScale(2, "quantile").fit(rare).scale[1]) == pytest.approx(np.log(2))
    counts[1] = np.where(np.isfinite(counts[1]), 0, np.nan)
    for kind in ("std", "quantile"):  # a gene without counts is divided by 1
        assert float(GeneScale(2, kind).fit(rare).scale[1]) == 1


def test_gene_scale_by_the_range_of_each_map():
    scale = GeneScale(2, "map")
    scale.scale.copy_(torch.tensor([7.0, 9.0]))
    y = torch.rand(3, 2, 4, 4)
    y[1, 0] = 0.5  # without a range, the fitted scale
    found = scale.of(y)
    expected = y.flatten(2).max(-1).values - y.flatten(2).min(-1).values
    expected[1, 0] = 7
    torch.testing.assert_close(found[:, :, 0, 0], expected)


def test_image_scale(data):
    scale = ImageScale(3).fit(data)
    h = torch.cat([b["h"][0].flatten(1) for b in data.some(len(data))], 1)
    torch.testing.assert_close(scale.mean, h.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.scale, h.std(1, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale(h[None, :, :, None]), torch.asinh((h - h.mean(1, keepdim=True)) / h.std(1, correction=0)[:, None])[None, :, :, None], rtol=1e-3, atol=1e-3)  # fmt: skip
    image = data.sections[0].image
    data = map_data()
    constant = replace(data.sections[0], image=lambda *w: np.concatenate([image(*w)[:2], 0 * image(*w)[:1] + 5]))
    data.sections[0] = constant
    assert ImageScale(3).fit(data).scale[2] == 1  # a channel that is the same everywhere


# ---- arguments ------------------------------------------------------------------------------------------------------

CLASSES = [Interpolate, PixelProbe, RegressionUNet, DiffST]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": []}, "at least one gene"),
        ({"genes": ["A", "B", "A"]}, "must be names without repetition, found more than once: A"),
        ({"transform": "log"}, "unknown transform 'log'"),
        ({"transform": "log1p_norm"}, "cannot be undone without library sizes; use transform='log1p_raw'"),
        ({"factor": 0}, "`factor` must be a whole number of at least 1, found 0"),
        ({"factor": 2.5}, "`factor` must be a whole number of at least 1, found 2.5"),
        ({"image_channels": 0}, "`image_channels` must be a whole number of at least 1, found 0"),
        ({"px_per_bin": -1}, "`px_per_bin` must be a whole number of at least 1, found -1"),
        ({"bin_um": 0.0}, "`bin_um` must be a positive number of µm, found 0.0"),
        ({"bin_um": float("nan")}, "`bin_um` must be a positive number of µm, found nan"),
    ],
)
def test_bad_arguments(cls, options, message):
    options = {"genes": GENES, **options}
    with pytest.raises(ValueError, match=message):
        cls(options.pop("genes"), **options)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_callers_ask_of_a_map_model(cls):
    model = cls(GENES)
    assert model.takes == "maps"
    assert model.tile % model.align == 0
    assert model.halo % model.align == 0
    assert model.needs_image == (cls is not Interpolate)
    assert model.needs_low_res
    assert model.stochastic == (cls is DiffST)
    model.check_window(3 * model.align, model.align)
    if model.align > 1:
        with pytest.raises(ValueError, match=rf"{cls.__name__} takes windows whose sides are multiples of"):
            model.check_window(model.align, model.align + 1)


@pytest.mark.parametrize(("bin_um", "px"), [(10.0, 4), (20.0, 8), (2.0, 1), (5.0, 2)])
def test_image_is_read_at_a_stated_size_of_pixel(bin_um, px):
    assert RegressionUNet(GENES, bin_um=bin_um, widths=[8]).config["px_per_bin"] == px


def test_image_alone_is_enough_for_a_regression():
    model = randomized(RegressionUNet(GENES, widths=[8, 8], use_low_res=False, px_per_bin=PX))
    assert not model.needs_low_res
    assert model.sample({"h": torch.randn(1, 3, 8, 8)}).shape == (1, 1, 2, 4, 4)


# ---- baselines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic", "gaussian"])
def test_interpolation_is_the_low_resolution_map(data, kernel):
    model = Interpolate(GENES, kernel=kernel)
    assert model.kernel == kernel
    assert model.fitted
    assert model.fit(data) == {}
    batch = batch_of(data, 0, 5)
    assert torch.equal(model.sample(batch, 3), batch["y"][:, None].expand(-1, 3, -1, -1, -1))


@pytest.mark.parametrize("name", ["Interpolate", "PixelProbe", "RegressionUNet"])
def test_projection_and_samples_of_a_deterministic_model(name, data):
    model = fitted(name, data)
    batch = batch_of(data, 0)
    plain = model.sample(batch, 2)
    assert plain.shape == (1, 2, 2, 16, 16)
    assert torch.equal(plain[:, 0], plain[:, 1])
    assert torch.equal(model.sample(batch, 2, project=lambda x: x + 1), plain + 1)
    model.check_sampling(0, "euler")  # it uses none


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_blur_is_that_of_scipy(sigma):
    x = torch.rand(1, 2, 12, 15)
    radius = int(np.ceil(3 * sigma))
    kwargs = {"mode": "constant", "radius": radius}
    expected = np.stack([gaussian_filter(m, sigma, **kwargs) for m in x[0].numpy()])
    weight = gaussian_filter(np.ones((12, 15)), sigma, **kwargs)
    blurred = gaussian_blur(x, sigma, radius=radius, repeat_edge=False)
    np.testing.assert_allclose(blurred[0], expected / weight, rtol=1e-4)
    constant = torch.full((1, 1, 9, 9), 2.5)
    torch.testing.assert_close(gaussian_blur(constant, sigma, radius=radius, repeat_edge=False), constant)


@pytest.mark.parametrize("view", range(8))
def test_features_turn_with_the_image(data, view):
    model = PixelProbe(GENES, px_per_bin=PX, blurs=[1.0])
    batch = batch_of(data, 3)
    turned = {name: dihedral(value, view) for name, value in batch.items() if name != "index"}
    torch.testing.assert_close(model.features(turned), dihedral(model.features(batch), view), rtol=1e-4, atol=1e-4)


def test_features_of_a_bin():
    model = PixelProbe(GENES, px_per_bin=3, image_channels=2, blurs=[])
    h, y = torch.randn(1, 2, 6, 9), torch.rand(1, 2, 2, 3)
    features = model.features({"h": h, "y": y})
    pixels = h[0, :, 3:6, 6:9]
    expected = torch.cat([pixels.mean((1, 2)), pixels.std((1, 2), correction=0), y[0, :, 1, 2]])
    torch.testing.assert_close(features[0, :, 1, 2], expected)
    assert model.halo == 0


def test_pixel_probe_is_the_linear_probe_on_its_features(data):
    model = PixelProbe(GENES, px_per_bin=PX, blurs=[1.0, 2.0])
    model.fit(data)
    batch = batch_of(data, 2)
    features = model.features(batch)[0].flatten(1).T
    torch.testing.assert_close(model.sample(batch)[0, 0].flatten(1).T, model.probe.predict(features))
    assert isinstance(model.probe, LinearProbe)


def test_pixel_probe_recovers_what_is_linear():
    """The truth is a linear function of the image's mean in each bin: it is found, unknown bins notwithstanding."""
    data = map_data()
    part = data.sections[0]
    mean = part.image(0, 0, 32, 32).reshape(3, 32, PX, 32, PX).mean((2, 4))
    x = 2 + 0.3 * mean[:2] - 0.1 * mean[2]
    part.truth[:] = np.where(np.isfinite(part.truth), np.expm1(x), np.nan)
    model = PixelProbe(GENES, px_per_bin=PX, blurs=[1.0])
    model.fit(data)
    batch = batch_of(data, 0)
    known = batch["tissue"].expand_as(batch["x"]) > 0
    torch.testing.assert_close(model.predict(batch)[known], batch["x"][known], rtol=0.02, atol=0.02)


def test_pixel_probe_learns_from_training_and_validation_tissue(data):
    both, one = (PixelProbe(GENES, px_per_bin=PX, blurs=[]) for _ in range(2))
    both.fit(data, map_data(seed=1))
    one.fit(data)
    assert not torch.equal(both.probe.weight, one.probe.weight)
    again = PixelProbe(GENES, px_per_bin=PX, blurs=[])
    again.fit(data, map_data(seed=1))
    assert again.weights_sha256() == both.weights_sha256()


def test_pixel_probe_sees_no_farther_than_its_halo():
    model = randomized(PixelProbe(GENES, px_per_bin=1, blurs=[1.0, 2.0]), std=0.1)
    side = 2 * model.halo + 6
    batch = {"h": torch.randn(1, 3, side, side), "y": torch.rand(1, 2, side, side)}
    core = np.s_[..., model.halo : side - model.halo, model.halo : side - model.halo]
    wide = {name: F.pad(value, (9, 9, 9, 9), value=3.0) for name, value in batch.items()}
    torch.testing.assert_close(
        model.predict(wide)[..., 9:-9, 9:-9][core], model.predict(batch)[core], rtol=1e-4, atol=1e-4
    )


def test_regression_starts_at_zero_and_is_trained_on_known_bins(data):
    model = RegressionUNet(GENES, widths=[8, 8], px_per_bin=PX)
    model.gene_scale.fit(data)
    batch = batch_of(data, 0)
    assert (batch["tissue"] == 0).any()
    assert (model.predict(batch) == 0).all()
    known = batch["tissue"][0, 0] > 0
    scaled = batch["x"][0] / model.gene_scale.scale[:, None, None]
    torch.testing.assert_close(model.loss(batch)["loss"], scaled[:, known].square().mean())
    batch["x"] = torch.where(known, batch["x"], 100.0)
    torch.testing.assert_close(model.loss(batch)["loss"], scaled[:, known].square().mean())


def test_regression_refuses_windows_that_are_not_aligned():
    model = RegressionUNet(GENES, widths=[8, 8], px_per_bin=1)
    batch = {"h": torch.rand(1, 3, 8, 7), "y": torch.rand(1, 2, 8, 7), "valid": torch.ones(1, 1, 8, 7)}
    with pytest.raises(
        ValueError, match="RegressionUNet takes windows whose sides are multiples of 2 bins, found 8 x 7"
    ):
        model.predict(batch)


def test_regression_learns(data):
    model = RegressionUNet(GENES, widths=[8, 8], px_per_bin=PX)
    history = model.fit(data, steps=30, batch_size=4, evaluate_every=10, progress=False, device="cpu")
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert set(history) == {"step", "loss", "mse"}


def fitted(name, data):
    torch.manual_seed(0)
    model = {
        "Interpolate": lambda: Interpolate(GENES, kernel="linear"),
        "PixelProbe": lambda: PixelProbe(GENES, px_per_bin=PX, blurs=[1.0]),
        "RegressionUNet": lambda: randomized(RegressionUNet(GENES, widths=[8, 8], px_per_bin=PX), std=0.1),
    }[name]()
    if name == "PixelProbe":
        model.fit(data)
    model.record = {"sections": ["one"]}
    return model


@pytest.mark.parametrize("name", ["Interpolate", "PixelProbe", "RegressionUNet"])
def test_saved_and_restored(name, data, tmp_path):
    model = fitted(name, data)
    restored = models.load(model.save(tmp_path))
    assert type(restored) is type(model)
    assert restored.config == model.config
    assert (restored.align, restored.halo, restored.kernel) == (model.align, model.halo, model.kernel)
    assert restored.weights_sha256() == model.weights_sha256()
    batch = batch_of(data, 1)
    assert torch.equal(restored.sample(batch), model.sample(batch))


def test_every_default_has_a_kernel_of_its_own():
    assert Interpolate(GENES).kernel == "cubic"
    assert PixelProbe(GENES).kernel == "linear"
    assert RegressionUNet(GENES, widths=[8]).kernel == "gaussian"
