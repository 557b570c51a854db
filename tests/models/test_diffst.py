from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.models.conftest import QUICK, batch_of, inputs, randomized
from tests.models.conftest import shapes_of as names

import stgen.train
from stgen import models
from stgen.data import MapData, MapInputs
from stgen.diffusion import weighted_mean
from stgen.measurement import Measurement
from stgen.models import DiffST
from stgen.models._layers import draw_weights
from stgen.models.diffst.graph import CoExpressionGraph, co_expression_intensity, graph_update
from stgen.models.diffst.networks import (
    CellHierarchy,
    CrossModalModulation,
    Disentangling,
    disentangling_loss,
    from_regions,
    modulate,
    patch_entropy,
    regions,
)

GENES = ["A", "B", "C"]
SMALL = {
    "width": 8,
    "widths": [8, 8],
    "mean_widths": [8, 8],
    "region": 4,
    "bin_um": 40.0,
    "px_per_bin": 2,
}  # patches of 4 bins
SWITCHES = ["modulation", "graph", "hierarchy", "disentangle", "residual"]  # each with parameters of its own
PARTS = {"modulation": "modulation.", "graph": "graph.", "hierarchy": "cells.", "disentangle": "disentangling.", "residual": "mean."}  # fmt: skip


def diffst(genes=GENES, *, random=True, **options):
    torch.manual_seed(0)
    model = DiffST(genes, **{**SMALL, **options}).eval()
    return randomized(model, std=0.2) if random else model


