from __future__ import annotations

import copy
import json
import math
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.models import conftest
from tests.models.conftest import QUICK, as_double, batch_of, randomized
from tests.models.conftest import shapes_of as names
from torch import nn

import stgen.train
from stgen import models
from stgen.data import MapData
from stgen.diffusion import Diffusion
from stgen.models import HaDMST, _map_diffusion
from stgen.models._layers import draw_weights, timestep_embedding
from stgen.models.hadmst import model as hadmst_model
from stgen.models.hadmst import networks
from stgen.models.hadmst.discriminator import (
    NODE,
    DiscriminatorOutput,
    GeneDiscriminator,
    gene_graph,
    graph_convolution,
)
from stgen.models.hadmst.losses import (
    PAIRS,
    TAU,
    adversarial_loss,
    alignment_loss,
    cosine_loss,
    distillation_loss,
    euclidean_loss,
    hinge_loss,
    info_nce_loss,
    low_noise_mask,
    region_pairs,
)
from stgen.models.hadmst.networks import Alignment, GeneHead, SemanticTransformer, TransformerLayer
from stgen.models.hadmst.options import PRESETS

GENES = ["A", "B", "C"]
SMALL = {
    "factor": 4, "px_per_bin": 2, "width": 8, "semantic_width": 8, "token": 4, "window": 2, "heads": 2, "region": 4,
    "widths": [8, 8, 8], "mean_widths": [8, 8], "gene_width": 4, "text_dim": 16,
    "text_encoder": "hashed", "alignment_weight": 0.05,
}  # fmt: skip
WEIGHTS = {"mean": 1.0, "semantic": 0.1, "alignment": 0.05}  # of the terms of the default loss
DOUBLE = {"dtype": torch.float64}


inputs = partial(conftest.inputs, names=("h", "s", "text", "y", "valid"))
map_data = partial(conftest.map_data, side=32, tile=16, nuclei=True, text_dim=16)
reached = partial(conftest.reached, deep=("semantic",))


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    monkeypatch.setattr("stgen.models._maps.N_TILES", 16)


def hadmst(genes=GENES, *, random=True, **options):
    """A small model; its weights are always the same."""
    return copy.deepcopy(_hadmst_of(json.dumps([genes, {**SMALL, **options}]), random))


@lru_cache(maxsize=64)
def _hadmst_of(config, random):
    genes, options = json.loads(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HaDMST(genes, **options).eval()
        if not random:
            return model
        randomized(model, std=0.2)
        if model.semantic is not None:
            randomized(model.semantic, std=0.6)
        model.gene_scale.scale.uniform_(0.5, 2)
        if model.discriminator is not None:
            model.discriminator.draw()  # spectral norms do not follow weights that are set
            model.discriminator.edges.copy_(gene_graph(torch.rand(len(genes), 40), 2))
    return model


@pytest.fixture(scope="module")
def data():
    return map_data()


def states(model):
    """Weights of the model without its discriminator, and of that, with their buffers."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: value for name, value in state.items() if name.startswith("discriminator.")}
    return {name: value for name, value in state.items() if name not in own}, own


def different(one, two):
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


# ---- semantic distillation: the loss --------------------------------------------------------------------------------


def distillation_by_loops(predicted, x, known, token):
    total = weight = 0.0
    for b, g, i, j in np.ndindex(predicted.shape):
        cell = np.s_[token * i : token * (i + 1), token * j : token * (j + 1)]
        bins, where = x[b, g][cell], known[b, 0][cell]
        share = where.mean()
        if share:
            total += share * abs(predicted[b, g, i, j] - (bins * where).sum() / where.sum())
            weight += share
    return total / weight if weight else 0.0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("token", [1, 2, 4])
def test_distillation_loss_written_out(token, masked):
    predicted, x = torch.randn(2, 3, 8 // token, 12 // token, **DOUBLE), torch.randn(2, 3, 8, 12, **DOUBLE)
    known = torch.ones(2, 1, 8, 12, **DOUBLE)
    if masked:
        known[0, 0, :4, :4], known[0, 0, 5, :], known[1, 0, :, 7] = 0, 0, 0
    expected = distillation_by_loops(predicted.numpy(), x.numpy(), known.numpy(), token)
    assert float(distillation_loss(predicted, x, known, token)) == pytest.approx(expected)
    other = torch.where(known > 0, x, 100.0)
    torch.testing.assert_close(
        distillation_loss(predicted, other, known, token), distillation_loss(predicted, x, known, token)
    )


def test_distillation_loss_of_nothing_known():
    predicted = torch.randn(2, 3, 2, 2, **DOUBLE, requires_grad=True)
    loss = distillation_loss(predicted, torch.randn(2, 3, 8, 8, **DOUBLE), torch.zeros(2, 1, 8, 8, **DOUBLE), 4)
    loss.backward()
    assert loss == 0
    assert (predicted.grad == 0).all()


def test_distillation_loss_of_the_truth():
    x = torch.randn(2, 3, 8, 8, **DOUBLE)
    assert float(distillation_loss(F.avg_pool2d(x, 4), x, torch.ones(2, 1, 8, 8, **DOUBLE), 4)) == pytest.approx(0)


# ---- cross-modal alignment ------------------------------------------------------------------------------------------


def embeddings(n=6, size=2, d=7):
    return F.normalize(torch.randn(2, size, n, d, **DOUBLE), dim=-1).unbind(0)


def seen_of(kind, size=2, n=6):
    seen = torch.ones(size, n, dtype=torch.bool)
    if kind == "some":
        seen[0, [1, 4]], seen[1, :4] = False, False
    elif kind == "one sample":
        seen[1] = False
    return seen & (kind != "none")


def some_pairs(n=6):
    return torch.rand(2, 2, n, n) < 0.3


def mean_of(values):
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("none", [False, True])
def test_cosine_and_euclidean_losses_written_out(none):
    z_h, z_y = embeddings()
    positive, negative = some_pairs() & (not none)
    pairs = list(np.ndindex(2, 6, 6))
    s = {(b, j, k): float(z_h[b, j] @ z_y[b, k]) for b, j, k in pairs}
    d = {(b, j, k): float((z_h[b, j] - z_y[b, k]).square().sum().sqrt()) for b, j, k in pairs}
    expected = mean_of([1 - s[p] for p in pairs if positive[p]]) + mean_of([max(0, s[p]) for p in pairs if negative[p]])
    assert float(cosine_loss(z_h @ z_y.mT, positive, negative)) == pytest.approx(expected)
    expected = mean_of([d[p] ** 2 for p in pairs if positive[p]]) + mean_of(
        [max(0, 1 - d[p]) ** 2 for p in pairs if negative[p]]
    )
    assert float(euclidean_loss(z_h, z_y, positive, negative)) == pytest.approx(expected)
    assert (expected == 0) == none


def test_euclidean_loss_counts_near_negatives():
    """Embeddings at random are far apart: those that are near one another make the second term."""
    z_h, _ = embeddings()
    z_y = F.normalize(z_h + 0.1 * torch.randn_like(z_h), dim=-1)
    negative = torch.eye(6, dtype=torch.bool).expand(2, -1, -1)
    d = (z_h - z_y).square().sum(-1).sqrt()
    assert (d < 1).all()
    torch.testing.assert_close(euclidean_loss(z_h, z_y, torch.zeros_like(negative), negative), (1 - d).square().mean())


@pytest.mark.parametrize("tau", [TAU, 0.5])
@pytest.mark.parametrize("kind", ["all", "some", "one sample", "none"])
def test_info_nce_written_out(kind, tau):
    z_h, z_y = embeddings()
    seen, similarity, terms = seen_of(kind), z_h @ z_y.mT, []
    for b in range(2):
        here = [j for j in range(6) if seen[b, j]]
        for j in here:
            for line in (similarity[b, j], similarity[b, :, j]):
                e = [math.exp(float(line[k]) / tau) for k in here]
                terms.append(-math.log(math.exp(float(line[j]) / tau) / sum(e)))
    assert float(info_nce_loss(similarity, seen, tau)) == pytest.approx(mean_of(terms))
    assert bool(terms) == (kind != "none")


def test_info_nce_of_regions_that_are_all_alike():
    similarity, seen = torch.full((2, 6, 6), 0.7, **DOUBLE), seen_of("all")
    assert float(info_nce_loss(similarity, seen)) == pytest.approx(math.log(6))
    seen[:, 2:] = False
    assert float(info_nce_loss(similarity, seen)) == pytest.approx(math.log(2))
    seen[:, 1:] = False
    assert float(info_nce_loss(similarity, seen)) == 0


def pairs_by_loops(similarity, seen, near, share):
    positive, negative = np.zeros((2, *similarity.shape), bool)
    for b in range(len(similarity)):
        both = [(j, k) for j, k in np.ndindex(similarity.shape[1:]) if seen[b, j] and seen[b, k]]
        together = sorted((p for p in both if near[p]), key=lambda p: -similarity[b][p])
        chosen = together[: math.ceil(round(share * len(together), 6))]
        apart = sorted((p for p in both if p not in chosen), key=lambda p: similarity[b][p])
        for p in chosen:
            positive[b][p] = True
        for p in apart[: math.ceil(round(share * len(both), 6))]:
            negative[b][p] = True
    return positive, negative


@pytest.mark.parametrize("share", [0.1, 0.25, PAIRS, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["all", "some", "one sample", "none"])
def test_pairs_of_regions_written_out(kind, share):
    similarity, seen, near = torch.randn(2, 6, 6, **DOUBLE), seen_of(kind), torch.rand(6, 6) < 0.4
    found = region_pairs(similarity, seen, near, share)
    expected = pairs_by_loops(similarity.numpy(), seen.numpy(), near.numpy(), share)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not (found[0] & found[1]).any()


@pytest.mark.parametrize("side", [4, 8, 10, 20])
def test_thirty_percent_are_thirty_percent(side):
    """Of the pairs of the regions of a tile, to the pair."""
    n = side**2
    similarity, seen = torch.randn(1, n, n), torch.ones(1, n, dtype=torch.bool)
    near = torch.ones(n, n, dtype=torch.bool)
    positive, negative = region_pairs(similarity, seen, near)
    assert int(positive.sum()) == int(negative.sum()) == -(-3 * n**2 // 10)


def test_regions_that_are_all_alike_are_counted_once():
    similarity, seen = torch.zeros(2, 6, 6), seen_of("some")
    positive, negative = region_pairs(similarity, seen, torch.ones(6, 6, dtype=torch.bool))
    both = seen[:, :, None] & seen[:, None]
    assert positive.sum((1, 2)).tolist() == negative.sum((1, 2)).tolist() == [math.ceil(0.3 * 16), math.ceil(0.3 * 4)]
    assert not ((positive | negative) & ~both).any()
    assert not (positive & negative).any()


def test_a_single_region():
    seen, similarity = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[[0.4]]])
    positive, negative = region_pairs(similarity, seen, torch.ones(1, 1, dtype=torch.bool))
    assert positive.all()
    assert not negative.any()


def test_regions_are_the_same_or_touch():
    module = Alignment(8, 4)
    near = module.near(torch.ones(3, 2, 3))
    for j, k in np.ndindex(6, 6):
        assert bool(near[j, k]) == (max(abs(j // 3 - k // 3), abs(j % 3 - k % 3)) <= 1)


def test_embeddings_of_regions_written_out():
    module = randomized(Alignment(8, 4)).double()
    f_h, f_y, valid = torch.randn(2, 8, 8, 12, **DOUBLE), torch.randn(2, 8, 8, 12, **DOUBLE), torch.ones(2, 1, 8, 12)
    valid[0, 0, :4, :2], valid[0, 0, :4, 4:6], valid[1, 0, 0, 8] = 0, 0, 0
    valid[0, 0, 0, 0] = 1  # nine of sixteen bins against eight
    found = module(f_h, f_y, valid.double())
    for layer, f, z in zip((module.of_h, module.of_y), (f_h, f_y), found, strict=False):
        for b, i, j in np.ndindex(2, 2, 3):
            raw = layer.weight @ f[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((1, 2)) + layer.bias
            torch.testing.assert_close(z[b, i, j], raw / (raw**2).sum().sqrt())
    assert found[2].tolist() == [[[True, False, True], [True] * 3], [[True] * 3] * 2]


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("kind", ["all", "some", "one sample"])
def test_alignment_loss_is_the_sum_of_its_terms(kind, weights):
    z_h, z_y = embeddings()
    seen, near = seen_of(kind), Alignment(8, 4).near(torch.ones(2, 2, 3))
    similarity = z_h @ z_y.mT
    positive, negative = map(torch.as_tensor, pairs_by_loops(similarity.numpy(), seen.numpy(), near.numpy(), 0.3))
    expected = (
        cosine_loss(similarity, positive, negative)
        + weights[0] * euclidean_loss(z_h, z_y, positive, negative)
        + weights[1] * info_nce_loss(similarity, seen)
    )
    found = alignment_loss(*(z.unflatten(1, (2, 3)) for z in (z_h, z_y)), seen.unflatten(1, (2, 3)), near, *weights)
    torch.testing.assert_close(found, expected)
    assert found > 0


@pytest.mark.parametrize("kind", ["some", "one sample", "none", "alike"])
def test_alignment_loss_has_finite_gradients(kind):
    """Regions that were not seen take no part; where none was, there is no loss."""
    raw = torch.randn(2, 2, 2, 3, 7, **DOUBLE)
    raw = (raw[:1].expand_as(raw) if kind == "alike" else raw).clone().requires_grad_()
    seen, near = seen_of("all" if kind == "alike" else kind).unflatten(1, (2, 3)), Alignment(8, 4).near(seen_of("all").unflatten(1, (2, 3)))  # fmt: skip
    loss = alignment_loss(*F.normalize(raw, dim=-1), seen, near, 0.1, 1.0)
    loss.backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[:, ~seen] == 0).all()
    assert (raw.grad[:, seen].abs().amax(-1) > 0).all() or kind == "alike"
    assert (loss == 0) == (kind == "none")


# ---- the graph of genes ---------------------------------------------------------------------------------------------


def graph_by_loops(y, neighbors):
    n = len(y)
    c = np.zeros((n, n))
    for i, j in np.ndindex(n, n):
        a, b = y[i] - y[i].mean(), y[j] - y[j].mean()
        length = np.sqrt((a**2).sum() * (b**2).sum())
        c[i, j] = abs((a * b).sum()) / length if i != j and length > 0 else 0
    nearest = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: -c[i, j])[:neighbors] for i in range(n)]
    a = np.array([[1.0 if i == j else c[i, j] * (j in nearest[i] or i in nearest[j]) for j in range(n)] for i in range(n)])  # fmt: skip
    return a / np.sqrt(np.outer(a.sum(1), a.sum(1)))


@pytest.mark.parametrize("neighbors", [1, 2, 4, 8])
def test_gene_graph_written_out(neighbors):
    y = np.random.default_rng(0).gamma(0.5, size=(6, 30))
    y[1] = 5 * y[0] + 0.1 * y[1]
    y[3] = 0.3 * y[3] - y[2]
    found = gene_graph(torch.as_tensor(y), neighbors).numpy()
    np.testing.assert_allclose(found, graph_by_loops(y, neighbors), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found, found.T)
    assert np.linalg.eigvalsh(found).max() == pytest.approx(1, abs=1e-5)
    assert found[2, 3] > 0.2  # of opposite genes, too


def test_gene_graph_is_of_correlations():
    y = torch.rand(5, 40)
    moved = (torch.rand(5, 1) + 0.5) * y + torch.randn(5, 1)
    torch.testing.assert_close(gene_graph(moved), gene_graph(y), rtol=1e-4, atol=1e-5)


def test_gene_graph_of_genes_that_say_nothing():
    y = torch.rand(4, 40)
    y[2] = 3.0
    graph = gene_graph(y)
    assert graph[2].tolist() == graph[:, 2].tolist() == [0, 0, 1, 0]
    assert torch.equal(gene_graph(torch.zeros(3, 30)), torch.eye(3))
    assert torch.equal(gene_graph(torch.rand(1, 30)), torch.ones(1, 1))
    torch.testing.assert_close(gene_graph(torch.rand(1, 30).expand(2, -1)), torch.full((2, 2), 0.5))


def test_graph_convolution_written_out():
    nodes, edges, layer = torch.randn(2, 4, 5, **DOUBLE), torch.rand(4, 4, **DOUBLE), nn.Linear(5, 3).double()
    found = graph_convolution(nodes, edges, layer)
    for b, g in np.ndindex(2, 4):
        mixed = sum(edges[g, k] * nodes[b, k] for k in range(4))
        torch.testing.assert_close(found[b, g], layer.weight @ mixed + layer.bias)


@pytest.mark.parametrize("pooled", [(32, 16), (30, 14)])  # the last blocks of the second are cut
def test_graph_is_that_of_pooled_training_maps(pooled):
    side, tile = pooled
    data = map_data(side=32, tile=tile, stride=8)
    data.sections[0].tissue[10:14, :9] = False
    judge = GeneDiscriminator(3)
    assert torch.equal(judge.edges, torch.eye(3))
    judge.fit(data, 4)
    columns = []
    for batch in data.some(16):
        x, tissue = batch["x"][0].double().numpy(), batch["tissue"][0, 0].numpy() > 0
        for i in range(0, tile, 4):
            for j in range(0, tile, 4):
                where = tissue[i : i + 4, j : j + 4]
                if where.mean() > 0.5:
                    columns.append(x[:, i : i + 4, j : j + 4][:, where].mean(1))
    np.testing.assert_allclose(judge.edges, graph_by_loops(np.stack(columns, 1), 8), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(judge.edges, torch.eye(3), atol=0.05)


def test_too_little_tissue_for_the_graph(data):
    judge = GeneDiscriminator(3)
    message = (
        "needs at least 30 locations of 6 x 6 bins, and the training tissue has 28. Train on more, or construct the model "
        "with adversarial_weight=0"
    )
    with pytest.raises(ValueError, match=message):
        judge.fit(data, 6)
    assert torch.equal(judge.edges, torch.eye(3))
    with pytest.raises(ValueError, match=message):
        hadmst(factor=6).fit(data, steps=1, **QUICK)
    judge.fit(MapData(2 * data.sections, tile=16), 6)  # of two sections there are enough
    assert not torch.equal(judge.edges, torch.eye(3))


def test_graph_of_scattered_tissue_is_finite():
    """No block of ``factor`` bins is mostly tissue, though half of all bins are."""
    data = map_data()
    data.sections[0].tissue[:] = np.indices((32, 32)).sum(0) % 2 == 0
    data = MapData(data.sections, tile=16, stride=8)
    assert len(data) > 0
    judge = GeneDiscriminator(3)
    judge.fit(data, 4)
    assert judge.edges.isfinite().all()


# ---- the discriminator ----------------------------------------------------------------------------------------------


def discriminator(n=5, edges=None):
    judge = GeneDiscriminator(n).eval()
    judge.edges.copy_(gene_graph(torch.rand(n, 40), 2) if edges is None else edges)
    return judge


def test_verdict_written_out():
    judge = discriminator().double()
    x, y = torch.randn(2, 2, 5, 16, 16, **DOUBLE)
    nodes = torch.empty(2, 5, NODE, **DOUBLE)
    for b, g in np.ndindex(2, 5):
        f = torch.stack([x[b, g], y[b, g]])[None]
        for layer in judge.maps:
            f = F.conv2d(f, layer.weight, layer.bias, stride=2, padding=1)
            f = torch.where(f > 0, f, 0.2 * f)
        nodes[b, g] = f[0].mean((1, 2)) + judge.name.weight[g]
    for layer in judge.graph:
        mixed = torch.einsum("gk,bkc->bgc", judge.edges, nodes)
        f = torch.einsum("bgc,dc->bgd", mixed, layer.weight) + layer.bias
        nodes = nodes + torch.where(f > 0, f, 0.2 * f)
    found = judge(x, y)
    torch.testing.assert_close(found.genes, nodes @ judge.gene.weight[0] + judge.gene.bias)
    torch.testing.assert_close(found.overall, nodes.mean(1) @ judge.overall.weight[0] + judge.overall.bias)


@pytest.mark.parametrize("what", ["x", "y"])
def test_gene_is_judged_by_itself_and_its_neighbors(what):
    """Along a path of genes, what changes in the first is seen two layers of the graph further, and by the whole."""
    path = torch.eye(5) + torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
    x, y = torch.randn(2, 2, 5, 16, 16)
    changed = {"x": x.clone(), "y": y.clone()}
    changed[what][:, 0] += torch.randn(16, 16)
    for edges, expected in ((torch.eye(5), [True] + 4 * [False]), (path / 2, [True] * 3 + [False] * 2)):
        judge = discriminator(edges=edges)
        before, after = judge(x, y), judge(changed["x"], changed["y"])
        assert [not torch.equal(a, b) for a, b in zip(before.genes.T, after.genes.T, strict=True)] == expected
        assert (before.overall != after.overall).all()


def test_genes_are_known_by_name():
    """Genes of equal maps are judged differently."""
    judge = discriminator(edges=torch.eye(5))
    x = torch.randn(1, 1, 16, 16).expand(2, 5, -1, -1)
    verdict = judge(x, x)
    assert len(verdict.genes[0].unique()) == 5
    torch.testing.assert_close(verdict.genes[0], verdict.genes[1])


@pytest.mark.parametrize("size", [8, 16, 24])
def test_shapes_of_a_verdict(size):
    verdict = discriminator()(torch.randn(3, 5, size, size), torch.zeros(3, 5, size, size))
    assert (verdict.genes.shape, verdict.overall.shape) == ((3, 5), (3,))


def test_judge_is_smooth():
    """Spectral norms are one, once the iteration has found them; also of weights that are large."""
    judge = randomized(GeneDiscriminator(5), std=3.0).train()
    x, y = torch.randn(2, 2, 5, 8, 8)
    for _ in range(60):
        judge(x, y)
    judge.eval()
    for layer in (*judge.maps, *judge.graph, judge.gene, judge.overall):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.03)
        assert layer.parametrizations.weight.original.norm() > 5
    before = states(judge)[0]
    judge(x, y)
    assert not different(before, states(judge)[0])  # nothing moves when it is only used


def test_drawn_weights_follow_the_seed_and_edges_stay():
    judge, drawn = discriminator(), []
    edges = judge.edges.clone()
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        judge.draw()
        drawn.append(states(judge)[0])
        assert torch.equal(judge.edges, edges)
    assert not different(*drawn[:2])
    assert different(*drawn[1:]) >= set(names(judge))
    torch.manual_seed(3)
    assert not different(drawn[0], {**states(GeneDiscriminator(5))[0], "edges": edges})


def test_losses_of_a_verdict_written_out():
    real, fake = (DiscriminatorOutput(torch.randn(3, 5, **DOUBLE) * 2, torch.randn(3, **DOUBLE) * 2) for _ in range(2))

    def mean(values):
        return sum(values) / len(values)

    parts = [[float(v) for v in part.flatten()] for part in (*real, *fake)]
    assert float(adversarial_loss(fake)) == pytest.approx(-(mean(parts[2]) + mean(parts[3])) / 2)
    of_real = sum(mean([max(0, 1 - v) for v in part]) for part in parts[:2]) / 2
    of_fake = sum(mean([max(0, 1 + v) for v in part]) for part in parts[2:]) / 2
    assert float(hinge_loss(real, fake)) == pytest.approx(of_real + of_fake)


@pytest.mark.parametrize(
    ("t", "judged"),
    [
        ([0, 499, 500, 999], [True, True, False, False]),
        ([500, 999], [True, False]),
        ([999, 700, 800, 700], [False, True, False, True]),
        ([999], [True]),
        ([3], [True]),
    ],
)
def test_estimates_at_little_noise_are_judged_and_at_least_one(t, judged):
    assert low_noise_mask(torch.tensor(t), 1000).tolist() == judged


def test_one_gene_cannot_be_judged_by_others():
    with pytest.raises(ValueError, match="judges genes by one another and there is only one; .* adversarial_weight=0"):
        HaDMST(["A"], **SMALL)
    model = hadmst(["A"], adversarial_weight=0)
    assert model.sample(inputs(model), 1, 1).shape == (2, 1, 1, 16, 16)


def test_without_a_discriminator():
    with_it, without = hadmst(), hadmst(adversarial_weight=0)
    assert with_it.adversary is with_it.discriminator
    assert isinstance(with_it.adversary, GeneDiscriminator)
    assert without.adversary is without.discriminator is None


# ---- the transformer ------------------------------------------------------------------------------------------------


def layer_of(window=2, shift=1, width=8, heads=2):
    return randomized(TransformerLayer(width, heads, window, shift)).double()


def attention_by_loops(layer, x, text):
    """Token by token: over the tokens whose window, counted from ``-shift`` on, is its own, and the prompt."""
    size, height, width, channels = x.shape
    rows, columns = (height, width) if layer.window is None else (layer.window, layer.window)
    shift, d = layer.shift, channels // layer.heads
    out = torch.zeros_like(x)
    for b in range(size):
        for i, j in np.ndindex(height, width):
            own = (i + shift) // rows, (j + shift) // columns
            others = [x[b, p, q] for p, q in np.ndindex(height, width) if ((p + shift) // rows, (q + shift) // columns) == own]  # fmt: skip
            others = torch.stack(others + ([] if text is None else [text[b]]))
            query, (key, value) = layer.query(x[b, i, j]), layer.key_value(others).split(channels, 1)
            heads = [np.s_[..., d * h : d * (h + 1)] for h in range(layer.heads)]
            parts = [(key[h] @ query[h] / math.sqrt(d)).softmax(0) @ value[h] for h in heads]
            out[b, i, j] = layer.out(torch.cat(parts))
    return out


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("window", "shift", "size"),
    [(2, 0, (4, 6)), (2, 1, (4, 6)), (4, 2, (4, 4)), (4, 2, (8, 4)), (3, 1, (4, 5)), (1, 0, (2, 3)), (None, 0, (3, 5))],
)
def test_attention_within_windows_written_out(window, shift, size, told):
    layer = layer_of(window, shift)
    x, text = torch.randn(2, *size, 8, **DOUBLE), torch.randn(2, 8, **DOUBLE) if told else None
    torch.testing.assert_close(layer.attend(x, text), attention_by_loops(layer, x, text))


def test_attention_over_a_whole_tile_is_attention():
    layer = layer_of(None, 0)
    torch_one = nn.MultiheadAttention(8, 2, batch_first=True).double()
    torch_one.in_proj_weight.data = torch.cat([layer.query.weight, layer.key_value.weight])
    torch_one.in_proj_bias.data = torch.cat([layer.query.bias, layer.key_value.bias])
    torch_one.out_proj.load_state_dict(layer.out.state_dict())
    x, text = torch.randn(2, 3, 5, 8, **DOUBLE), torch.randn(2, 8, **DOUBLE)
    tokens = x.flatten(1, 2)
    others = torch.cat([tokens, text[:, None]], 1)
    expected, _ = torch_one(tokens, others, others)
    torch.testing.assert_close(layer.attend(x, text).flatten(1, 2), expected)
    large = layer_of(8, 0)
    torch.testing.assert_close(large.attend(x, text), layer.attend(x, text))  # a window that holds all


def test_layer_written_out():
    layer = layer_of()
    x, text = torch.randn(2, 8, 4, 6, **DOUBLE), torch.randn(2, 8, **DOUBLE)
    padded, placed = F.pad(x, (1, 1, 1, 1)), x + layer.place.bias[:, None, None]
    for i, j in np.ndindex(3, 3):
        placed = placed + layer.place.weight[:, 0, i, j][:, None, None] * padded[:, :, i : i + 4, j : j + 6]
    tokens = placed.movedim(1, -1)
    tokens = tokens + attention_by_loops(layer, layer.norm_attention(tokens), text)
    tokens = tokens + layer.mlp(layer.norm_mlp(tokens))
    torch.testing.assert_close(layer(x, text), tokens.movedim(-1, 1))


def transformer(*, token=2, window=2, layers=3, text_dim=5, random=True):
    module = SemanticTransformer(6, 8, 3, token=token, window=window, layers=layers, heads=2, text_dim=text_dim)
    if random:
        randomized(module)
    else:
        draw_weights(module)
    return module.double().eval()


def test_every_second_layer_is_shifted_by_half_a_window():
    assert [layer.shift for layer in transformer(window=4, layers=4).layers] == [0, 2, 0, 2]
    assert [layer.shift for layer in transformer(window=None, layers=2).layers] == [0, 0]


def test_transformer_begins_as_a_convolution():
    """Layers pass on what they are given, until they are trained."""
    module = transformer(random=False)
    f, text, x = torch.randn(2, 6, 12, 8, **DOUBLE), torch.randn(2, 5, **DOUBLE), torch.randn(2, 8, 6, 4, **DOUBLE)
    for layer in module.layers:
        assert torch.equal(layer(x, module.text(text)), x)
    expected = F.layer_norm(module.enter(f).movedim(1, -1), (8,)).movedim(-1, 1)
    torch.testing.assert_close(module(f, text), expected)
    assert not torch.allclose(module.enter(f), expected)


@pytest.mark.parametrize("text_dim", [5, None])
def test_transformer_sees_tokens(text_dim):
    module = transformer(token=4, text_dim=text_dim)
    f, text = torch.randn(2, 6, 16, 8, **DOUBLE), torch.randn(2, 5, **DOUBLE)
    found = module(f, text if text_dim else None)
    assert found.shape == (2, 8, 4, 2)
    x = torch.stack([module.enter.bias + torch.einsum("ocij,bcij->bo", module.enter.weight, f[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]) for i, j in np.ndindex(4, 2)], -1).unflatten(-1, (4, 2))  # fmt: skip
    told = None
    if text_dim:
        raw = text @ module.text[0].weight.T + module.text[0].bias
        told = F.layer_norm(raw, (8,), module.text[1].weight, module.text[1].bias)
    for layer in module.layers:
        x = layer(x, told)
    expected = F.layer_norm(x.movedim(1, -1), (8,), module.norm.weight, module.norm.bias).movedim(-1, 1)
    torch.testing.assert_close(found, expected)


def test_prompt_reaches_every_token_of_its_own_sample():
    module = transformer()
    f, text = torch.randn(2, 6, 8, 8, **DOUBLE), torch.randn(2, 5, **DOUBLE)
    other = text.clone()
    other[1] += 1
    change = (module(f, other) - module(f, text)).abs().amax(1)
    assert (change[0] == 0).all()
    assert (change[1] > 1e-4).all()


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_tokens_do_not_know_where_a_tile_begins(windows):
    """If it begins at a multiple of a window, and beyond what is seen from the border."""
    module, window, far = transformer(window=2), 4, 10  # bins of a window; tokens that six reaches make
    f, text = torch.randn(1, 6, 64, 64, **DOUBLE), torch.randn(1, 5, **DOUBLE)
    whole, start = module(f, text), windows * window
    part = module(f[..., start:, :-start], text)
    inside = np.s_[..., far + windows * 2 : -far, far : -far - windows * 2]
    torch.testing.assert_close(part[..., far:-far, far:-far], whole[inside], rtol=1e-9, atol=1e-9)
    part = module(f[..., start + 2 :, : -start - 2], text)[..., far:-far, far:-far]  # begins within a window
    moved = whole[..., far + windows * 2 + 1 : -far, far : -far - windows * 2 - 1]
    assert not torch.allclose(part, moved, atol=1e-3)


def test_tokens_out_of_reach_do_not_matter():
    """One layer sees the tokens of its window and those that touch them; the next, those that touch theirs."""
    module = transformer(layers=1, window=2)
    f, text = torch.randn(1, 6, 16, 16, **DOUBLE), torch.randn(1, 5, **DOUBLE)
    other = f.clone()
    other[..., 4:6, 6:8] += 1  # token 2, 3
    changed = (module(other, text) != module(f, text)).any(1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[0:4, 2:6] = True  # its neighbors are tokens 1 to 3 and 2 to 4; their windows
    assert torch.equal(changed, expected)
    module.layers.append(layer_of(2, 1))
    changed = (module(other, text) != module(f, text)).any(1)[0]
    expected[0:5, 1:7] = True
    assert torch.equal(changed, expected)


# ---- losses of the model --------------------------------------------------------------------------------------------


@pytest.fixture
def at_levels(monkeypatch):
    """Sets the noise levels of the items of a batch in training."""
    return lambda *t: monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(t))


@pytest.mark.parametrize("residual", [True, False])
def test_each_term_is_what_it_says(data, at_levels, residual):
    model = hadmst(residual=residual, p_missing=0.0, prediction="v").train()
    model.discriminator.eval()  # no power iteration
    model, batch = as_double(model, batch_of(data, 0, 7, 12))
    batch["valid"][1, :, :6] = 0
    assert (batch["tissue"] == 0).any()
    t = torch.tensor([30, 900, 499])
    at_levels(*t.tolist())
    torch.manual_seed(1)
    losses = model.loss(batch)
    torch.manual_seed(1)
    torch.rand(3)  # which are hidden: none
    known, cond = batch["tissue"], model.condition(batch)
    features = model.encode(batch)
    x = batch["x"] / model.gene_scale.scale[:, None, None]
    mean = cond["mean"] if residual else 0 * x
    assert ("mean" in cond) == residual
    x_0 = x - mean
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, **DOUBLE), 0)[t].reshape(3, 1, 1, 1)
    eps = torch.randn_like(x_0)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    v = model.denoise(x_t, t, cond)

    def close(name, expected):
        torch.testing.assert_close(losses[name], expected.detach(), rtol=1e-5, atol=1e-7)

    def over(value):
        return (value * known).sum() / (3 * known.sum())

    close("mse", over((v - a.sqrt() * eps + (1 - a).sqrt() * x_0).square()))
    expected = losses["mse"]
    if residual:
        close("mean", over((x - mean).square()))
        expected = expected + losses["mean"]
    tokens = model.semantic.predict(features.semantic).detach().numpy()
    close("semantic", torch.tensor(distillation_by_loops(tokens, x.numpy(), known.numpy(), 4), **DOUBLE))
    z_h, z_y, seen = model.alignment(features.histology, features.low_res, batch["valid"])
    assert seen.any()
    assert not seen.all()
    close("alignment", alignment_loss(z_h, z_y, seen, model.alignment.near(seen), 0.1, 1.0))
    estimate = (a.sqrt() * x_t - (1 - a).sqrt() * v + mean) * known
    y = torch.where(batch["valid"] > 0, batch["y"] / model.gene_scale.scale[:, None, None], 0)
    real, fake = (model.discriminator(value[[0, 2]], y[[0, 2]]) for value in (x * known, estimate))
    close("adversarial", adversarial_loss(fake))
    close("discriminator", hinge_loss(real, fake))
    expected = expected + 0.1 * losses["semantic"] + 0.05 * losses["alignment"] + 0.01 * losses["adversarial"]
    close("loss", expected)
    kinds = {"loss", "mse", "semantic", "alignment", "adversarial", "discriminator"} | ({"mean"} if residual else set())
    assert set(losses) == kinds
    assert not losses["adversarial"].requires_grad


def adversarial_of(model, batch, monkeypatch):
    """The losses, and the adversarial term before it is detached."""
    kept, loss = [], adversarial_loss
    with monkeypatch.context() as patch:
        patch.setattr(hadmst_model, "adversarial_loss", lambda fake: kept.append(loss(fake)) or kept[-1])
        losses = model.loss(batch)
    return losses, *kept


ENCODERS = {
    "histology", "semantic.enter", "semantic.text", "semantic.layers", "semantic.norm", "told", "null", "spots", "fuse",
}  # fmt: skip
TOUCHED = {  # by the gradient of each term
    "denoising": {*ENCODERS, "time", "unet", "inject", "single"},
    "adversarial": {*ENCODERS, "time", "unet", "inject", "single"},
    "mean": {*ENCODERS, "mean"},
    "semantic": {"histology", "semantic.enter", "semantic.text", "semantic.layers", "semantic.norm", "semantic.predict"},
    "alignment": {*ENCODERS, "alignment"} - {"fuse"},
    "discriminator": {"discriminator"},
}  # fmt: skip


@pytest.mark.parametrize("term", TOUCHED)
def test_gradient_of_each_term_reaches_what_it_should(data, at_levels, monkeypatch, term):
    model = hadmst(p_missing=0.4).train()
    with torch.no_grad():
        for verdict in (model.discriminator.gene, model.discriminator.overall):
            verdict.bias += 3  # else truth and estimate may pull at it alike
    at_levels(3, 800, 400, 90)
    batch = batch_of(data, 0, 5, 7, 12)
    batch["valid"][:, :, :2, :5] = 0
    losses, adversarial = adversarial_of(model, batch, monkeypatch)
    torch.testing.assert_close(adversarial.detach(), losses["adversarial"])
    rest = sum(weight * losses[name] for name, weight in WEIGHTS.items()) + 0.01 * adversarial
    terms = {**losses, "adversarial": adversarial, "denoising": losses["loss"] - rest}
    torch.testing.assert_close(terms["denoising"].detach(), losses["mse"], rtol=1e-4, atol=1e-5)
    terms[term].backward()
    assert reached(model) == TOUCHED[term]
    judge = dict(model.discriminator.named_parameters())
    if term == "discriminator":
        assert all(p.grad.abs().max() > 0 for p in judge.values())
    else:
        assert all(p.grad is None for p in judge.values())
    assert all(p.requires_grad for p in judge.values())
    assert not any(buffer.requires_grad for buffer in model.buffers())


@pytest.mark.parametrize(("progress", "strength"), [(0, 0), (0.2, 0), (0.25, 0.25), (0.3, 0.5), (0.4, 1), (1, 1)])
def test_adversary_begins_to_count_while_training(data, at_levels, monkeypatch, progress, strength):
    """In the loss, and in what moves the denoiser."""
    model = hadmst(p_missing=0.0, adversarial_weight=3.0).train()
    model.discriminator.eval()
    at_levels(100, 300)
    gradients, weight = [], model.unet.leave.weight
    for model.progress in (0.0, progress):
        torch.manual_seed(3)
        losses, adversarial = adversarial_of(model, batch_of(data, 0, 7), monkeypatch)
        rest = losses["mse"] + sum(share * losses[name] for name, share in WEIGHTS.items())
        gradients.append(torch.autograd.grad(losses["loss"], weight, retain_graph=True)[0])
    torch.testing.assert_close(losses["loss"] - rest, strength * 3 * adversarial, rtol=1e-3, atol=1e-5)
    term = torch.autograd.grad(adversarial, weight)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], strength * 3 * term, rtol=1e-3, atol=1e-5)
    assert term.abs().max() > 1e-3


@pytest.mark.parametrize(("t", "rows"), [((100, 499), [0, 1]), ((100, 999), [0]), ((999, 500), [1])])
def test_what_is_judged(data, at_levels, monkeypatch, t, rows):
    """Truth and estimate of the same items; of either only known bins, and zero for what was not measured."""
    model = hadmst(p_missing=0.0).train()
    batch, judged, forward = batch_of(data, 0, 0), [], GeneDiscriminator.forward
    assert (batch["tissue"] == 0).any()
    batch["x"] = torch.where(batch["tissue"] > 0, batch["x"], 50.0)
    batch["valid"][:, :, :5, 7:] = 0
    monkeypatch.setattr(GeneDiscriminator, "forward", lambda m, *maps: judged.append(maps) or forward(m, *maps))
    at_levels(*t)
    model.loss(batch)
    (fake, y), (real, y_of_real), (again, _) = judged
    scale = model.gene_scale.scale[:, None, None]
    torch.testing.assert_close(real, (batch["x"] / scale * batch["tissue"])[rows])
    torch.testing.assert_close(y, (batch["y"] / scale * batch["valid"])[rows])
    assert torch.equal(y, y_of_real)
    assert torch.equal(fake, again)
    assert fake.requires_grad
    assert not any(value.requires_grad for value in (again, real, y, y_of_real))
    assert (fake * (1 - batch["tissue"][rows]) == 0).all()
    assert (fake != 0).any()


def test_unknown_bins_do_not_matter_to_the_targets(data):
    model = hadmst(p_missing=0.0).train()
    batch, losses = batch_of(data, 0, 0), []
    assert (batch["tissue"] == 0).any()
    for value in (0.0, 50.0):
        torch.manual_seed(2)
        losses.append(model.loss({**batch, "x": torch.where(batch["tissue"] > 0, batch["x"], value)}))
    for name in ("semantic", "mean", "alignment"):
        assert torch.equal(losses[0][name], losses[1][name])


def test_validation_has_only_what_the_model_is_used_for(data):
    model = hadmst(p_missing=0.9).eval()
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(model.loss(batch_of(data, 0, 7)))
    assert set(losses[0]) == {"loss", "mse", "mean"}
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0]["loss"], losses[0]["mse"] + losses[0]["mean"])


@pytest.mark.parametrize("left_out", ["alignment", "adversarial", "semantic", "residual"])
def test_terms_that_are_switched_off_are_left_out(data, left_out):
    options = {
        "alignment": {"alignment_weight": 0}, "adversarial": {"adversarial_weight": 0}, "semantic": {"semantic": False},
        "residual": {"residual": False},
    }[left_out]  # fmt: skip
    names = {"alignment": {"alignment"}, "adversarial": {"adversarial", "discriminator"}, "semantic": {"semantic"}, "residual": {"mean"}}  # fmt: skip
    losses = hadmst(**options).train().loss(batch_of(data, 0, 7))
    every = {"loss", "mse", "mean", "semantic", "alignment", "adversarial", "discriminator"}
    assert set(losses) == every - names[left_out]


@pytest.mark.parametrize("scale", ["std", "quantile", "map"])
@pytest.mark.parametrize("missing", [False, True])
def test_loss_in_mixed_precision(data, scale, missing):
    model = hadmst(scale=scale).train()
    batch = batch_of(data, 0, 7, 12, 3)
    batch["valid"] *= not missing
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(batch)
    (losses["loss"] + losses["discriminator"]).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (losses["alignment"] == 0) == missing


# ---- training -------------------------------------------------------------------------------------------------------


def test_few_steps_lower_the_loss():
    model, measured = hadmst(random=False), (True, False)
    data, validation = map_data(measured=measured), map_data(measured=measured, side=16)
    options = {**QUICK, "batch_size": 8, "lr": 5e-3, "ema_decay": 0.5}
    history = model.fit(data, validation, steps=10, evaluate_every=5, **options)
    for name in ("validation", "mean", "mse"):
        assert history[name][-1] < 0.95 * history[name][0]
    expected = {"step", "loss", "mse", "mean", "semantic", "alignment", "adversarial", "discriminator", "validation"}
    assert set(history) == expected
    assert all(len(values) == 2 and np.isfinite(values).all() for values in history.values())
    json.dumps(history)


def test_fit_takes_scales_and_graph_from_training_tiles(data):
    model = hadmst(random=False)
    judge = GeneDiscriminator(3)
    judge.fit(data, 4)
    model.fit(data, map_data(seed=9), steps=1, **QUICK)
    assert torch.equal(model.discriminator.edges, judge.edges)
    x = torch.cat([b["x"][0][:, b["tissue"][0, 0] > 0] for b in data.some(16)], 1)
    torch.testing.assert_close(model.gene_scale.scale, x.std(1, correction=0))
    h = torch.cat([b["h"][0].flatten(1) for b in data.some(16)], 1)
    torch.testing.assert_close(model.image_scale.mean, h.mean(1), rtol=1e-4, atol=1e-4)


@pytest.fixture
def steps(monkeypatch):
    """What the weights were after each training step, of the model and of its discriminator."""
    seen, update = [], stgen.train._State.update

    def recording(state, *args):
        update(state, *args)
        seen.append([[p.detach().clone() for p in part] for part in (state.parameters, state.opposed)])

    monkeypatch.setattr(stgen.train._State, "update", recording)
    return seen


def test_average_of_the_weights_is_of_the_model_only(data, steps):
    """The discriminator ends as it was after its last step."""
    model = hadmst(random=False)
    model.fit(data, steps=5, **{**QUICK, "ema_decay": 0.4})
    average = steps[0][0]
    for n, (now, _) in enumerate(steps[1:], 1):
        decay = min(0.4, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * b for a, b in zip(average, now, strict=True)]
    own = {id(p) for p in model.discriminator.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own]
    for expected, found in zip(average, rest, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)
    assert all(map(torch.equal, steps[-1][1], model.discriminator.parameters()))
    assert not any(map(torch.equal, steps[0][1], steps[-1][1]))


def test_best_weights_are_of_the_model_only(data, steps, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(stgen.train._State, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(hadmst_model, "BEGIN", 2.0)  # else the shorter run sees more of the adversary
    monkeypatch.setattr(hadmst_model, "FULL", 3.0)
    options = {**QUICK, "evaluate_every": 2, "patience": None}
    model, best = hadmst(random=False), hadmst(random=False)
    model.fit(data, map_data(seed=1, side=16), steps=6, **options)
    assert all(map(torch.equal, steps[-1][1], model.discriminator.parameters()))
    best.fit(data, steps=4, **options)
    assert not different(states(model)[0], states(best)[0])
    assert different(states(model)[1], states(best)[1]) >= {f"discriminator.{n}" for n in names(best.discriminator)}


def test_validation_uses_averaged_weights_without_a_discriminator(data, monkeypatch):
    """What is judged in validation is the model that will be kept, not its adversary."""
    seen, loss = [], HaDMST.loss
    monkeypatch.setattr(HaDMST, "loss", lambda m, batch: seen.append((m.training, m.progress)) or loss(m, batch))
    forward, judged = GeneDiscriminator.forward, []
    monkeypatch.setattr(GeneDiscriminator, "forward", lambda m, *a: judged.append(m.training) or forward(m, *a))
    hadmst(random=False).fit(data, map_data(seed=1, side=16), steps=4, evaluate_every=2, **QUICK)
    assert [progress for training, progress in seen if training] == [0, 0.25, 0.5, 0.75]
    assert {progress for training, progress in seen if not training} == {1.0}
    assert judged
    assert all(judged)


def test_an_adversary_that_does_not_count_changes_nothing(data, monkeypatch):
    """The rest of the model is then trained, step by step, as if there were none; and the discriminator all the same."""
    monkeypatch.setattr(hadmst_model, "BEGIN", 2.0)
    monkeypatch.setattr(hadmst_model, "FULL", 3.0)
    models, histories = [hadmst(random=False, adversarial_weight=w) for w in (0.5, 0)], []
    before = states(models[0])[1]
    for model in models:
        histories.append(model.fit(data, map_data(seed=1), steps=4, evaluate_every=2, **QUICK))
    assert not different(states(models[0])[0], states(models[1])[0])
    assert {name: histories[0][name] for name in histories[1]} == histories[1]
    assert set(histories[0]) - set(histories[1]) == {"adversarial", "discriminator"}
    moved = different(before, states(models[0])[1])
    assert {name for name, _ in models[0].named_parameters() if name.startswith("discriminator.")} <= moved


def test_an_adversary_that_counts_changes_the_model(data):
    models = [hadmst(random=False, adversarial_weight=w) for w in (0.5, 0)]
    for model in models:
        model.fit(data, steps=6, **QUICK)
    assert different(states(models[0])[0], states(models[1])[0])


def test_gradients_of_both_are_clipped_apart(data, monkeypatch):
    """The discriminator's, however large, take nothing of the model's."""
    norms, step = [], torch.optim.AdamW.step

    def recording(self, *args, **kwargs):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    for weight in (0.01, 0):
        hadmst(adversarial_weight=weight).fit(data, steps=2, **QUICK, max_grad_norm=1e-3)
    expected = [math.sqrt(2) * 1e-3] * 2 + [1e-3] * 2
    assert norms == [pytest.approx(value, rel=1e-2) for value in expected]


def test_interrupted_and_resumed_run_ends_as_an_uninterrupted_one(data, tmp_path, monkeypatch):
    options = {**QUICK, "steps": 4, "evaluate_every": 2}
    whole, validation = hadmst(random=False), map_data(seed=1, side=16)
    history = whole.fit(data, validation, **options)
    update = stgen.train._State.update

    def dies(state, *args):
        if state.step == 3:
            raise KeyboardInterrupt
        update(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stgen.train._State, "update", dies)
        with pytest.raises(KeyboardInterrupt):
            hadmst(random=False).fit(data, validation, checkpoint=tmp_path / "run", **options)
    resumed = hadmst()  # with other weights, a discriminator among them: the checkpoint decides
    assert resumed.fit(data, validation, checkpoint=tmp_path / "run", **options) == history
    assert not different(*(states(m)[0] for m in (whole, resumed)))
    assert not different(*(states(m)[1] for m in (whole, resumed)))


def test_same_seed_same_model(data):
    hashes = []
    for seed in (3, 3, 4):
        model = hadmst(random=seed == 4)
        torch.manual_seed(100 + len(hashes))
        model.fit(data, steps=2, **{**QUICK, "seed": seed})
        hashes.append(model.weights_sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_fitted_model_goes_on_with_its_discriminator(data):
    model = hadmst(random=False)
    model.fit(data, steps=1, **QUICK)
    model.record = {"sections": ["one"]}
    before = states(model)[1]
    model.fit(data, steps=1, lr=0.0, **QUICK)
    moved = different(before, states(model)[1])
    assert all(name.rsplit(".", 1)[1] in ("_u", "_v") for name in moved)


def test_constants_are_fitted_wherever_the_model_is(data, monkeypatch):
    """Data stay on the CPU; the model may have been left on an accelerator by the fit before. ``meta`` stands in."""
    monkeypatch.setattr(stgen.train, "fit", lambda *_, **__: {})
    model = hadmst().to("meta")
    model.record = {"sections": ["one"]}
    assert model.fit(data, steps=1) == {}


# ---- without a low-resolution map -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["std", "map"])
def test_no_map_is_a_map_that_is_not_valid(scale):
    model = hadmst(scale=scale)
    batch = inputs(model)
    without = {name: value for name, value in batch.items() if name not in ("y", "valid")}
    hidden = {**batch, "y": 0 * batch["y"], "valid": 0 * batch["valid"]}
    one, two = (model.condition(b) for b in (without, hidden))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    draws = [model.sample(b, 2, 2, torch.Generator().manual_seed(0)) for b in (without, hidden, batch)]
    assert torch.equal(*draws[:2])
    assert not torch.allclose(draws[0], draws[2], atol=1e-2)


@pytest.mark.parametrize("scale", ["std", "quantile", "map"])
def test_values_that_are_not_valid_do_not_matter(scale):
    model = hadmst(scale=scale)
    batch = inputs(model)
    batch["valid"][0, :, :5, 3:9] = 0
    batch["valid"][1] = 0
    other = {**batch, "y": torch.where(batch["valid"] > 0, batch["y"], 7 * torch.rand(16, 16))}
    one, two = (model.condition(b) for b in (batch, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("scale", ["std", "map"])
def test_map_that_is_hidden_in_training_is_seen_by_nothing(scale, monkeypatch):
    """Neither by the network nor by the scale; the item is then one that has none."""
    monkeypatch.setattr(_map_diffusion, "conditioning_dropout", lambda present, p: torch.tensor([True, False]))
    model = hadmst(scale=scale).train()
    model.discriminator.eval()
    batch = inputs(model)
    batch |= {"x": batch["y"].flip(0), "tissue": batch["valid"]}
    changed = {**batch, "y": torch.cat([batch["y"][:1], 3 * batch["y"][1:].flip(2)])}
    present = torch.tensor([1.0, 0])[:, None, None, None]
    without = {**batch, "y": batch["y"] * present, "valid": batch["valid"] * present}
    losses = []
    for one in (batch, changed, without):
        torch.manual_seed(3)
        losses.append(model.loss(one))
    assert losses[0] == losses[1] == losses[2]


def test_where_nothing_was_measured_stands_what_was_learned():
    model = hadmst()
    batch = inputs(model)
    batch["valid"][0, :, :5, 3:9] = 0
    batch["valid"][1] = 0
    features = model.encode(batch)
    expected = batch["y"] / model.gene_scale.scale[:, None, None]
    expected[0, :, :5, 3:9] = model.null.detach().expand(-1, 5, 6)
    expected[1] = model.null.detach().expand(-1, 16, 16)
    torch.testing.assert_close(features.y.detach(), expected)
    assert model.null.abs().min() > 0


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_maps_are_hidden_in_training_only(data, p, monkeypatch):
    model, seen, encode = hadmst(p_missing=p), [], HaDMST.encode
    monkeypatch.setattr(
        HaDMST, "encode", lambda m, batch: seen.append(batch["valid"].flatten(1).any(1)) or encode(m, batch)
    )
    batch = batch_of(data, *range(20), *range(20))
    batch["valid"][:5] = 0
    model.train().loss(batch)
    model.eval().loss(batch)
    assert not seen[0][:5].any()
    assert float(seen[0][5:].float().mean()) == pytest.approx(1 - p, abs=0.25 * (p > 0))
    assert seen[0][5:].all() == (p == 0)
    assert seen[1].tolist() == [False] * 5 + [True] * 35
    assert (batch["valid"][5:] > 0).flatten(1).any(1).all()  # what was given is left as it was


@pytest.mark.parametrize("rows", [(0,), (0, 5, 9)])
def test_batch_without_any_map(data, rows):
    model = hadmst().train()
    batch = {name: value for name, value in batch_of(data, *rows).items() if name not in ("y", "valid")}
    losses = model.loss(batch)
    assert losses["alignment"] == 0
    assert all(value.isfinite() for value in losses.values())
    (losses["loss"] + losses["discriminator"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_model_can_be_trained_without_any_map():
    model = hadmst(random=False)
    history = model.fit(map_data(measured=(False,)), steps=2, **QUICK)
    assert history["alignment"] == [0]
    assert np.isfinite(history["loss"]).all()


# ---- switches -------------------------------------------------------------------------------------------------------

SWITCHES = {  # options, the parameters that they remove, those whose shape they change
    "semantic": ({"semantic": False}, ("semantic.", "told.", "inject."), set()),
    "segmentation": ({"segmentation": False}, (), {"histology.0.layers.0.weight"}),
    "text": ({"text_encoder": "none"}, ("semantic.text.",), set()),
    "alignment": ({"alignment_weight": 0}, ("alignment.",), set()),
    "adversary": ({"adversarial_weight": 0}, ("discriminator.",), set()),
    "residual": ({"residual": False}, ("mean.",), {"unet.enter.weight", "single.enter.weight"}),
    "gene_width": ({"gene_width": 0}, ("single.",), set()),
    "p_missing": ({"p_missing": 0}, (), set()),
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_removes_its_parameters_and_no_others(switch):
    options, prefixes, changed = SWITCHES[switch]
    whole, part = names(hadmst()), names(hadmst(**options))
    own = {name for name in whole if prefixes and name.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in own) for prefix in prefixes)
    assert set(whole) - own == set(part)
    assert {name for name in part if part[name] != whole[name]} == changed


def test_what_the_model_needs():
    needs = {
        switch: (model.needs_low_res, model.uses_low_res, model.needs_labels, model.needs_text)
        for switch, model in ((switch, hadmst(random=False, **SWITCHES[switch][0])) for switch in SWITCHES)
    }
    every = (False, True, True, True)
    assert needs == {
        **dict.fromkeys(SWITCHES, every), "semantic": (False, True, True, False), "text": (False, True, True, False),
        "segmentation": (False, True, False, True), "p_missing": (True, True, True, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("s", {"segmentation": False}, r"needs a mask of nuclei, batch\['s'\]; the batch has h, text, y, valid"),
        (
            "text",
            {"text_encoder": "none"},
            r"needs the vector of a prompt, batch\['text'\]; the batch has h, s, y, valid",
        ),
        ("text", {"semantic": False}, "the vector of a prompt"),
    ],
)
def test_what_a_batch_must_hold(name, options, message):
    model, without = hadmst(), hadmst(**options)
    batch = inputs(model)
    del batch[name]
    assert without.sample(batch, 1, 1).shape == (2, 1, 3, 16, 16)
    for call in (model.condition, model.sample, model.loss):
        with pytest.raises(ValueError, match=message):
            call(batch)


def test_what_the_model_does_not_look_at_does_not_matter():
    model = hadmst(segmentation=False, text_encoder="none")
    batch = inputs(model)
    other = {**batch, "s": 1 - batch["s"], "text": -batch["text"]}
    one, two = (model.condition(b) for b in (batch, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("switch", ["semantic", "segmentation", "text", "residual", "gene_width"])
def test_switch_changes_the_result(switch):
    whole, part = hadmst(), hadmst(**SWITCHES[switch][0])
    own = part.state_dict()
    shared = {k: v for k, v in whole.state_dict().items() if k in own}
    for name in SWITCHES[switch][2]:  # they take fewer inputs
        shared[name] = shared[name][:, : own[name].shape[1]]
    part.load_state_dict(shared)
    batch = inputs(whole)
    draws = [m.sample(batch, 1, 2, torch.Generator().manual_seed(0)) for m in (whole, part)]
    assert draws[0].shape == draws[1].shape
    assert not torch.allclose(*draws, atol=1e-3)


@pytest.mark.parametrize("switch", ["alignment", "adversary", "p_missing"])
def test_what_is_only_for_training_does_not_change_the_result(switch):
    whole, part = hadmst(), hadmst(**SWITCHES[switch][0])
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    batch = inputs(whole)
    assert torch.equal(*(m.sample(batch, 1, 2, torch.Generator().manual_seed(0)) for m in (whole, part)))


def test_everything_can_be_switched_off(data):
    options = {name: value for switch in SWITCHES.values() for name, value in switch[0].items()}
    model = hadmst(**options)
    batch = {name: value for name, value in inputs(model).items() if name not in ("s", "text")}
    assert model.sample(batch, 2, 2).shape == (2, 2, 3, 16, 16)
    assert set(model.train().loss({**batch, "x": batch["y"], "tissue": batch["valid"]})) == {"loss", "mse"}
    assert model.adversary is None


def test_prompt_becomes_a_vector():
    vector = hadmst(text_dim=None, random=False).embed_prompt("H&E of breast cancer")
    assert (vector.shape, vector.dtype) == ((256,), np.float32)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert hadmst(random=False).embed_prompt("H&E of breast cancer").shape == (16,)
    assert hadmst(random=False, text_dim=None, text_encoder="bert-base-uncased").config["text_dim"] == 768


# ---- how it starts --------------------------------------------------------------------------------------------------


def test_untrained_output_is_exactly_zero():
    model = hadmst(random=False)
    cond = model.condition(inputs(model))
    assert (cond["mean"] == 0).all()
    assert (model.denoise(torch.randn(2, 3, 16, 16), torch.tensor([0, 500]), cond) == 0).all()


def test_semantic_features_add_nothing_at_first():
    """The transformer is let in as it learns, by the convolutions that open to it."""
    model = hadmst(random=False)
    for part in (model.unet, model.mean):
        randomized(part)
    batch, x_t, t = inputs(model), torch.randn(2, 3, 16, 16), torch.tensor([50, 500])
    without = hadmst(random=False, semantic=False)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k in without.state_dict()})
    one, two = (m.condition(batch) for m in (model, without))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert torch.equal(model.denoise(x_t, t, one), without.denoise(x_t, t, two))
    model.denoise(x_t, t, one).square().sum().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in (model.inject, model.told))


def test_drawing_weights_anew_leaves_nothing_of_the_old():
    """Those of a model with others are then, for the same seed, those of a new one."""
    drawn = []
    for model, seed in ((hadmst(), 1), (hadmst(random=False), 1), (hadmst(), 2)):
        torch.manual_seed(seed)
        model.initialize()
        drawn.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert different(*drawn[:2]) == set()
    assert different(*drawn[1:])


# ---- each gene by itself --------------------------------------------------------------------------------------------


def head(n_genes=3, inputs=3, random=True):
    module = GeneHead(n_genes, inputs, 4, 6)
    if random:
        randomized(module)
    else:
        draw_weights(module)
    return module.double()


def silu(x):
    return x / (1 + torch.exp(-x))


def test_network_of_each_gene_written_out():
    """Square by square of 2 x 2 bins, with perceptrons."""
    module, x, time = head(), torch.randn(2, 3, 3, 4, 6, **DOUBLE), torch.randn(2, 6, **DOUBLE)
    found = module(x, time)
    for b, g, i, j in np.ndindex(2, 3, 2, 3):
        gain, shift = (module.time(time[b]) + module.gene[g]).split(4)
        square = x[b, g, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
        hidden = module.enter.weight[:, :, 0, 0] @ square + module.enter.bias
        hidden = silu(hidden * (1 + gain) + shift)
        hidden = silu(module.hidden.weight[:, :, 0, 0] @ hidden + module.hidden.bias)
        expected = (module.leave.weight[:, :, 0, 0] @ hidden + module.leave.bias).reshape(2, 2)
        torch.testing.assert_close(found[b, g, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], expected)


@pytest.mark.parametrize("most", [1, 2 * 24 * 2, 2**20])
def test_genes_are_worked_on_in_parts(monkeypatch, most):
    module, x, time = head(n_genes=5), torch.randn(2, 5, 3, 4, 6, **DOUBLE), torch.randn(2, 6, **DOUBLE)
    expected, part, seen = module(x, time), GeneHead._part, []
    monkeypatch.setattr(GeneHead, "_part", lambda m, x, *a: seen.append(x.shape[1]) or part(m, x, *a))
    monkeypatch.setattr(networks, "MOST_VALUES", most)
    torch.testing.assert_close(module(x, time), expected)
    assert seen == {1: [1] * 5, 96: [2, 2, 1], 2**20: [5]}[most]


def test_network_of_each_gene_is_added_to_that_of_all():
    model, without = hadmst(), hadmst(gene_width=0)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("single.")})
    batch, x_t, t = inputs(model), torch.randn(2, 3, 16, 16), torch.tensor([50, 500])
    cond = model.condition(batch)
    output = without.denoise(x_t, t, cond)
    time = model.time(timestep_embedding(t, 128))
    expected = output + model.single(torch.stack([output, x_t, cond["mean"]], 2), time)
    torch.testing.assert_close(model.denoise(x_t, t, cond), expected)
    assert not torch.allclose(output, expected, atol=1e-3)
    assert (head(random=False)(torch.randn(1, 3, 3, 4, 4, **DOUBLE), torch.randn(1, 6, **DOUBLE)) == 0).all()


# ---- conditions -----------------------------------------------------------------------------------------------------


def test_condition_written_out():
    model = hadmst()
    model, batch = as_double(model, inputs(model))
    model.image_scale.mean.normal_()
    model.image_scale.scale.uniform_(0.5, 2)
    batch["valid"][0, :, 3:7, 2:9] = 0
    h = torch.asinh((batch["h"] - model.image_scale.mean[:, None, None]) / model.image_scale.scale[:, None, None])
    f = model.histology(torch.cat([h, 2 * batch["s"]], 1))
    semantic = model.semantic(f, batch["text"])
    f_h = f + F.interpolate(model.told(semantic), scale_factor=4, mode="bilinear")  # it is linear
    y = batch["y"] / model.gene_scale.scale[:, None, None]
    y = torch.where(batch["valid"] > 0, y, model.null)
    f_y = model.spots(torch.cat([y, batch["valid"]], 1))
    joint = f_h + model.fuse(torch.cat([f_h, f_y], 1))
    cond = model.condition(batch)
    torch.testing.assert_close(cond["semantic"], semantic)
    torch.testing.assert_close(cond["features"], joint)
    torch.testing.assert_close(cond["mean"], model.mean(torch.cat([joint, y, batch["valid"]], 1)))
    torch.testing.assert_close(cond["scale"], model.gene_scale.scale[None, :, None, None].expand(2, -1, -1, -1))
    assert set(cond) == {"semantic", "features", "mean", "scale"}


@pytest.mark.parametrize(("token", "level"), [(1, 0), (2, 1), (4, 2)])
def test_semantic_features_enter_at_their_resolution(token, level):
    model = hadmst(token=token, gene_width=0)
    assert model.level == level
    cond = model.condition(inputs(model, side=16))
    assert cond["semantic"].shape == (2, 8, 16 // token, 16 // token)
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([50, 500])
    found = model.denoise(x_t, t, cond)
    time = model.time(timestep_embedding(t, 128))
    levels = model.unet.encode(torch.cat([x_t, cond["features"], cond["mean"]], 1), time)
    assert levels[level].shape[2] == 16 // token
    told = F.conv2d(cond["semantic"], model.inject.weight, model.inject.bias)
    levels = [value + told if i == level else value for i, value in enumerate(levels)]
    torch.testing.assert_close(found, model.unet.finish(model.unet.decode(levels, time)[0]))


@pytest.mark.parametrize("what", ["h", "s", "text", "y", "valid", "x_t", "t"])
def test_every_input_matters(what):
    model = hadmst()
    batch, t = inputs(model), torch.tensor([100, 200])
    x_t = torch.randn(2, 3, 16, 16)
    before = model.denoise(x_t, t, model.condition(batch))
    changes = {"valid": lambda v: v * 0.5, "text": lambda v: v + 1}
    change = changes.get(what, lambda v: v.flip(2))
    batch = {name: change(value) if name == what else value for name, value in batch.items()}
    after = model.denoise(x_t.flip(2) if what == "x_t" else x_t, t + 300 * (what == "t"), model.condition(batch))
    assert ((after - before).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("scale", ["std", "quantile", "map"])
@pytest.mark.parametrize("residual", [True, False])
def test_network_scale_and_back(data, scale, residual):
    model = hadmst(scale=scale, residual=residual)
    model.gene_scale.fit(data)
    batch = batch_of(data, 0, 8)
    cond = model.condition(batch)
    z = model.to_network(batch["x"], cond)
    torch.testing.assert_close(model.from_network(z, cond), batch["x"], rtol=1e-4, atol=1e-4)
    assert ("mean" in cond) == residual
    expected = model.gene_scale.scale.expand(2, -1)
    if scale == "map":
        expected = batch["y"].amax((2, 3)) - batch["y"].amin((2, 3))
    torch.testing.assert_close(cond["scale"][:, :, 0, 0], expected)
    if not residual:
        torch.testing.assert_close(z, batch["x"] / cond["scale"])


# ---- windows --------------------------------------------------------------------------------------------------------


def test_windows_must_be_aligned():
    model = hadmst()
    wrong = inputs(model, side=model.align + 4)
    for call in (model.condition, lambda batch: model.loss({**batch, "x": batch["y"]}), model.sample):
        with pytest.raises(ValueError, match="windows whose sides are multiples of 8 bins, found 12 x 12"):
            call({**wrong, "tissue": wrong["valid"]})


@pytest.mark.parametrize(
    ("options", "align"),
    [
        ({}, 8),
        ({"token": 1, "window": 2}, 4),
        ({"token": 2, "window": 3}, 12),
        ({"token": 4, "window": 4}, 16),
        ({"token": 1, "window": 1, "widths": [8]}, 2),
        ({"token": 1, "window": 1, "widths": [8], "gene_width": 0}, 1),
        ({"semantic": False}, 8),
        ({"px_per_bin": 1}, 8),
        ({"px_per_bin": 3}, 8),
    ],
)
def test_aligned_windows_are_taken(options, align):
    model = hadmst(**options)
    assert (model.align, model.halo % align, model.tile % align, model.fixed_tile) == (align, 0, 0, False)
    assert model.halo >= 32
    batch, px = inputs(model, batch_size=1, side=4 * align), model.config["px_per_bin"]
    for height, width in ((2 * align, 2 * align), (2 * align, 4 * align)):
        fine = {name: px if name in ("h", "s") else 1 for name in batch}
        part = {k: v if k == "text" else v[..., : height * fine[k], : width * fine[k]] for k, v in batch.items()}
        assert model.sample(part, 1, 1).shape == (1, 1, 3, height, width)


def crop(batch, y, x, side, px=1):
    return {
        k: v if k == "text" else v[..., n * y : n * (y + side), n * x : n * (x + side)]
        for k, v in batch.items()
        for n in [px if k in ("h", "s") else 1]
    }


def test_far_away_does_not_matter():
    """Condition and denoiser see a bounded neighborhood: the rest of the window may be anything.

    What they see adds up, with the sizes of ``SMALL``: 32 bins the transformer, 4 the stem, 18 the mean's network, 40 the
    denoiser with both.
    """
    model = hadmst(px_per_bin=1)
    far, side = 104, 2 * 104 + 16
    one, two = (inputs(model, batch_size=1, side=side, seed=seed) for seed in (0, 1))
    two["text"] = one["text"]
    near = (torch.arange(side) - side // 2).abs() < far
    near = near[:, None] & near
    two = {name: value if name == "text" else torch.where(near, one[name], value) for name, value in two.items()}
    x_t, other = torch.randn(2, 1, 3, side, side)
    other = torch.where(near, x_t, other)
    core, t = np.s_[..., side // 2 : side // 2 + 4, side // 2 : side // 2 + 4], torch.tensor([300])
    with torch.no_grad():
        conditions = [model.condition(batch) for batch in (one, two)]
        outputs = [model.denoise(x, t, cond) for x, cond in zip((x_t, other), conditions, strict=True)]
    for name in ("features", "mean"):
        torch.testing.assert_close(conditions[0][name][core], conditions[1][name][core], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0][core], outputs[1][core], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=0.1)


def default_like(**options):
    """The default preset's geometry in narrow networks, with weights as they may be after some training."""
    geometry = {
        name: getattr(PRESETS["default"].options, name) for name in ("token", "window", "layers", "heads", "region")
    }
    small = {"px_per_bin": 1, "width": 8, "semantic_width": 8, "mean_widths": [8, 8, 8], **geometry, **options}
    model = hadmst(random=False, **small)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("offset", [(0, 0), (16, 48), (32, 32)])
def test_result_does_not_depend_on_the_tile(offset):
    """Beyond the margin that windows are given; up to a small share of what varies."""
    model = default_like()
    assert (model.align, model.halo) == (16, 32)
    side, small = 128, 80
    batch, noise = inputs(model, batch_size=1, side=side), torch.randn(1, 1, 3, side, side)
    y, x = offset
    part = crop(batch, y, x, small)
    inside = np.s_[..., 32 if y else 0 : -32, 32 if x else 0 : -32]
    at = np.s_[..., y : y + small, x : x + small]
    with torch.no_grad():
        pairs = {name: (value[at][inside], model.condition(part)[name][inside]) for name, value in model.condition(batch).items() if name in ("features", "mean")}  # fmt: skip
    drawn = model.sample(batch, 1, 3, noise=lambda: noise), model.sample(part, 1, 3, noise=lambda: noise[at])
    pairs["sample"] = drawn[0][at][inside], drawn[1][inside]
    for name, (whole, one) in pairs.items():
        error = float((whole - one).abs().max() / whole.std())
        assert error < 2e-3, (name, error)


def test_tiles_must_begin_at_multiples_of_align():
    model = default_like()
    batch, far = inputs(model, batch_size=1, side=144), np.s_[..., 56:72, 56:72]
    with torch.no_grad():
        whole = model.condition(batch)["features"]
        for start, same in ((16, True), (8, False)):
            part = model.condition(crop(batch, start, 0, 128))["features"]
            moved = whole[..., start : start + 128, :128]
            assert torch.allclose(part[far], moved[far], atol=1e-5) == same


# ---- presets --------------------------------------------------------------------------------------------------------


PAPER_PARAMETERS = 45_761_922  # for 120 genes


def paper(n_genes=120, **options):
    with torch.device("meta"):
        return HaDMST([f"g{i}" for i in range(n_genes)], preset="paper", **options).eval()


def conv(inputs, outputs, k):
    return inputs * outputs * k**2 + outputs


def linear(inputs, outputs):
    return inputs * outputs + outputs


def block(inputs, outputs, time=0):
    skip = 0 if inputs == outputs else conv(inputs, outputs, 1)
    norms = 2 * inputs + 2 * outputs
    return norms + conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + skip + (time and linear(time, 2 * outputs))


def unet(inputs, outputs, widths, time, blocks, attention):
    def level(start, width, number):
        attends = 2 * width + conv(width, 3 * width, 1) + conv(width, width, 1) if number in attention else 0
        return block(start, width, time) + (blocks - 1) * block(width, width, time) + attends

    n = len(widths)
    down = sum(level(widths[max(i - 1, 0)], widths[i], i) for i in range(n)) + level(widths[-1], widths[-1], n - 1)
    up = sum(level(widths[i + 1] + widths[i], widths[i], i) for i in range(n - 1))
    return conv(inputs, widths[0], 3) + down + up + 2 * widths[0] + conv(widths[0], outputs, 3)


def test_paper_preset_has_the_sizes_that_it_states():
    model, g, d, w = paper(), 120, 64, 128
    layer = 10 * w + 4 * w + linear(w, w) + linear(w, 2 * w) + linear(w, w) + linear(w, 2 * w) + linear(2 * w, w)
    expected = {
        "histology": conv(4, 32, 4) + conv(32, d, 3) + block(d, d),
        "semantic": conv(d, w, 8) + linear(256, w) + 2 * w + 4 * layer + 2 * w + conv(w, g, 1),
        "told": conv(w, d, 1),
        "null": g,
        "spots": conv(g + 1, d, 3) + block(d, d),
        "fuse": conv(2 * d, d, 1),
        "time": linear(128, 256) + linear(256, 256),
        "unet": unet(d + g, g, [128, 256, 384, 512], 256, 2, [2, 3]),
        "inject": conv(w, 512, 1),
        "alignment": 2 * linear(d, 128),
        "discriminator": conv(2, 8, 4) + conv(8, 16, 4) + conv(16, 32, 4) + 32 * g + 2 * linear(32, 32) + 2 * linear(32, 1),
    }  # fmt: skip
    found = dict.fromkeys(expected, 0)
    for name, p in model.named_parameters():
        found[name.split(".")[0]] += p.numel()
    assert found == expected
    assert sum(found.values()) == PAPER_PARAMETERS
    assert model.mean is model.single is None
    assert (model.config["scale"], model.diffusion.prediction, model.diffusion.timesteps) == (
        "quantile",
        "epsilon",
        1000,
    )
    assert (model.config["region"], model.config["heads"], model.level) == (16, 4, 3)
    assert [layer.window for layer in model.semantic.layers] == [None] * 4


@pytest.mark.parametrize(("options", "side", "px"), [({}, 256, 2), ({"factor": 5, "bin_um": 20.0}, 128, 4)])
def test_paper_preset_takes_its_tiles_and_no_others(options, side, px):
    model = paper(2, **options)
    assert (model.align, model.tile, model.halo, model.config["px_per_bin"]) == (side, side, 0, px)
    assert model.fixed_tile
    with torch.device("meta"):
        pixels = side * px
        batch = {
            "h": torch.zeros(1, 3, pixels, pixels), "s": torch.zeros(1, 1, pixels, pixels), "text": torch.zeros(1, 256),
            "y": torch.zeros(1, 2, side, side), "valid": torch.zeros(1, 1, side, side),
        }  # fmt: skip
        cond = model.condition(batch)
        output = model.denoise(torch.zeros(1, 2, side, side), torch.zeros(1, dtype=torch.long), cond)
    shapes = {name: tuple(value.shape) for name, value in cond.items()}
    expected = {
        "features": (1, 64, side, side),
        "scale": (1, 2, 1, 1),
        "semantic": (1, 128, side // 8, side // 8),
    }
    assert shapes == expected
    assert output.shape == (1, 2, side, side)
    for wrong in (side // 2, 2 * side):
        with pytest.raises(ValueError, match=rf"tiles of {side} x {side} bins and no others, found {wrong} x {wrong}"):
            model.check_window(wrong, wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_say_how_to_train(preset, monkeypatch):
    options = {}
    monkeypatch.setattr(stgen.train, "fit", lambda *args, **kwargs: options.update(kwargs) or {})
    hadmst(preset=preset, bin_um=160.0, window=2).fit(map_data(), steps=7)
    assert options == {**PRESETS[preset].training, "steps": 7}


def test_arguments_override_the_preset():
    model = hadmst(preset="paper", bin_um=160.0, residual=True, scale="std", blocks=1, attention=[])
    assert model.mean is not None
    assert (model.config["scale"], model.config["widths"], model.config["blocks"]) == ("std", [8, 8, 8], 1)
    assert model.config["prediction"] == "epsilon"
    assert not model.fixed_tile  # windows were asked for


def test_a_tile_of_the_paper_preset_is_trained_on():
    """In bins so large that it is a small one."""
    small = {"width": 8, "semantic_width": 8, "widths": [8] * 4, "blocks": 1, "attention": [3], "text_dim": 16}
    model = HaDMST(GENES, preset="paper", factor=4, bin_um=160.0, **small)
    assert (model.align, model.fixed_tile, model.config["window"], model.config["px_per_bin"]) == (16, True, None, 32)
    batch = inputs(model, side=16)
    losses = model.train().loss({**batch, "x": batch["y"], "tissue": batch["valid"]})
    (losses["loss"] + losses["discriminator"]).backward()
    assert all(value.isfinite() for value in losses.values())
    assert set(losses) == {"loss", "mse", "semantic", "alignment", "adversarial", "discriminator"}


BAD = {
    "preset": ({"preset": "large"}, "`preset` must be one of 'default', 'paper', found 'large'"),
    "p_missing": ({"p_missing": 1.0}, r"`p_missing` must be a share in \[0, 1\), found 1.0"),
    "semantic_weight": ({"semantic_weight": -1}, "`semantic_weight` must be a finite number that is not negative, found -1"),
    "alignment_weight": ({"alignment_weight": math.inf}, "`alignment_weight` must be a finite number that is not negative"),
    "euclidean_weight": ({"euclidean_weight": -0.1}, "`euclidean_weight` must be"),
    "info_nce_weight": ({"info_nce_weight": math.nan}, "`info_nce_weight` must be"),
    "adversarial_weight": ({"adversarial_weight": -0.1}, "`adversarial_weight` must be"),
    "token": ({"token": 8}, "`token` must be a number of bins that one resolution .* has, one of 1, 2, 4; found 8"),
    "odd token": ({"token": 3}, "one of 1, 2, 4; found 3"),
    "scale": ({"scale": "mean"}, "`scale` must be one of"),
    "prediction": ({"prediction": "noise"}, "`prediction` must be one of"),
    "genes": ({"genes": []}, "at least one gene"),
    "twice": ({"genes": ["A", "A"]}, "without repetition"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    options, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        hadmst(random=False, **options)


@pytest.mark.parametrize("n_genes", [2, 300])
def test_any_number_of_genes(n_genes):
    model = hadmst([f"g{i}" for i in range(n_genes)])
    batch = inputs(model, batch_size=1)
    assert model.sample(batch, 2, 1).shape == (1, 2, n_genes, 16, 16)
    losses = model.train().loss({**batch, "x": batch["y"], "tissue": batch["valid"]})
    assert losses["loss"].isfinite()


@pytest.mark.parametrize(("channels", "px"), [(1, 2), (4, 3), (16, 1)])
def test_any_image(channels, px):
    model = hadmst(image_channels=channels, px_per_bin=px)
    batch = inputs(model)
    assert model.sample(batch, 1, 1).shape == (2, 1, 3, 16, 16)
    one, two = (model.condition({**batch, "h": h}) for h in (batch["h"], batch["h"].flip(-1)))
    assert not torch.allclose(one["mean"], two["mean"], atol=1e-2)


# ---- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm"])
def test_same_noise_same_samples(data, solver):
    model = hadmst()
    batch, calls = batch_of(data, 3, 5), []

    def noise():
        calls.append(torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(len(calls))))
        return calls[-1]

    drawn = model.sample(batch, 2, 3, solver=solver, noise=noise)
    assert len(calls) == (3 if solver == "ddpm" else 1)
    calls.clear()
    assert torch.equal(model.sample(batch, 2, 3, solver=solver, noise=noise), drawn)
    assert drawn.shape == (2, 2, 3, 16, 16)
    assert not torch.allclose(drawn[:, 0], drawn[:, 1])


def test_untrained_model_samples_its_mean():
    """A network that says x_0 = 0 adds nothing to the predicted mean."""
    model = hadmst(random=False, prediction="x_0")
    randomized(model.mean)
    model.gene_scale.scale.uniform_(0.5, 2)
    batch = inputs(model)
    cond = model.condition(batch)
    drawn = model.sample(batch, 2, 3)
    torch.testing.assert_close(drawn, (cond["mean"] * cond["scale"])[:, None].expand(-1, 2, -1, -1, -1))


def test_items_do_not_see_each_other(data):
    model = hadmst()

    def draw(*rows):
        return model.sample(batch_of(data, *rows), 2, 3, [torch.Generator().manual_seed(i) for i in rows])

    torch.testing.assert_close(draw(3), draw(0, 3, 5)[1:2], rtol=1e-3, atol=1e-3)


def test_nothing_is_drawn_when_not_training(untouched_rng):
    with torch.random.fork_rng():
        model = hadmst()
    batch, x_t = inputs(model), torch.zeros(2, 3, 16, 16)
    results = []
    for _ in range(2):
        cond = model.condition(batch)
        results.append([*cond.values(), model.denoise(x_t, torch.tensor([3, 400]), cond)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"adversarial_weight": 0, "semantic": False}])
def test_saved_and_restored_model_gives_the_same_samples(data, tmp_path, options):
    model = hadmst(random=False, **options)
    model.fit(data, steps=2, **QUICK)
    model.record = {"sections": ["one"]}
    restored = models.load(model.save(tmp_path))
    assert type(restored) is HaDMST
    assert restored.config == model.config == json.loads((tmp_path / "config.json").read_text())["config"]
    assert restored.weights_sha256() == model.weights_sha256()
    for name in ("align", "halo", "fixed_tile", "needs_low_res", "needs_labels", "needs_text"):
        assert getattr(restored, name) == getattr(model, name)
    draws = [m.sample(batch_of(data, 2), 2, 3, torch.Generator().manual_seed(1)) for m in (model, restored)]
    assert torch.equal(*draws)
    assert draws[0].std() > 0


@pytest.mark.parametrize("options", [{}, {"preset": "paper", "bin_um": 160.0}, {"window": 4, "token": 1}, {"text_encoder": "none"}])  # fmt: skip
def test_configuration_makes_the_same_model(options):
    options = {"window": None, **options} if "preset" in options else options
    model = hadmst(**options)
    again = HaDMST(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert names(again) == names(model)
    for name in ("align", "tile", "halo", "fixed_tile", "needs_text"):
        assert getattr(again, name) == getattr(model, name)


def test_copies_are_models_of_their_own(data):
    model = hadmst()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.discriminator.gene.parametrizations.weight.original += 1
        twin.null += 1
    assert different(*(states(m)[1] for m in (model, twin))) == {"discriminator.gene.parametrizations.weight.original"}
    assert different(*(states(m)[0] for m in (model, twin))) == {"null"}
    assert isinstance(twin.diffusion, Diffusion)