def map_data(seed=0, side=32, tile=16, n_genes=3, channels=3, factor=4, px=2, **options):
    """Tiles of a section whose counts follow from its image, bin by bin."""
    rng = np.random.default_rng(seed)
    pixels = F.interpolate(
        torch.as_tensor(rng.normal(size=(1, channels, side // 4, side // 4))), size=side * px, mode="bicubic"
    )
    pixels = pixels[0].numpy() * 2 + 0.3 * rng.normal(size=(channels, side * px, side * px))
    mean = pixels.reshape(channels, side, px, side, px).mean((2, 4))
    rate = np.exp(0.5 + np.einsum("gc,chw->ghw", rng.normal(size=(n_genes, channels)) / 2, mean))
    counts = rng.poisson(rate).astype(np.float32)
    low = counts.reshape(n_genes, side // factor, factor, side // factor, factor).sum((2, 4))
    padded = np.pad(pixels, ((0, 0), (64, 64), (64, 64)), mode="edge").astype(np.float32)

    def image(y0, x0, height, width):
        y, x = y0 * px + 64, x0 * px + 64
        return padded[:, y : y + height * px, x : x + width * px]

    tissue = np.ones((side, side), bool)
    tissue[:3, :5] = False
    return MapData(
        [MapInputs(tissue, image=image, measurement=Measurement.from_map(low, factor), truth=counts)],
        tile=tile,
        **{"stride": 8, **options},
    )


@pytest.fixture(scope="module")
def data():
    return map_data()


@pytest.fixture(scope="module")
def trained(data):
    model = diffst(random=False)
    model.fit(data, steps=2, **QUICK)
    model.record = {"sections": ["one"]}
    return model


# ---- hierarchical histology: Section 2.2 (2) ------------------------------------------------------------------------


def test_entropy_of_known_patches():
    level = lambda k: k / 255 * 6 - 3  # noqa: E731
    flat = torch.full((3, 16, 16), level(100))
    half = flat.clone()
    half[:, :8] = level(101)
    every = torch.as_tensor([level(k) for k in range(256)]).reshape(16, 16).expand(3, -1, -1)
    quarters = torch.as_tensor([level(k) for k in (3, 77, 150, 200)]).repeat(64).reshape(16, 16).expand(3, -1, -1)
    found = patch_entropy(torch.stack([flat, half, every, quarters]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1, 8, 2]), atol=1e-5, rtol=0)


def test_entropy_is_that_of_skimage():
    from skimage.measure import shannon_entropy

    patches = 2 * torch.randn(4, 3, 12, 12)
    level = ((patches.mean(1).clamp(-3, 3) + 3) / 6 * 255).round()
    np.testing.assert_allclose(patch_entropy(patches), [shannon_entropy(p.numpy()) for p in level], rtol=1e-5)
    gray = patches.mean(1, keepdim=True)
    torch.testing.assert_close(patch_entropy(gray), patch_entropy(patches))


def cells(*, reach=1, width=8, patch=4, px=2):
    return randomized(CellHierarchy(2, width, patch, px, reach))


def image_of_patches(rows, columns, side, flat=(), seed=0):
    """An image of noise, in which some patches (row, column) are of one color."""
    h = torch.randn(1, 2, rows * side, columns * side, generator=torch.Generator().manual_seed(seed))
    for row, column in flat:
        h[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 0.5
    return h


def test_patches_are_cut_row_by_row():
    module = cells()
    h = image_of_patches(3, 4, 8)
    patches = module.patches(h)
    assert patches.shape == (1, 12, 2, 8, 8)
    assert torch.equal(patches[0, 6], h[0, :, 8:16, 16:24])


def attended(module, f_tissue, h, gamma, reach):
    """Cross-attention in float64, location by location and patch by patch; what passes is chosen in plain numpy."""
    module = module.double()
    f_tissue, h = f_tissue.double(), h.double()
    side, stride = module.px, module.patch // 2
    n_rows, n_columns = h.shape[2] // side, h.shape[3] // side
    features = {}
    for row in range(n_rows):
        for column in range(n_columns):
            patch = h[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            gray = patch.mean((0, 1)).clamp(-3, 3)
            p = np.bincount(((gray + 3) / 6 * 255).round().long().flatten(), minlength=256) / side**2
            if -(p[p > 0] * np.log2(p[p > 0])).sum() > gamma:
                features[row, column] = module.encoder(patch).mean((0, 2, 3))
    d = f_tissue.shape[1]
    out = torch.zeros(1, d, 2 * n_rows, 2 * n_columns, dtype=torch.float64)
    for i in range(2 * n_rows):
        for j in range(2 * n_columns):
            pooled = f_tissue[0, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].mean((1, 2))
            near = [
                f for (r, c), f in features.items() if reach is None or max(abs(r - i // 2), abs(c - j // 2)) <= reach
            ]
            keys = [module.key(f) for f in near] + [module.nothing.weight[:d, 0]]
            values = [module.value(f) for f in near] + [module.nothing.weight[d:, 0]]
            weight = (torch.stack(keys) @ module.query(pooled) / d**0.5).softmax(0)
            out[0, :, i, j] = weight @ torch.stack(values)
    return F.interpolate(out, size=f_tissue.shape[2:], mode="bilinear")


@pytest.mark.parametrize("reach", [0, 1, None])
@pytest.mark.parametrize("flat", [[], [(0, 1), (1, 2), (2, 0)]])
def test_cross_attention_written_out(reach, flat):
    """``softmax(Q K^T / sqrt(d)) V`` over the patches that pass and are near, and the one that stands for none."""
    module = cells(reach=reach)
    module.entropies.copy_(torch.tensor([1.0, 3.0]))
    f_tissue, h = torch.randn(1, 8, 12, 16), image_of_patches(3, 4, 8, flat)
    found = module(f_tissue, h, 0.25)
    expected = attended(module, f_tissue, h, 2.0, reach)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_patches_that_do_not_pass_do_not_matter():
    module = cells(reach=None)
    module.entropies.copy_(torch.tensor([1.0, 3.0]))
    f_tissue, h = torch.randn(1, 8, 12, 16), image_of_patches(3, 4, 8, [(1, 2)])
    other = h.clone()
    other[:, :, 8:16, 16:24] = -2.0
    assert torch.equal(module(f_tissue, h, 0.0), module(f_tissue, other, 0.0))
    other[:, :, 8:16, 16:24] = torch.randn(2, 8, 8)
    assert not torch.equal(module(f_tissue, h, 0.0), module(f_tissue, other, 0.0))


def test_where_no_patch_passes():
    module = cells(reach=1)
    f_tissue, h = torch.randn(1, 8, 12, 16), image_of_patches(3, 4, 8)
    module.entropies.copy_(torch.tensor([8.0, 8.0]))
    nothing = module.nothing.weight[8:, 0]
    torch.testing.assert_close(module(f_tissue, h, 1.0), nothing[None, :, None, None].expand_as(f_tissue))
    draw_weights(module)
    assert (module(f_tissue, h, 1.0) == 0).all()


def test_patches_out_of_reach_do_not_matter():
    module = cells(reach=1)
    f_tissue, h = torch.randn(1, 8, 4, 24), image_of_patches(1, 6, 8)
    other = h.clone()
    other[..., 5 * 8 :] = torch.randn(1, 2, 8, 8)
    one, two = module(f_tissue, h, 0.0), module(f_tissue, other, 0.0)
    torch.testing.assert_close(one[..., :15], two[..., :15], rtol=0, atol=1e-6)  # up to the interpolation of the fourth
    assert not torch.allclose(one[..., 17:20], two[..., 17:20], atol=1e-4)


def test_gamma_rises_over_half_of_the_training():
    module = cells()
    module.entropies.copy_(torch.tensor([2.0, 5.0]))
    assert [float(module.gamma(p)) for p in (0, 0.1, 0.25, 0.5, 0.75, 1)] == pytest.approx([2, 2.6, 3.5, 5, 5, 5])


def test_gamma_is_taken_from_training_images():
    module = cells()
    images = [image_of_patches(2, 3, 8, [(0, 0), (1, 1)], seed=s) for s in range(3)]
    module.fit(images)
    entropies = torch.cat([patch_entropy(module.patches(h)[0]) for h in images])
    assert module.entropies.tolist() == [float(entropies.min()), float(entropies.median())]
    assert float(module.entropies[0]) == 0


def test_curriculum_drops_patches_as_training_proceeds():
    with_it, without = diffst(), diffst(curriculum=False)
    assert set(with_it.state_dict()) == set(without.state_dict())
    batch = inputs(with_it)
    features = {}
    for model, name in ((with_it, "with"), (without, "without")):
        model.cells.fit([model.image_scale(batch["h"])])
        for model.progress in (0.0, 1.0):
            features[name, model.progress] = model.condition(batch)["features"]
    assert torch.equal(features["with", 0.0], features["without", 0.0])
    assert torch.equal(features["without", 0.0], features["without", 1.0])
    assert not torch.allclose(features["with", 0.0], features["with", 1.0], atol=1e-4)


def test_progress_is_known_while_training(data, monkeypatch):
    seen = []
    loss = DiffST.loss
    monkeypatch.setattr(
        DiffST, "loss", lambda model, batch: seen.append((model.training, model.progress)) or loss(model, batch)
    )
    model = diffst(random=False)
    assert model.progress == 1
    model.fit(data, map_data(stride=16), steps=4, evaluate_every=2, **QUICK)
    assert [progress for training, progress in seen if training] == [0, 0.25, 0.5, 0.75]
    assert {progress for training, progress in seen if not training} == {1.0}  # as the model will be used
    assert model.progress == 1


# ---- cross-modal adaptive modulation: Eq. 3 -------------------------------------------------------------------------


def test_regions_and_back():
    x = torch.randn(2, 3, 8, 12)
    cut = regions(x, 4)
    assert cut.shape == (2, 2, 3, 16, 3)
    assert torch.equal(cut[1, 1, 2, 5], x[1, :, 5, 9])
    assert torch.equal(from_regions(cut, 4, (8, 12)), x)


def test_modulation_written_out():
    """``A'_y = A_y w`` with ``w = FC(A_y^T A_h)``, region by region, in both directions, added to what was there."""
    module = randomized(CrossModalModulation(6, 4))
    f_y, f_h = torch.randn(2, 6, 8, 12), torch.randn(2, 6, 8, 12)
    found_y, found_h = module(f_y, f_h)

    def fc(layer, rows):
        return rows @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    normed_y, normed_h = (norm(f).detach().double().numpy() for norm, f in ((module.norm_y, f_y), (module.norm_h, f_h)))
    expected_y, expected_h = f_y.double().numpy(), f_h.double().numpy()
    for b in range(2):
        for i in range(0, 8, 4):
            for j in range(0, 12, 4):
                a_y, a_h = (f[b, :, i : i + 4, j : j + 4].reshape(6, 16).T for f in (normed_y, normed_h))
                expected_y[b, :, i : i + 4, j : j + 4] += (a_y @ fc(module.h2y, a_y.T @ a_h / 16)).T.reshape(6, 4, 4)
                expected_h[b, :, i : i + 4, j : j + 4] += (a_h @ fc(module.y2h, a_h.T @ a_y / 16)).T.reshape(6, 4, 4)
    np.testing.assert_allclose(found_y.detach(), expected_y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_h.detach(), expected_h, rtol=1e-4, atol=1e-4)


def test_modulation_by_the_identity():
    """With FC the identity and orthogonal columns, ``A A^T A / n = A``."""
    a = torch.linalg.qr(torch.randn(16, 6, dtype=torch.float64))[0] * 4
    torch.testing.assert_close(modulate(a, a, torch.nn.Identity()), a)


def test_regions_do_not_see_each_other():
    module = randomized(CrossModalModulation(6, 4))
    f_y, f_h = torch.randn(1, 6, 8, 8), torch.randn(1, 6, 8, 8)
    other = f_h.clone()
    other[..., :4, :4] += 1
    one, two = module(f_y, f_h)[0], module(f_y, other)[0]
    assert torch.equal(one[..., 4:, :], two[..., 4:, :])
    assert torch.equal(one[..., :4, 4:], two[..., :4, 4:])
    assert not torch.allclose(one[..., :4, :4], two[..., :4, :4], atol=1e-3)


# ---- disentangling --------------------------------------------------------------------------------------------------


def test_disentangling_loss_written_out():
    s_y, s_h, u_y, u_h = torch.randn(4, 2, 5, 3, 4, dtype=torch.float64).numpy()

    def distance(a, b):
        a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
        return ((a - b) ** 2).mean()

    expected = np.sqrt((distance(s_y, s_h) + 1e-8) / (distance(u_y, u_h) + 1e-3))
    assert float(disentangling_loss(*map(torch.as_tensor, (s_y, s_h, u_y, u_h)))) == pytest.approx(expected)


def test_disentangling_loss_wants_shared_alike_and_unique_apart():
    s_y, s_h, u_y, u_h = torch.randn(4, 2, 5, 3, 4)
    loss = disentangling_loss(s_y, s_h, u_y, u_h)
    torch.testing.assert_close(disentangling_loss(s_h, s_y, u_h, u_y), loss)
    torch.testing.assert_close(disentangling_loss(3 * s_y, s_h, u_y, 100 * u_h), loss)  # growing features gain nothing
    assert disentangling_loss(s_y, s_y, u_y, u_h) < 1e-2 * loss
    assert disentangling_loss(s_y, s_h, u_y, -u_y) < loss < disentangling_loss(s_y, s_h, u_y, u_y)
    assert torch.isfinite(disentangling_loss(*torch.zeros(4, 1, 5, 2, 2)))


def test_both_modalities_go_through_the_same_convolutions():
    module = randomized(Disentangling(8))
    f = torch.randn(2, 8, 5, 5)
    shared, unique = module(f)
    assert shared.shape == unique.shape == (2, 4, 5, 5)
    torch.testing.assert_close(shared, module.shared(f) * module.shared(f).sigmoid())
    torch.testing.assert_close(unique, module.unique(f) * module.unique(f).sigmoid())


def image_features(model, batch):
    """Those of a model without hierarchy."""
    return model.tissue[1](model.tissue[0](model.image_scale(batch["h"])))


def test_condition_is_the_image_with_shared_mean_and_both_unique():
    model = diffst(modulation=False, hierarchy=False)
    batch = inputs(model)
    f_h = image_features(model, batch)
    features, (s_y, s_h, u_y, u_h) = model.encode(batch)
    torch.testing.assert_close(features, f_h + model.fuse(torch.cat([(s_y + s_h) / 2, u_h, u_y], 1)))
    assert all(map(torch.equal, model.disentangling(f_h), (s_h, u_h)))
    assert diffst(disentangle=False).encode(batch)[1] is None


# ---- the graph of genes: Eq. 4 --------------------------------------------------------------------------------------


def test_co_expression_intensity_written_out():
    y = np.random.default_rng(0).gamma(0.5, 1.0, (4, 30))
    y[:, :5] = 0
    z = y / y.max(1, keepdims=True)
    p = np.array(
        [[sum(min(a, b) for a, b in zip(z[i], z[j], strict=True)) / z[j].sum() for j in range(4)] for i in range(4)]
    )
    expected = (p + p.T) / 2
    np.testing.assert_allclose(np.diag(expected), 1)
    np.testing.assert_allclose(
        co_expression_intensity(torch.as_tensor(y)), expected / expected.sum(1, keepdims=True), rtol=1e-6
    )


def test_co_expression_intensity_of_known_genes():
    y = torch.rand(5, 40) + 0.01
    y[1] = 3 * y[0]  # the same gene on another scale
    y[2, :20], y[3, 20:] = 0, 0  # genes that are never together
    y[4] = 0  # a gene without expression
    intensity = co_expression_intensity(y)
    torch.testing.assert_close(intensity.sum(1), torch.ones(5))
    torch.testing.assert_close(intensity[0, 1], intensity[0, 0])
    assert intensity[2, 3] == intensity[3, 2] == 0
    assert intensity[4].tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(co_expression_intensity(y * torch.rand(5, 1)), intensity)
    assert torch.equal(co_expression_intensity(torch.rand(1, 9)), torch.ones(1, 1))


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_graph_update_written_out(alpha):
    f_x, weighted = np.random.default_rng(0).normal(size=(2, 2, 5, 7))
    intensity = np.random.default_rng(1).random((5, 5))
    expected = np.stack([alpha * leaky(intensity @ weighted[b]) + (1 - alpha) * f_x[b] for b in range(2)])
    found = graph_update(*map(torch.as_tensor, (f_x, weighted, intensity)), alpha)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("full", [True, False])
def test_graph_network_written_out(full):
    """Nodes are means of squares of bins, also of those cut by the edge; the result is repeated over the squares."""
    node, side, rows = 4, 14 if full else 16, 4
    graph = randomized(CoExpressionGraph(3, node, 0.3, rows if full else None))
    graph.intensity.copy_(torch.rand(3, 3))
    x_t = torch.randn(2, 3, side, side)
    found = graph(x_t).detach().numpy()
    x, intensity = x_t.double().numpy(), graph.intensity.double().numpy()
    weight = graph.weight.weight.detach().double().numpy()
    for b in range(2):
        f_x = np.array([[[x[b, g, i : i + node, j : j + node].mean() for j in range(0, side, node)] for i in range(0, side, node)] for g in range(3)])  # fmt: skip
        flat = f_x.reshape(3, -1)
        if full:
            weighted = flat @ weight.T
        else:
            padded = np.pad(f_x, ((0, 0), (1, 1), (1, 1)))
            weighted = sum(
                weight[0, 0, i, j] * padded[:, i : i + rows, j : j + rows] for i in range(3) for j in range(3)
            ).reshape(3, -1)
        out = 0.3 * leaky(intensity @ weighted) + 0.7 * flat
        expected = out.reshape(3, rows, rows).repeat(node, 1).repeat(node, 2)[:, :side, :side]
        np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-5)


def test_graph_without_weight_on_the_graph():
    graph = CoExpressionGraph(3, 4, alpha=0.0)
    x_t = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(graph(x_t), F.interpolate(F.avg_pool2d(x_t, 4), scale_factor=4))


def test_graph_is_fitted_on_low_resolution_maps(data):
    graph = CoExpressionGraph(3, 4, 0.2)
    assert torch.equal(graph.intensity, torch.eye(3))
    graph.fit(data)
    y = torch.cat([F.avg_pool2d(batch["y"], 4)[0].flatten(1) for batch in data.some(len(data))], 1)
    torch.testing.assert_close(graph.intensity, co_expression_intensity(y))


def test_genes_see_each_other_through_the_graph():
    graph = randomized(CoExpressionGraph(3, 4, 0.2))
    graph.intensity.copy_(torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))
    x_t = torch.randn(1, 3, 8, 8)
    other = x_t.clone()
    other[:, 0] += 1
    change = (graph(other) - graph(x_t)).abs().amax((0, 2, 3))
    assert change[0] > 0.1
    assert change[1] > 1e-3
    assert change[2] == 0


# ---- switches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_removes_its_parameters_and_no_others(switch):
    whole, part = names(diffst()), names(diffst(**{switch: False}))
    own = {name for name in whole if name.startswith(PARTS[switch])}
    assert own
    assert set(whole) - own == set(part)
    others = {name for name in part if part[name] != whole[name]}
    assert others == {
        "graph": {"unet.enter.weight"},
        "residual": {"unet.enter.weight"},
        "disentangle": {"fuse.weight"},
    }.get(switch, set()) | ({"unet.down.0.0.skip.weight"} & others)


@pytest.mark.parametrize("switch", [*SWITCHES, "curriculum"])
def test_switch_changes_the_result(switch):
    whole, part = diffst(), diffst(**{switch: False})
    own = part.state_dict()
    shared = {k: v for k, v in whole.state_dict().items() if k in own}
    for name in ("fuse.weight", "unet.enter.weight"):  # they take more inputs, or fewer
        shared[name] = F.pad(shared[name], (0, 0, 0, 0, 0, own[name].shape[1] - shared[name].shape[1]))
    part.load_state_dict(shared)
    batch = inputs(whole)
    for model in (whole, part):
        if model.cells is not None:
            model.cells.fit([model.image_scale(batch["h"])])
    draws = [m.sample(batch, 1, 2, torch.Generator().manual_seed(0)) for m in (whole, part)]
    assert draws[0].shape == draws[1].shape
    assert not torch.allclose(*draws, atol=1e-3)


def test_everything_can_be_switched_off():
    model = diffst(**dict.fromkeys([*SWITCHES, "curriculum"], False))
    batch = inputs(model)
    assert model.sample(batch, 2, 2).shape == (2, 2, 3, *batch["y"].shape[2:])
    assert model.align == 2  # what is left is the U-Net
    assert set(model.loss({**batch, "x": batch["y"]})) == {"loss", "mse"}


def test_without_modulation_features_are_only_concatenated():
    model = diffst(modulation=False, disentangle=False, hierarchy=False)
    batch = inputs(model)
    y = torch.cat([batch["y"] / model.gene_scale.of(batch["y"]), batch["valid"]], 1)
    f_h, f_y = image_features(model, batch), model.spots[1](model.spots[0](y))
    torch.testing.assert_close(model.encode(batch)[0], f_h + model.fuse(torch.cat([f_h, f_y], 1)))


# ---- how it starts --------------------------------------------------------------------------------------------------


def test_modulation_and_hierarchy_add_nothing_at_first():
    model = diffst(random=False)
    f_y, f_h = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    assert all(map(torch.equal, model.modulation(f_y, f_h), (f_y, f_h)))
    batch = inputs(model, side=8)
    assert (model.cells(f_h, batch["h"], 0.0) == 0).all()
    for switch in ("modulation", "hierarchy"):
        part = diffst(random=False, **{switch: False})
        part.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(PARTS[switch])})
        torch.testing.assert_close(part.encode(batch)[0], model.encode(batch)[0])


@pytest.mark.parametrize("learned_variance", [False, True])
def test_untrained_output_is_exactly_zero(learned_variance):
    model = diffst(random=False, learned_variance=learned_variance)
    batch = inputs(model)
    cond = model.condition(batch)
    assert (cond["mean"] == 0).all()
    x_t = torch.randn(2, 3, *batch["y"].shape[2:])
    output = model.denoise(x_t, torch.tensor([0, 500]), cond)
    assert output.shape == ((2, 2) if learned_variance else (2,)) + x_t.shape[1:]
    assert (output == 0).all()


def test_untrained_model_samples_its_mean():
    """A network that says x_0 = 0 adds nothing to the predicted mean."""
    model = diffst(random=False, prediction="x_0")
    randomized(model.mean)
    batch = inputs(model)
    cond = model.condition(batch)
    drawn = model.sample(batch, 2, 3)
    torch.testing.assert_close(drawn, (cond["mean"] * cond["scale"])[:, None].expand(-1, 2, -1, -1, -1))


def test_same_seed_same_weights(data):
    hashes = []
    for seed in (3, 3, 4):
        model = diffst(random=seed == 4)
        model.fit(data, steps=1, **{**QUICK, "seed": seed})
        hashes.append(model.weights_sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_constants_are_fitted_wherever_the_model_is(data, monkeypatch):
    """Data stay on the CPU; the model may have been left on an accelerator by the fit before. ``meta`` stands in."""
    monkeypatch.setattr(stgen.train, "fit", lambda *_, **__: {})
    model = diffst().to("meta")
    model.record = {"sections": ["one"]}
    assert model.fit(data, steps=1) == {}


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned_variance", [False, True])
def test_terms_add_up_to_the_loss(data, learned_variance):
    model = diffst(learned_variance=learned_variance, disentangling_weight=0.3)
    losses = model.loss(batch_of(data, 0, 7))
    expected = losses["mse"] + losses["mean"] + 0.3 * losses["disentangling"]
    if learned_variance:
        expected = expected + losses["vlb"]
    torch.testing.assert_close(losses["loss"], expected)
    assert set(losses) == {"loss", "mse", "mean", "disentangling"} | ({"vlb"} if learned_variance else set())
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


def test_each_term_is_what_it_says(data):
    model = diffst(prediction="x_0")
    batch = batch_of(data, 0, 7)
    assert (batch["tissue"] == 0).any()
    features, split = model.encode(batch)
    cond = model.condition(batch)
    torch.manual_seed(1)
    losses = model.loss(batch)
    torch.testing.assert_close(losses["disentangling"], disentangling_loss(*split))
    error = (batch["x"] / cond["scale"] - cond["mean"]) * batch["tissue"]
    torch.testing.assert_close(losses["mean"], error.square().sum() / (3 * batch["tissue"].sum()))
    torch.manual_seed(1)
    t = torch.randint(model.diffusion.timesteps, (2,))
    x_0 = model.to_network(batch["x"], cond)
    x_t = model.diffusion.add_noise(x_0, torch.randn_like(x_0), t)
    mse = weighted_mean((model.denoise(x_t, t, cond) - x_0).square(), batch["tissue"])
    torch.testing.assert_close(losses["mse"], mse.detach())


def test_unknown_bins_do_not_matter_to_the_targets(data):
    model = diffst(prediction="x_0", graph=False, widths=[8])
    for part in (model.unet, model.mean):  # networks that see one bin at a time
        for layer in part.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                with torch.no_grad():
                    layer.weight *= torch.zeros(3, 3).index_put_((torch.tensor(1), torch.tensor(1)), torch.tensor(1.0))
    batch = batch_of(data, 0)
    losses = []
    for value in (0.0, 50.0):
        torch.manual_seed(2)
        changed = {**batch, "x": torch.where(batch["tissue"] > 0, batch["x"], value)}
        losses.append(model.loss(changed))
    torch.testing.assert_close(losses[0]["mean"], losses[1]["mean"])
    torch.testing.assert_close(losses[0]["mse"], losses[1]["mse"])


TOUCHED = {  # by the gradient of each term
    "denoising": {"tissue", "cells", "spots", "modulation", "disentangling", "fuse", "graph", "time", "unet"},
    "mean": {"tissue", "cells", "spots", "modulation", "disentangling", "fuse", "mean"},
    "disentangling": {"tissue", "cells", "spots", "modulation", "disentangling"},
}


@pytest.mark.parametrize("term", TOUCHED)
def test_gradient_of_each_term_reaches_what_it_should(data, term):
    model = diffst()
    model.cells.entropies.zero_()
    losses = model.loss(batch_of(data, 7, 8))
    if term == "denoising":
        loss = losses["loss"] - losses["mean"] - model.config["disentangling_weight"] * losses["disentangling"]
    else:
        loss = losses[term]
    loss.backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
    assert reached == TOUCHED[term]


def test_few_steps_lower_the_loss(data):
    model = diffst(random=False)
    history = model.fit(data, map_data(stride=16), steps=16, evaluate_every=8, lr=1e-2, **{**QUICK, "batch_size": 4})
    assert history["validation"][-1] < 0.95 * history["validation"][0]
    assert history["mean"][-1] < history["mean"][0]
    assert history["mse"][-1] < history["mse"][0]


# ---- scales, windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["std", "quantile", "map"])
@pytest.mark.parametrize("residual", [True, False])
def test_network_scale_and_back(data, scale, residual):
    model = diffst(scale=scale, residual=residual)
    model.gene_scale.fit(data)
    batch = batch_of(data, 0, 8)
    cond = model.condition(batch)
    z = model.to_network(batch["x"], cond)
    torch.testing.assert_close(model.from_network(z, cond), batch["x"], rtol=1e-4, atol=1e-4)
    assert ("mean" in cond) == residual
    expected = model.gene_scale.scale[None].expand(2, -1)
    if scale == "map":
        expected = batch["y"].amax((2, 3)) - batch["y"].amin((2, 3))
    torch.testing.assert_close(cond["scale"][:, :, 0, 0], expected)
    if not residual:
        torch.testing.assert_close(z, batch["x"] / expected[:, :, None, None])


def test_windows_must_be_aligned():
    model = diffst()
    wrong = inputs(model, side=2 * model.align + 2)
    for call in (model.condition, lambda batch: model.loss({**batch, "x": batch["y"]}), model.sample):
        with pytest.raises(ValueError, match=f"windows whose sides are multiples of {model.align} bins, found"):
            call(wrong)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"region": 6},
        {"region": 6, "modulation": False},
        {"hierarchy": False},
        {"graph": False, "widths": [8, 8, 8]},
        {"bin_um": 20.0},
    ],
)
def test_aligned_windows_are_taken(options):
    model = diffst(**options)
    for height, width in ((1, 1), (1, 2)):
        batch = inputs(model, batch_size=1, side=2 * model.align)
        h, w = height * model.align, width * model.align
        px = model.config["px_per_bin"]
        batch = {k: v[..., : h * (px if k == "h" else 1), : w * (px if k == "h" else 1)] for k, v in batch.items()}
        assert model.sample(batch, 1, 1).shape == (1, 1, 3, h, w)


def test_far_away_does_not_matter():
    """Condition and denoiser see a bounded neighborhood: the rest of the window may be anything."""
    model = diffst(bin_um=40.0, px_per_bin=1, reach=1)
    far = model.align * math.ceil(40 / model.align)
    side = 2 * far + 2 * model.align
    one, two = inputs(model, batch_size=1, side=side), inputs(model, batch_size=1, side=side, seed=1)
    middle = side // 2
    near = (torch.arange(side) - middle).abs() < far
    near = near[:, None] & near
    two = {name: torch.where(near, one[name], value) for name, value in two.items()}
    generator = torch.Generator().manual_seed(0)
    x_t, other = torch.randn(2, 1, 3, side, side, generator=generator)
    other = torch.where(near, x_t, other)
    core = np.s_[..., middle : middle + 2, middle : middle + 2]
    conditions = [model.condition(batch) for batch in (one, two)]
    t = torch.tensor([300])
    for name in ("features", "mean"):
        torch.testing.assert_close(conditions[0][name][core], conditions[1][name][core], rtol=1e-5, atol=1e-5)
    outputs = [model.denoise(x, t, cond) for x, cond in zip((x_t, other), conditions, strict=True)]
    torch.testing.assert_close(outputs[0][core], outputs[1][core], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=0.1)


# ---- presets --------------------------------------------------------------------------------------------------------

N_PAPER = [f"g{i}" for i in range(25)]


def paper(**options):
    with torch.device("meta"):
        return DiffST(N_PAPER, preset="paper", **options)


def test_paper_preset_is_table_3():
    model = paper()
    assert (model.config["width"], model.config["region"], model.config["alpha"]) == (128, 32, 0.2)
    assert (
        model.cells.key.weight.shape == model.cells.query.weight.shape == model.cells.value.weight.shape == (128, 128)
    )
    assert model.modulation.region == 32
    assert model.graph.weight.weight.shape == (676, 676)
    assert model.graph.alpha == 0.2
    assert (model.align, model.tile, model.halo) == (256, 256, 0)
    with torch.device("meta"):
        px = model.config["px_per_bin"]
        assert model.cells.patches(torch.zeros(1, 3, 256 * px, 256 * px)).shape[1] == 256
    assert (model.config["scale"], model.config["residual"], model.mean) == ("map", False, None)
    assert (model.diffusion.prediction, model.diffusion.timesteps, model.diffusion.schedule) == (
        "epsilon",
        1000,
        "linear",
    )
    assert all(model.config[switch] for switch in ("modulation", "graph", "hierarchy", "disentangle", "curriculum"))
    assert 30e6 < sum(p.numel() for p in model.parameters()) < 60e6


def test_paper_preset_trains_as_the_paper(monkeypatch):
    options = {}
    monkeypatch.setattr(stgen.train, "fit", lambda *args, **kwargs: options.update(kwargs) or {})
    model = diffst(preset="paper", hierarchy=False, graph=False)
    model.fit(map_data(), steps=7)
    assert (options["batch_size"], options["lr"], options["weight_decay"], options["steps"]) == (4, 1e-4, 1e-5, 7)


@pytest.mark.parametrize(("options", "side"), [({}, 256), ({"factor": 5, "bin_um": 20.0}, 128)])
def test_paper_preset_takes_its_tiles_and_no_others(options, side):
    model = paper(**options)
    px = model.config["px_per_bin"]
    with torch.device("meta"):
        batch = {
            "h": torch.zeros(1, 3, side * px, side * px), "y": torch.zeros(1, 25, side, side),
            "valid": torch.zeros(1, 1, side, side),
        }  # fmt: skip
        cond = model.condition(batch)
        assert cond["features"].shape == (1, 128, side, side)
        output = model.denoise(torch.zeros(1, 25, side, side), torch.zeros(1, dtype=torch.long), cond)
    assert output.shape == (1, 25, side, side)
    assert model.graph.weight.weight.shape == (676, 676)
    for wrong in (side // 2, 2 * side):
        with pytest.raises(
            ValueError, match=rf"takes tiles of {side} x {side} bins and no others, found {wrong} x {wrong}"
        ):
            model.check_window(wrong, wrong)


def test_arguments_override_the_preset():
    assert diffst(preset="paper", residual=True, mean_widths=None, bin_um=160.0).mean is not None
    model = diffst(preset="paper", alpha=0.5, scale="std")
    assert (model.config["width"], model.config["alpha"], model.config["scale"]) == (8, 0.5, "std")
    assert model.config["widths"] == [8, 8]
    with pytest.raises(ValueError, match="must be one of 'default', 'paper', found 'large'"):
        DiffST(GENES, preset="large")


# ---- any genes, any image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_genes", [1, 300])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_any_number_of_genes(n_genes, preset):
    model = diffst([f"g{i}" for i in range(n_genes)], preset=preset, bin_um=160.0 if preset == "paper" else 40.0)
    batch = inputs(model, batch_size=1, side=model.align)
    assert model.sample(batch, 2, 1).shape == (1, 2, n_genes, model.align, model.align)
    losses = model.loss({**batch, "x": batch["y"]})
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_any_number_of_image_channels(channels):
    model = diffst(image_channels=channels)
    assert model.sample(inputs(model), 1, 1).shape[:3] == (2, 1, 3)


def test_embedding_map_with_one_pixel_per_bin():
    model = diffst(image_channels=16, px_per_bin=1)
    batch = inputs(model)
    assert batch["h"].shape[2:] == batch["y"].shape[2:]
    assert model.sample(batch, 1, 1).shape == (2, 1, 3, *batch["y"].shape[2:])
    other = {**batch, "h": batch["h"].flip(-1)}
    assert not torch.allclose(model.condition(batch)["features"], model.condition(other)["features"], atol=1e-3)


@pytest.mark.parametrize("what", ["h", "y", "valid", "x_t", "t"])
def test_every_input_matters(what):
    model = diffst()
    batch, t = inputs(model), torch.tensor([100, 200])
    x_t = torch.randn(2, 3, *batch["y"].shape[2:])
    before = model.denoise(x_t, t, model.condition(batch))
    batch = {name: value.flip(2) + (name != "h") if name == what else value for name, value in batch.items()}
    after = model.denoise(x_t.flip(2) if what == "x_t" else x_t, t + 300 * (what == "t"), model.condition(batch))
    assert ((after - before).abs().amax((1, 2, 3)) > 1e-3).all()


# ---- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm"])
def test_noise_is_taken_from_where_it_is_told(trained, data, solver):
    batch = batch_of(data, 3)
    calls = []

    def noise():
        calls.append(torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(len(calls))))
        return calls[-1]

    drawn = trained.sample(batch, 2, 3, solver=solver, noise=noise)
    assert len(calls) == (3 if solver == "ddpm" else 1)
    count = len(calls)
    calls.clear()
    assert torch.equal(trained.sample(batch, 2, 3, solver=solver, noise=noise), drawn)
    assert len(calls) == count
    assert not torch.allclose(drawn[:, 0], drawn[:, 1])


def test_samples_are_projected_at_every_step(trained, data):
    batch = batch_of(data, 3, 4)
    seen = []
    target = torch.rand(3, 16, 16)

    def project(x):
        seen.append(x)
        return target.expand_as(x)

    drawn = trained.sample(batch, 2, 5, project=project)
    assert [tuple(x.shape) for x in seen] == [(4, 3, 16, 16)] * 5
    torch.testing.assert_close(drawn, target.expand(2, 2, -1, -1, -1), rtol=1e-4, atol=1e-4)
    plain = []  # what it is given last, on the scale of the expression, is the result
    trained.sample(batch, 2, 5, torch.Generator().manual_seed(0), project=lambda x: plain.append(x) or x)
    drawn = trained.sample(batch, 2, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain[-1].unflatten(0, (2, 2)), drawn, rtol=1e-3, atol=1e-3)


def test_items_do_not_see_each_other(trained, data):
    def draw(*rows):
        return trained.sample(batch_of(data, *rows), 2, 3, [torch.Generator().manual_seed(i) for i in rows])

    together = draw(0, 3, 5)
    torch.testing.assert_close(draw(3), together[1:2], rtol=1e-3, atol=1e-4)
    assert torch.equal(draw(5), draw(5))


def test_saved_and_restored_model_gives_the_same_samples(trained, data, tmp_path):
    restored = models.load(trained.save(tmp_path))
    assert type(restored) is DiffST
    assert restored.config == trained.config
    assert restored.weights_sha256() == trained.weights_sha256()
    assert (restored.align, restored.halo, restored.progress) == (trained.align, trained.halo, 1.0)
    draws = [m.sample(batch_of(data, 2), 2, 3, torch.Generator().manual_seed(1)) for m in (trained, restored)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("options", [{}, {"preset": "paper", "bin_um": 160.0, "graph": False}])
def test_configuration_makes_the_same_model(options):
    model = diffst(**options)
    again = DiffST(**model.config)
    assert again.config == model.config
    assert names(again) == names(model)


def test_resumed_run_ends_as_an_uninterrupted_one(data, tmp_path, monkeypatch):
    options = {**QUICK, "steps": 4, "evaluate_every": 2}
    whole = diffst(random=False)
    history = whole.fit(data, **options)
    update = stgen.train._State.update

    def dies(state, *args):
        if state.step == 3:
            raise KeyboardInterrupt
        update(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stgen.train._State, "update", dies)
        with pytest.raises(KeyboardInterrupt):
            diffst(random=False).fit(data, checkpoint=tmp_path / "run", **options)
    resumed = diffst(random=False)
    assert resumed.fit(data, checkpoint=tmp_path / "run", **options) == history
    assert resumed.weights_sha256() == whole.weights_sha256()
