from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tests.models import conftest
from tests.models.conftest import as_double, batch_of, inputs, randomized

import stgen.train
from stgen import models
from stgen.diffusion import weighted_mean
from stgen.models import C3Diff, _map_diffusion
from stgen.models._map_diffusion import conditioning_dropout
from stgen.models.c3diff import model as c3diff_model
from stgen.models.c3diff.losses import CONTRASTIVE, augment, contrastive_loss, guided, impute
from stgen.models.c3diff.model import TAU
from stgen.models.c3diff.networks import GeneCode, ZeroControl
from stgen.models.c3diff.options import PRESETS

GENES = ["A", "B", "C"]
SMALL = {"factor": 4, "px_per_bin": 2, "width": 8, "code": 8, "widths": [8, 8], "control_widths": [8, 8]}
TABLE = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 4)), index=list("ABCDEF"))
QUICK = {**conftest.QUICK, "batch_size": 8}
SPHERES = ["modality_h", "content_h", "modality_y", "content_y"]


reached = partial(conftest.reached, deep=("to_sphere",))
map_data = partial(conftest.map_data, side=24, tile=8, border=16)


def c3diff(genes=GENES, *, random=True, **options):
    model = C3Diff(genes, **{**SMALL, **options}).eval()
    if random:
        randomized(model, std=0.2)
        generator = torch.Generator().manual_seed(1)
        model.codes.statistics.normal_(generator=generator)
        model.gene_scale.scale.uniform_(0.5, 2, generator=generator)
    return model


@pytest.fixture(scope="module")
def data():
    return map_data()


# ---- information augmentation: Eq. 1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_augmented_features_are_of_unit_length(dim):
    z = F.normalize(torch.randn(5, 6, 7, dtype=torch.float64), dim=dim)
    length = augment(z, 0.5, dim).square().sum(dim).sqrt()
    torch.testing.assert_close(length, torch.ones_like(length))
    torch.testing.assert_close(augment(z, 0.0, dim), z)


@pytest.mark.parametrize("sigma", [0.03, 0.1])
def test_noise_has_its_sigma_before_it_is_normalized(sigma):
    """Of ``e_1``, normalized ``e_1 + mu`` is ``mu_k / (1 + mu_1)`` of its first entry in every other."""
    z = torch.zeros(4000, 50, dtype=torch.float64)
    z[:, 0] = 1
    noised = augment(z, sigma, 1)
    along = noised[:, 0] / (noised**2).sum(1).sqrt()
    mu = noised[:, 1:] / along[:, None]
    assert float(mu.mean()) == pytest.approx(0, abs=4 * sigma / 200_000**0.5)
    assert float(mu.std()) == pytest.approx(sigma, rel=0.01 + 2 * sigma**2)


def test_only_features_of_low_resolution_maps_are_augmented_and_only_in_training():
    model = c3diff(sigma=0.1)
    batch, present = inputs(model), torch.ones(2, dtype=torch.bool)
    still = model.encode(batch, present)
    assert all(map(torch.equal, still[:4], model.encode(batch, present)[:4]))
    model.train()
    noised = model.encode(batch, present)
    for name in ("m_h", "c_h"):
        assert torch.equal(getattr(noised, name), getattr(still, name))
        assert torch.equal(noised.embeddings[name], still.embeddings[name])
    for name in ("m_y", "c_y"):
        change = (getattr(noised, name) - getattr(still, name)).square().sum(1)
        assert 0 < change.mean() < 2 * 8 * 0.1**2  # of eight channels
        change = (noised.embeddings[name] - still.embeddings[name]).square().sum(1)
        assert ((0.4 < change) & (change < 1)).all()  # 2 - 2 / sqrt(1 + 128 0.1^2) = 0.68 is expected
    for f in (*noised[:4], *noised.embeddings.values()):
        torch.testing.assert_close(f.square().sum(1), torch.ones_like(f[:, 0]))
    model = c3diff(sigma=0.1, augmentation=False).train()
    assert all(map(torch.equal, model.encode(batch, present)[:4], still[:4]))


def test_encoders_of_low_resolution_maps_written_out():
    """They see each cell of ``stride`` bins as the sum over genes of scaled expression times what tells of the gene."""
    model = c3diff()
    model, batch = as_double(model, inputs(model))
    batch["valid"][:, :, :4, :4] = 0  # one cell
    batch["valid"][:, :, 2:5, 4:] = 0.5
    features = model.encode(batch, torch.tensor([True, True]))
    about, cells, known = model.profile(model.codes()), [], []
    for b in range(2):
        for i in range(2):
            for j in range(2):
                cell = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                known.append(batch["valid"][b, 0][cell].mean())
                genes = [batch["y"][b, g][cell].mean() / model.gene_scale.scale[g] * about[g] for g in range(3)]
                cells.append(torch.cat([sum(genes) / math.sqrt(3), known[-1][None]]))
    seen = torch.stack(cells).reshape(2, 2, 2, -1).permute(0, 3, 1, 2)
    known = torch.stack(known).reshape(2, 2, 2)
    for name, f, z in (("modality_y", features.m_y, "m_y"), ("content_y", features.c_y, "c_y")):
        raw = getattr(model, name)(seen)
        expected = raw / (raw**2).sum(1, keepdim=True).sqrt() * (known > 0)[:, None]
        torch.testing.assert_close(f, expected)
        assert (f[:, :, 0, 0] == 0).all()
        pooled = (
            sum(expected[..., i, j] * known[:, i, j, None] for i in range(2) for j in range(2))
            / known.sum((1, 2))[:, None]
        )
        embedded = model.to_sphere[name](pooled)
        torch.testing.assert_close(features.embeddings[z], embedded / (embedded**2).sum(1, keepdim=True).sqrt())


# ---- contrastive losses -----------------------------------------------------------------------------------------------


def l_cl(z, positive, negatives, tau):
    positive, negatives = (z @ positive / tau).exp(), [(z @ n / tau).exp() for n in negatives]
    return -(positive / (positive + sum(negatives))).log()


def expectation(terms, tau):
    """Mean of ``L_cl`` over anchors, their positives and their negatives; of no terms, zero."""
    terms = [l_cl(*term, tau) for term in terms if term[2]]
    return sum(terms) / len(terms) if terms else 0 * tau


def modal(z, here, tau):
    h, y = list(z["m_h"]), [z["m_y"][j] for j in here]
    return sum(
        expectation([(own[j], own[k], other) for j in range(len(own)) for k in range(len(own)) if k != j], tau)
        for own, other in ((h, y), (y, h))
    )


def content(z, here, tau):
    h, y, n = z["c_h"], z["c_y"], len(z["c_h"])
    others = {j: [h[k] for k in range(n) if k != j] + [y[k] for k in here if k != j] for j in here}
    return sum(expectation([(a[j], b[j], others[j]) for j in here], tau) for a, b in ((h, y), (y, h)))


def inter_sphere(z, here, tau):
    m, c, n = z["m_h"], z["c_h"], len(z["m_h"])
    return expectation([(m[j], c[j], [c[k] for k in range(n) if k != j]) for j in range(n)], tau)


WRITTEN_OUT = {"modal": modal, "content": content, "inter_sphere": inter_sphere}


def embeddings(n):
    raw = {name: torch.randn(n, 7, dtype=torch.float64) for name in ("m_h", "c_h", "m_y", "c_y")}
    return {name: F.normalize(z, dim=1).requires_grad_() for name, z in raw.items()}


def gradient_of(value, leaves):
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("here", [[0, 1, 2, 3, 4], [1, 4], [3], []])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_losses_written_out(name, here):
    """Value and gradient, pair by pair; ``here`` are the samples with a low-resolution map."""
    results = []
    for loss in (CONTRASTIVE[name], WRITTEN_OUT[name]):
        torch.manual_seed(1)
        z, tau = embeddings(5), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        present = torch.zeros(5, dtype=torch.bool)
        present[here] = True
        value = loss(z, present if loss is CONTRASTIVE[name] else here, tau)
        results.append([value, *gradient_of(value, [*z.values(), tau])])
    torch.testing.assert_close(*results)
    assert (results[0][0] > 0) == (name == "inter_sphere" or len(here) > 0)


@pytest.mark.parametrize(
    ("name", "n", "here"),
    [*((name, 1, here) for name in CONTRASTIVE for here in (True, False)), ("modal", 4, False), ("content", 4, False)],
)
def test_contrastive_losses_without_pairs_are_zero(name, n, here):
    z, log_tau = embeddings(n), torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = CONTRASTIVE[name](z, torch.full((n,), here), log_tau.exp())
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradient_of(loss, [*z.values(), log_tau]))


def test_contrastive_loss_of_equal_similarities():
    """``log(1 + K)``; pairs that are none count neither in the mean nor in the sum."""
    positive, negatives = (torch.full((4, n), 0.7, dtype=torch.float64) for n in (2, 5))
    assert float(contrastive_loss(positive, negatives)) == pytest.approx(math.log(6))
    negatives[:, 3:] = positive[:, 1] = -torch.inf
    assert float(contrastive_loss(positive, negatives)) == pytest.approx(math.log(4))
    negatives[0], positive[1] = -torch.inf, -torch.inf
    assert float(contrastive_loss(positive, negatives)) == pytest.approx(math.log(4))
    assert float(contrastive_loss(1e4 * positive, 1e4 * negatives)) == pytest.approx(math.log(4))


TOUCHED = {  # by the gradient of each term
    "modal": {"modality_h", "modality_y", "to_sphere.modality_h", "to_sphere.modality_y", "profile", "codes", "log_tau"},
    "content": {"content_h", "content_y", "to_sphere.content_h", "to_sphere.content_y", "profile", "codes", "log_tau"},
    "inter_sphere": {"modality_h", "content_h", "to_sphere.modality_h", "to_sphere.content_h", "log_tau"},
    "mean": {*SPHERES, "profile", "codes", "control", "readout", "own"},
    "denoising": {*SPHERES, "profile", "codes", "control", "inject", "time", "gene", "unet"},
}  # fmt: skip


@pytest.mark.parametrize("progress", [0.0, 1.0])
@pytest.mark.parametrize("term", TOUCHED)
def test_gradient_of_each_term_reaches_what_it_should(data, term, progress):
    model = c3diff(p_missing=0.4).train()
    model.progress = progress
    losses = model.loss(batch_of(data, 0, 5, 9, 12, 20))
    weights = {"mean": 1.0, **{name: model.config[f"{name}_weight"] for name in CONTRASTIVE}}
    denoising = losses["loss"] - sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(denoising.detach(), losses["mse"])
    (denoising if term == "denoising" else losses[term]).backward()
    assert reached(model) == TOUCHED[term]


# ---- imputation -------------------------------------------------------------------------------------------------------


def weights_by_loops(z_missing, z_present, tau):
    rows = []
    for z_l in z_missing:
        e = [math.exp(sum(a * b for a, b in zip(z_l, z_k, strict=True)) / tau) for z_k in z_present]
        rows.append([value / sum(e) for value in e])
    return np.array(rows)


def test_imputation_written_out():
    z_missing, z_present = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (2, 4))
    f_y = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    weight = weights_by_loops(z_missing.tolist(), z_present.tolist(), 0.2)
    expected = np.stack([sum(weight[m, k] * f_y[k].numpy() for k in range(4)) for m in range(2)])
    np.testing.assert_allclose(impute(z_missing, z_present, f_y, 0.2), expected)
    mean = f_y.mean(0).expand(2, -1, -1, -1)
    torch.testing.assert_close(impute(z_missing, z_present, f_y, math.inf), mean)
    torch.testing.assert_close(impute(z_missing, z_present[:1].expand(4, -1), f_y, 0.2), mean)
    torch.testing.assert_close(impute(z_present, z_present, f_y, 1e-4), f_y)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["similarity", "mean", "zero", "drop"])
def test_missing_features_are_imputed_until_half_of_the_training(kind, progress):
    model = c3diff(imputation=kind, augmentation=False)
    model, batch = as_double(model, inputs(model, batch_size=5))
    model.train()
    model.progress = progress
    here, missing = [0, 2, 3], [1, 4]
    present = torch.tensor([True, False, True, True, False])
    whole = model.encode(batch, torch.ones(5, dtype=torch.bool))
    found = model.encode(batch, present)
    strength = {0.0: 1, 0.25: 0.5}.get(progress, 0) if kind in ("similarity", "mean") else 0
    for f, z in (("m_y", "m_h"), ("c_y", "c_h")):
        f_y, f_found, z_h = getattr(whole, f), getattr(found, f), whole.embeddings[z].tolist()
        torch.testing.assert_close(f_found[here], f_y[here])
        tau = float(model.log_tau.detach().exp()) if kind == "similarity" else math.inf
        weight = weights_by_loops([z_h[i] for i in missing], [z_h[i] for i in here], tau)
        expected = strength * np.einsum("lk,kdhw->ldhw", weight, f_y[here].detach())
        np.testing.assert_allclose(f_found[missing].detach(), expected, atol=1e-12)
    model.eval()
    for f in model.encode(batch, present)[2:4]:  # as the model is used
        assert (f[missing] == 0).all()


def test_features_are_imputed_in_mixed_precision():
    """On a GPU, under autocast, normalized features are in single precision and products are not."""
    model, present = c3diff(), torch.tensor([True, False, True])
    f_y, z_h = torch.randn(3, 8, 2, 2), F.normalize(torch.randn(3, 128), dim=1)
    expected = model._imputed(f_y, z_h, present, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = model._imputed(f_y, z_h, present, 1.0)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_without_any_map_there_is_nothing_to_impute():
    model = c3diff().train()
    model.progress = 0.0
    features = model.encode(inputs(model), torch.zeros(2, dtype=torch.bool))
    assert (features.m_y == 0).all()
    assert (features.c_y == 0).all()


def test_never_all_maps_are_hidden():
    present = torch.tensor([True, False, True, True, False, True])
    shown = torch.stack([conditioning_dropout(present, 0.9) for _ in range(2000)])
    assert (shown & present).any(1).all()
    assert shown[:, [1, 4]].float().mean() == pytest.approx(0.1, abs=0.02)
    alone = torch.tensor([False, True])
    assert all(conditioning_dropout(alone, 0.99)[1] for _ in range(50))
    assert conditioning_dropout(present, 0.0).all()
    shown = torch.stack([conditioning_dropout(torch.ones(8, dtype=torch.bool), 0.3) for _ in range(2000)])
    assert shown.float().mean() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("imputation", ["similarity", "mean", "zero", "drop"])
def test_tiles_without_a_map_are_left_out_only_with_drop(data, imputation, monkeypatch):
    monkeypatch.setattr(_map_diffusion, "conditioning_dropout", lambda present, p: torch.tensor([True, False, True]))
    model = c3diff(imputation=imputation, augmentation=False).train()
    batch = batch_of(data, 0, 5, 9)
    changed = {**batch, "x": batch["x"] + torch.tensor([0.0, 1, 0])[:, None, None, None]}
    losses = []
    for one in (batch, changed):
        torch.manual_seed(3)
        losses.append(model.loss(one))
    for name in ("mse", "mean"):
        assert torch.equal(losses[0][name], losses[1][name]) == (imputation == "drop")


@pytest.mark.parametrize("imputation", ["similarity", "mean", "zero", "drop"])
@pytest.mark.parametrize("rows", [(0,), (0, 5, 9)])
def test_batch_without_any_map(data, imputation, rows):
    model = c3diff(imputation=imputation).train()
    model.progress = 0.0
    batch = batch_of(data, *rows)
    losses = model.loss({**batch, "y": 0 * batch["y"], "valid": 0 * batch["valid"]})
    assert losses["modal"] == losses["content"] == 0
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- without a low-resolution map -------------------------------------------------------------------------------------


def test_no_map_is_a_map_of_zeros_that_is_not_valid():
    model = c3diff()
    batch = inputs(model)
    zeros = {**batch, "y": 0 * batch["y"], "valid": 0 * batch["valid"]}
    one, two = (model.condition(b) for b in ({"h": batch["h"]}, zeros))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    draws = [model.sample(b, 2, 2, torch.Generator().manual_seed(0)) for b in ({"h": batch["h"]}, zeros, batch)]
    assert torch.equal(*draws[:2])
    assert not torch.allclose(draws[0], draws[2], atol=1e-2)


@pytest.mark.parametrize("scale", ["std", "map"])
def test_hidden_map_is_seen_by_nothing(scale):
    model = c3diff(scale=scale)
    batch, present = inputs(model), torch.tensor([True, False])
    other = {**batch, "y": torch.cat([batch["y"][:1], 3 * batch["y"][1:].flip(2)])}
    one, two = (model._condition(b, model.encode(b, present), present) for b in (batch, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    without = model.condition({"h": batch["h"]})
    assert all(torch.equal(one[name][1], without[name][1]) for name in one)


def test_one_map_more_or_less_does_not_matter_to_the_others():
    model = c3diff()
    batch = inputs(model, batch_size=3)
    missing = {**batch, "valid": batch["valid"] * torch.tensor([1.0, 0, 1])[:, None, None, None]}
    one, two = model.condition(batch), model.condition(missing)
    for name in one:
        torch.testing.assert_close(one[name][[0, 2]], two[name][[0, 2]])
    assert not torch.allclose(one["mean"][1], two["mean"][1], atol=1e-2)


@pytest.mark.parametrize(("p_missing", "needs"), [(0.0, True), (0.3, False)])
def test_model_that_never_missed_a_map_needs_one(p_missing, needs):
    model = c3diff(p_missing=p_missing)
    assert (model.needs_low_res, model.uses_low_res) == (needs, True)


def test_nothing_is_drawn_when_not_training(untouched_rng):
    with torch.random.fork_rng():
        model = c3diff()
    batch, x_t = inputs(model), torch.zeros(2, 3, 8, 8)
    results = []
    for _ in range(2):
        cond = model.condition(batch)
        results.append([*cond.values(), model.denoise(x_t, torch.tensor([3, 400]), cond)])
    assert all(map(torch.equal, *results))


# ---- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_written_out():
    conditional, unconditional = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_denoiser_is_guided(weight):
    model = c3diff()
    model, batch = as_double(model, inputs(model))
    cond, x_t, t = model.condition(batch), torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([50, 700])
    conditional = model.denoise(x_t, t, cond)
    unconditional = model.denoise(x_t, t, {**cond, "kept": 0 * cond["kept"]})
    assert not torch.allclose(conditional, unconditional, atol=1e-2)
    model.guidance = weight
    torch.testing.assert_close(model.denoise(x_t, t, cond), weight * conditional + (1 - weight) * unconditional)
    assert model.sampling_options == {"guidance": weight}
    assert model.config["guidance"] == 1  # what it was constructed with
    assert c3diff(guidance=weight).config["guidance"] == c3diff(guidance=weight).guidance == weight


def test_loss_is_not_guided(data):
    batch, losses = batch_of(data, 0, 7), []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        losses.append(c3diff(guidance=weight).eval().loss(batch)["mse"])
    torch.testing.assert_close(*losses)


def test_without_guidance_by_the_condition_it_does_not_matter():
    model = c3diff(residual=False, guidance=0.0)
    noise = torch.randn(2, 1, 3, 8, 8)
    one, two = (model.sample(inputs(model, seed=seed), 1, 3, noise=lambda: noise) for seed in (0, 1))
    assert torch.equal(one, two)
    assert torch.equal(one, model.sample({"h": inputs(model)["h"]}, 1, 3, noise=lambda: noise))
    model.guidance = 0.5
    assert not torch.allclose(one, model.sample(inputs(model), 1, 3, noise=lambda: noise), atol=1e-2)


def test_what_is_not_kept_sees_neither_condition_nor_gene():
    model = c3diff()
    cond = {**model.condition(inputs(model)), "kept": torch.tensor([0.0, 1])}
    x_t, t = torch.randn(1, 1, 8, 8).expand(2, 3, -1, -1), torch.tensor([300, 300])
    output = model.denoise(x_t, t, cond)
    torch.testing.assert_close(output[0, 1:], output[0, :-1])
    assert not torch.allclose(output[1, 1:], output[1, :-1], atol=1e-2)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_guidance_needs_training_without_condition(weight):
    message = "was not trained without condition .*construct it with p_unconditional=0.1 and fit it, or leave guidance"
    with pytest.raises(ValueError, match=message):
        c3diff(p_unconditional=0.0, guidance=weight)
    model = c3diff(p_unconditional=0.0)
    with pytest.raises(ValueError, match=message):
        model.guidance = weight
    assert model.guidance == model.config["guidance"] == 1
    model.guidance = 1.0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_guidance_must_be_a_weight(weight):
    with pytest.raises(ValueError, match="`guidance` must be a finite number that is not negative, found"):
        c3diff(guidance=weight)


# ---- genes ------------------------------------------------------------------------------------------------------------


def test_statistics_of_genes_written_out(data):
    scale = torch.tensor([0.5, 2.0, 3.0])
    codes = GeneCode(3, 8)
    codes.fit(data, scale)
    x = [item["x"][:, item["tissue"][0] > 0].double().numpy() for item in (data[i] for i in range(len(data)))]
    rows = []
    for g in range(3):
        values = [float(value) for tile in x for value in tile[g]]
        rows.append([math.log(np.mean(values)), np.mean([value > 0 for value in values]), math.log(scale[g])])
    rows = np.array(rows)
    expected = (rows - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(codes.statistics, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_genes", [1, 2])
def test_statistics_of_genes_that_are_all_alike(n_genes):
    data = map_data(n_genes=1)
    data.sections[0] = replace(data.sections[0], truth=data.sections[0].truth.repeat(n_genes, 0), measurement=None)
    codes = GeneCode(n_genes, 8)
    codes.fit(data, torch.ones(n_genes))
    torch.testing.assert_close(codes.statistics, torch.zeros(n_genes, 3))


def test_codes_are_what_is_learned_and_the_statistics():
    codes = randomized(GeneCode(3, 8))
    codes.statistics.normal_()
    torch.testing.assert_close(codes(), codes.embedding.weight + codes.describe(codes.statistics))
    codes = randomized(GeneCode(3, 8, columns=4))
    codes.statistics.normal_()
    codes.table.normal_()
    codes.standardize.fit(codes.table)
    z = (codes.table - codes.table.mean(0)) / codes.table.std(0, correction=0)
    torch.testing.assert_close(codes(), codes.project(z) + codes.describe(codes.statistics), rtol=1e-5, atol=1e-5)


def test_statistics_of_new_genes_follow_from_their_embeddings():
    """Where they are linear in the embedding, the regression finds them."""
    data, codes = map_data(n_genes=30), GeneCode(30, 8, columns=3)
    codes.fit(data, torch.ones(30))
    statistics = codes.statistics.clone()
    codes.table.copy_(statistics @ torch.randn(3, 3) + 1)
    codes.fit(data, torch.ones(30))
    predicted, scale = codes.predict(codes.table)
    torch.testing.assert_close(predicted, statistics, rtol=0.05, atol=0.05)
    torch.testing.assert_close(scale, torch.ones(30))


def test_control_written_out():
    control = randomized(ZeroControl(5, 6, 4)).double()
    f, code = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    found = control(f, code).unflatten(0, (2, 3))
    for b in range(2):
        for g in range(3):
            seen = f[b] * (1 + control.gate(code[b, g]))[:, None, None]
            expected = F.conv2d(seen[None], control.weight.weight[:, :, None, None])[0]
            torch.testing.assert_close(found[b, g], expected)


@pytest.mark.parametrize("control_patch", [1, 2])
def test_mean_written_out(control_patch):
    """A gene's mean is its reading of the control branch and a line through the low-resolution map."""
    model = c3diff(control_patch=control_patch)
    model, batch = as_double(model, inputs(model))
    features, cond = model.encode(batch, torch.tensor([True, True])), model.condition(batch)
    y = [F.interpolate(f, scale_factor=4, mode="bilinear") for f in (features.m_y, features.c_y)]
    hints = torch.cat([math.sqrt(8) * torch.cat([features.m_h, features.c_h, *y], 1), batch["valid"]], 1)
    read = F.pixel_shuffle(model.control(F.pixel_unshuffle(hints, control_patch)), control_patch)
    for g in range(3):
        code = model.codes()[g]
        gain, shift = model.own(code)
        expected = sum(w * read[:, i] for i, w in enumerate(model.readout(code)))
        expected = expected + gain * batch["y"][:, g] / model.gene_scale.scale[g] + shift
        torch.testing.assert_close(cond["mean"][:, g], expected)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("genes", [[[2, 0], [2, 0]], [[1], [1]], [[0, 2], [1, 0]]])
def test_gene_does_not_depend_on_which_others_are_sampled(genes, guidance):
    model = c3diff(guidance=guidance)
    batch, noise, genes = inputs(model), torch.randn(2, 3, 3, 8, 8), torch.tensor(genes)
    whole = model.sample(batch, 3, 3, noise=lambda: noise)
    rows = torch.arange(2)[:, None]
    of_some = noise[rows, :, genes].transpose(1, 2)
    some = model.sample({**batch, "gene": genes}, 3, 3, noise=lambda: of_some)
    assert some.shape == (2, 3, genes.shape[1], 8, 8)
    torch.testing.assert_close(some, whole[rows, :, genes].transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_genes_do_not_see_each_other():
    model = c3diff()
    cond, x_t, t = model.condition(inputs(model)), torch.randn(2, 3, 8, 8), torch.tensor([100, 600])
    other = x_t.clone()
    other[:, 0] += 1
    change = (model.denoise(other, t, cond) - model.denoise(x_t, t, cond)).abs().amax((0, 2, 3))
    assert change[0] > 0.01
    assert (change[1:] < 1e-5).all()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 5), (2 * 64 * 2, [2, 2, 1]), (2**19, [5])])
def test_genes_are_batched_over(most, sizes, guidance, monkeypatch):
    model = c3diff([f"g{i}" for i in range(5)], guidance=guidance)
    cond, x_t, t = model.condition(inputs(model)), torch.randn(2, 5, 8, 8), torch.tensor([100, 600])
    expected, seen, predict = model.denoise(x_t, t, cond), [], C3Diff._predict
    monkeypatch.setattr(C3Diff, "_predict", lambda m, x, *args: seen.append(x.shape[1]) or predict(m, x, *args))
    monkeypatch.setattr(c3diff_model, "MOST_VALUES", most)
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(x_t, t, cond), expected, rtol=1e-5, atol=1e-5)
    assert seen[:: 1 if guidance == 1 else 2] == sizes


@pytest.mark.parametrize("options", [{}, {"preset": "paper", "bin_um": 160.0}, {"residual": False}])
def test_networks_are_the_same_for_any_number_of_genes(options):
    few, many = (c3diff([f"g{i}" for i in range(n)], random=False, **options) for n in (2, 50))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (few, many)]
    assert shapes[0].keys() == shapes[1].keys()
    different = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert different == {"codes.embedding.weight"}
    sizes = [sum(p.numel() for p in model.parameters()) for model in (few, many)]
    assert sizes[1] - sizes[0] == 48 * 8
    few, many = (c3diff([f"g{i}" for i in range(n)], random=False, gene_embedding=4, **options) for n in (2, 50))
    assert [p.shape for p in few.parameters()] == [p.shape for p in many.parameters()]


# ---- genes that the model was not trained on --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(data):
    """A model whose gene codes come from a table, fitted for a moment."""
    model = C3Diff(GENES, **SMALL, gene_embedding=TABLE)
    model.fit(data, steps=1, **QUICK)
    statistics = {name: getattr(model.codes, name).clone() for name in ("table", "statistics", "regression")}
    standardize = {name: value.clone() for name, value in model.codes.standardize.state_dict().items()}
    scale = model.gene_scale.scale.clone()
    randomized(model, std=0.2)
    model.codes.load_state_dict({**model.codes.state_dict(), **statistics})
    model.codes.standardize.load_state_dict(standardize)
    model.gene_scale.scale.copy_(scale)
    model.record = {"sections": ["one"]}
    return model


def test_table_is_kept_with_the_model(described):
    np.testing.assert_allclose(described.codes.table, TABLE.loc[GENES], rtol=1e-6)
    assert described.config["gene_embedding"] == 4
    json.dumps(described.config)


def test_same_genes_give_the_same_samples(described, data):
    before = described.weights_sha256()
    again = described.with_genes(GENES, TABLE)
    assert again is not described
    assert again.weights_sha256() == before
    assert again.config == described.config
    assert (again.fitted, again.training) == (True, False)
    draws = [m.sample(batch_of(data, 2), 2, 3, torch.Generator().manual_seed(1)) for m in (described, again)]
    assert torch.equal(*draws)


def test_order_of_the_genes_does_not_matter(described):
    turned = described.with_genes(["C", "A", "B"], TABLE)
    batch, noise, order = inputs(described), torch.randn(2, 2, 3, 8, 8), [2, 0, 1]
    expected = described.sample(batch, 2, 3, noise=lambda: noise)[:, :, order]
    found = turned.sample({**batch, "y": batch["y"][:, order]}, 2, 3, noise=lambda: noise[:, :, order])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_known_genes_are_what_they_were_among_new_ones(described):
    """From histology alone, where the other genes say nothing."""
    new = described.with_genes(["E", "B", "F", "A"], TABLE)
    assert new.genes == new.config["genes"] == ["E", "B", "F", "A"]
    assert (new.record["trained_on"], described.genes) == (GENES, GENES)
    known, old = [1, 3], [1, 0]
    torch.testing.assert_close(new.codes()[known], described.codes()[old])
    torch.testing.assert_close(new.gene_scale.scale[known], described.gene_scale.scale[old])
    batch, noise = {"h": inputs(described)["h"]}, torch.randn(2, 2, 4, 8, 8)
    found = new.sample(batch, 2, 3, noise=lambda: noise)
    of_known = torch.stack([noise[:, :, 3], noise[:, :, 1], noise[:, :, 0]], 2)
    expected = described.sample(batch, 2, 3, noise=lambda: of_known)
    torch.testing.assert_close(found[:, :, known], expected[:, :, old], rtol=1e-3, atol=1e-3)
    assert found.isfinite().all()
    assert found[:, :, 0].std() > 0.01


def test_new_genes_are_described_by_their_embeddings(described):
    new = described.with_genes(["E", "F"], TABLE)
    codes = described.codes
    z = (TABLE.loc[["E", "F"]] - TABLE.loc[GENES].mean()) / TABLE.loc[GENES].std(ddof=0)
    predicted = z.to_numpy() @ codes.regression[:-1].numpy() + codes.regression[-1].numpy()
    np.testing.assert_allclose(new.codes.statistics, predicted[:, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.gene_scale.scale, np.exp(predicted[:, 3]), rtol=1e-4)
    np.testing.assert_allclose(codes.predict(codes.table)[0].mean(0), codes.statistics.mean(0), atol=1e-5)
    twin = TABLE.rename(index={"A": "Z"})  # a gene with the embedding of a known one has its learned code
    own = [m.codes.project(m.codes.standardize(m.codes.table)) for m in (described.with_genes(["Z"], twin), described)]
    torch.testing.assert_close(own[0][0], own[1][0])


def test_model_for_other_genes_goes_on_from_there(described, tmp_path):
    described.guidance = 2.0
    try:
        new = described.with_genes(["A", "D"], TABLE)
    finally:
        described.guidance = 1.0
    assert (new.guidance, described.guidance) == (2.0, 1.0)
    again = models.load(new.save(tmp_path)).with_genes(["D", "E"], TABLE)
    direct = described.with_genes(["D", "E"], TABLE)
    assert again.weights_sha256() == direct.weights_sha256()


BAD_TABLES = {
    "gene": (lambda: TABLE.drop(index="E"), KeyError, "`gene_embedding` lacks 1 of 2 genes: E. Its index must hold"),
    "columns": (lambda: TABLE[[0, 1]], ValueError, "the table has 2 columns and the model's has 4"),
    "twice": (lambda: pd.concat([TABLE, TABLE]), ValueError, "must have one row for each gene"),
    "not finite": (lambda: TABLE.where(TABLE < 0), ValueError, "without missing values"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_tables_that_do_not_fit(described, what):
    table, error, message = BAD_TABLES[what]
    with pytest.raises(error, match=message):
        described.with_genes(["B", "E"], table())
    if what != "columns":
        with pytest.raises(error, match=message):
            C3Diff(["B", "E"], gene_embedding=table(), **SMALL)


def test_other_genes_need_a_table_and_a_fit():
    model = c3diff()
    model.record = {"sections": ["one"]}
    with pytest.raises(ValueError, match="knows no others; construct it with gene_embedding=<table of all genes>"):
        model.with_genes(["D"], TABLE)
    with pytest.raises(ValueError, match=r"has not been fitted; call stgen\.tl\.fit"):
        c3diff(gene_embedding=TABLE).with_genes(["D"], TABLE)
    with pytest.raises(ValueError, match="without repetition"):
        c3diff(["A", "B", "A"])


def test_saved_and_restored_model_gives_the_same_samples(described, data, tmp_path):
    restored = models.load(described.save(tmp_path))
    assert type(restored) is C3Diff
    assert restored.config == described.config
    assert restored.weights_sha256() == described.weights_sha256()
    assert (restored.align, restored.halo, restored.needs_low_res) == (described.align, described.halo, False)
    draws = [m.sample(batch_of(data, 2), 2, 3, torch.Generator().manual_seed(1)) for m in (described, restored)]
    assert torch.equal(*draws)
    assert torch.equal(restored.with_genes(["D"], TABLE).codes(), described.with_genes(["D"], TABLE).codes())


@pytest.mark.parametrize("options", [{}, {"preset": "paper", "bin_um": 160.0}, {"gene_embedding": TABLE}])
def test_configuration_makes_the_same_model(options):
    model = c3diff(guidance=1.5, **options)
    again = C3Diff(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert again.guidance == 1.5
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


# ---- how it starts ----------------------------------------------------------------------------------------------------


def test_untrained_output_is_exactly_zero():
    model = c3diff(random=False)
    cond = model.condition(inputs(model))
    assert (cond["mean"] == 0).all()
    assert (model.denoise(torch.randn(2, 3, 8, 8), torch.tensor([0, 500]), cond) == 0).all()
    assert model.log_tau.exp().item() == pytest.approx(TAU)


def test_control_adds_nothing_at_first():
    """As in ControlNet: the denoiser begins without the control branch, and learns to use it."""
    model = c3diff(random=False)
    randomized(model.unet)
    one, two = (model.condition(inputs(model, seed=seed)) for seed in (0, 1))
    swapped = {**one, **{name: value for name, value in two.items() if name.startswith("control")}}
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([50, 500])
    assert torch.equal(model.denoise(x_t, t, one), model.denoise(x_t, t, swapped))
    model.denoise(x_t, t, one).square().sum().backward()
    assert all(inject.weight.weight.grad.abs().max() > 0 for inject in model.inject)


# ---- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
def test_each_term_is_what_it_says(data, residual):
    model = c3diff(prediction="x_0", genes_per_tile=2, residual=residual)
    batch = batch_of(data, 0, 7)
    assert (batch["tissue"] == 0).any()
    cond = model.condition(batch)
    torch.manual_seed(1)
    losses = model.loss(batch)
    torch.manual_seed(1)
    genes = torch.rand(2, 3).argsort(1)[:, :2]
    t = torch.randint(model.diffusion.timesteps, (2,))
    x_0 = model.to_network(batch["x"], cond)[torch.arange(2)[:, None], genes]
    x_t = model.diffusion.add_noise(x_0, torch.randn_like(x_0), t)
    errors = []
    for b in range(2):  # tile by tile, gene by gene
        for k, gene in enumerate(genes[b]):
            one = {name: value[b : b + 1] for name, value in batch.items()} | {"gene": gene.reshape(1, 1)}
            errors.append(model.denoise(x_t[b, k][None, None], t[b : b + 1], model.condition(one)) - x_0[b, k])
    errors = torch.cat(errors).unflatten(0, (2, 2))[:, :, 0]
    torch.testing.assert_close(losses["mse"], weighted_mean(errors.square(), batch["tissue"]).detach())
    expected = losses["mse"]
    if residual:
        error = (batch["x"] / cond["scale"] - cond["mean"]) * batch["tissue"]
        torch.testing.assert_close(losses["mean"], error.square().sum() / (3 * batch["tissue"].sum()))
        expected = expected + losses["mean"]
    torch.testing.assert_close(losses["loss"], expected)
    assert set(losses) == {"loss", "mse"} | ({"mean"} if residual else set())


@pytest.mark.parametrize("left_out", CONTRASTIVE)
def test_loss_of_weight_zero_is_left_out(data, left_out):
    model = c3diff(**{f"{left_out}_weight": 0.0}).train()
    losses = model.loss(batch_of(data, 0, 7))
    assert set(losses) == {"loss", "mse", "mean", *CONTRASTIVE} - {left_out}


def test_contrastive_losses_are_of_the_embeddings(data):
    model = c3diff(augmentation=False, p_missing=0.0).train()
    batch, present = batch_of(data, 0, 7, 12), torch.ones(3, dtype=torch.bool)
    losses, z = model.loss(batch), model.encode(batch, present).embeddings
    for name, written_out in WRITTEN_OUT.items():
        torch.testing.assert_close(losses[name], written_out(z, [0, 1, 2], model.log_tau.exp()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_condition_is_dropped_from_some_tiles_in_training(data, p, monkeypatch):
    model, kept, denoise = c3diff(p_unconditional=p), [], C3Diff._predict
    monkeypatch.setattr(C3Diff, "_predict", lambda m, x, t, cond: kept.append(cond["kept"]) or denoise(m, x, t, cond))
    batch = batch_of(data, *range(20))
    model.train().loss(batch)
    assert float(kept[0].mean()) == pytest.approx(1 - p, abs=0.3 * (p > 0))
    assert p == 0 or 0 < kept[0].mean() < 1
    model.eval().loss(batch)
    assert (kept[1] == 1).all()


@pytest.mark.parametrize(("per_tile", "n"), [(1, 1), (2, 2), (8, 3)])
def test_genes_are_drawn_for_every_tile(data, per_tile, n, monkeypatch):
    model, genes, denoise = c3diff(genes_per_tile=per_tile), [], C3Diff._predict
    monkeypatch.setattr(C3Diff, "_predict", lambda m, x, t, cond: genes.append(cond["gene"]) or denoise(m, x, t, cond))
    model.train().loss(batch_of(data, *range(20)))
    assert genes[0].shape == (20, n)
    assert all(len(set(row)) == n for row in genes[0].tolist())
    assert set(genes[0].flatten().tolist()) == {0, 1, 2}


# ---- training ---------------------------------------------------------------------------------------------------------


def test_few_steps_lower_the_loss():
    model, measured = c3diff(random=False), (True, False)
    data, validation = map_data(measured=measured, stride=8), map_data(measured=measured, side=16, stride=8)
    history = model.fit(data, validation, steps=12, evaluate_every=4, lr=1e-2, ema_decay=0.5, **QUICK)
    for name in ("validation", "mean", "mse"):
        assert history[name][-1] < 0.95 * history[name][0]


def test_same_seed_same_model():
    data, hashes = map_data(measured=(True, False), side=16), []
    for seed in (3, 3, 4):
        model = c3diff(random=seed == 4)
        model.fit(data, steps=1, **{**QUICK, "seed": seed})
        hashes.append(model.weights_sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_tiles_without_any_map_are_refused():
    model = c3diff()
    before = model.weights_sha256()
    with pytest.raises(ValueError, match="no training section has a low-resolution map, which C3-Diff learns from"):
        model.fit(map_data(measured=(False, False), side=16), steps=1, **QUICK)
    assert model.weights_sha256() == before


@pytest.mark.parametrize(
    ("batch_size", "options", "n"),
    [(2, {}, 1), (8, {}, 0), (2, dict.fromkeys([f"{name}_weight" for name in CONTRASTIVE], 0.0), 0)],
)
def test_few_negatives_are_warned_about_once(batch_size, options, n, caplog):
    with caplog.at_level(logging.WARNING, "stgen"):
        c3diff(random=False, **options).fit(map_data(side=16), steps=1, **{**QUICK, "batch_size": batch_size})
    warnings = [r.getMessage() for r in caplog.records if "few negatives" in r.getMessage()]
    assert len(warnings) == n
    assert all("batches of 2 tiles" in message and "batch_size=8 or more" in message for message in warnings)


def test_imputation_fades_while_training(data, monkeypatch):
    strengths, imputed = [], C3Diff._imputed
    monkeypatch.setattr(
        C3Diff,
        "_imputed",
        lambda m, f, z, present, s: strengths.append((m.training, s)) or imputed(m, f, z, present, s),
    )
    c3diff(random=False).fit(data, map_data(side=8), steps=4, evaluate_every=2, **QUICK)
    assert [s for training, s in strengths if training] == [1, 1, 0.5, 0.5, 0, 0, 0, 0]
    assert {s for training, s in strengths if not training} == {0}


# ---- windows ----------------------------------------------------------------------------------------------------------


def test_windows_must_be_aligned():
    model = c3diff()
    wrong = inputs(model, side=model.align + 2)
    for call in (model.condition, lambda batch: model.loss({**batch, "x": batch["y"]}), model.sample):
        with pytest.raises(ValueError, match="windows whose sides are multiples of 4 bins, found 6 x 6"):
            call({**wrong, "tissue": wrong["valid"]})


@pytest.mark.parametrize(
    ("options", "align"),
    [
        ({"px_per_bin": 1, "patch": 1}, 2),
        ({"widths": [8] * 3, "control_widths": [8] * 3}, 8),
        ({"patch": 4}, 8),
        ({"patch": 3}, 6),
    ],
)
def test_aligned_windows_are_taken(options, align):
    model = c3diff(**options)
    assert (model.align, model.halo % align, model.tile % align, align % model.stride) == (align, 0, 0, 0)
    batch, px = inputs(model, batch_size=1), model.config["px_per_bin"]
    for height, width in ((align, align), (align, 2 * align)):
        part = {
            k: v[..., : height * (px if k == "h" else 1), : width * (px if k == "h" else 1)] for k, v in batch.items()
        }
        assert model.sample(part, 1, 1).shape == (1, 1, 3, height, width)


def test_window_is_the_part_of_a_larger_one():
    """Beyond what the convolutions see from its borders, if it begins at a multiple of ``align``."""
    model = c3diff(["A"], patch=1, px_per_bin=1)
    side, far, start = 104, 44, 6
    batch, x_t, t = inputs(model, batch_size=1, side=side), torch.randn(1, 1, side, side), torch.tensor([300])
    results = {}
    for y, x in ((0, 0), (start, 4), (start + 1, 4)):
        window = np.s_[..., y : y + 96, x : x + 96]
        cond = model.condition({name: value[window] for name, value in batch.items()})
        inside = np.s_[..., far + start - y : far + start - y + 6, far + start - x : far + start - x + 6]
        results[y] = cond["mean"][inside], model.denoise(x_t[window], t, cond)[inside]
    torch.testing.assert_close(results[0], results[start], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][1], results[start + 1][1], atol=1e-3)  # windows must be aligned


# ---- presets ----------------------------------------------------------------------------------------------------------


def paper(genes=("g0", "g1"), **options):
    with torch.device("meta"):
        return C3Diff(list(genes), preset="paper", **options).eval()


def test_paper_preset_has_the_sizes_of_the_released_code():
    model, sizes = paper([f"g{i}" for i in range(200)]), [224, 448, 672, 896]
    assert sum(p.numel() for p in model.parameters()) == 243_878_535
    for network, time in ((model.unet, 896), (model.control, None)):
        assert network.enter.out_channels == 224
        assert [level[0].conv_out.out_channels for level in network.down] == sizes
        for number, level in enumerate([*network.down, network.middle]):
            kinds = [type(layer).__name__ for layer in level]
            assert kinds == ["ResBlock"] * 2 + ["PixelAttention"] * (number > 0)
            assert all((block.time and block.time.in_features) == time for block in level[:2])
    assert [inject.weight.weight.shape for inject in model.inject] == [(n, n) for n in sizes]
    assert model.codes.embedding.weight.shape == (200, 224)
    for name in SPHERES:
        assert getattr(model, name)[1].conv_out.out_channels == 55
        assert model.to_sphere[name][2].out_features == 128
    assert (model.config["scale"], model.config["residual"], model.config["genes_per_tile"]) == ("map", False, 1)
    diffusion = model.diffusion
    assert (diffusion.prediction, diffusion.timesteps, diffusion.schedule) == ("epsilon", 1000, "scaled_linear")
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(diffusion.betas, expected, rtol=1e-4, atol=1e-7)
    assert model.config["sigma"] == 0.03
    assert [model.config[f"{name}_weight"] for name in CONTRASTIVE] == [0.05, 0.05, 0.03]


@pytest.mark.parametrize(("options", "side", "px"), [({}, 256, 1), ({"factor": 5, "bin_um": 20.0}, 128, 2)])
def test_paper_preset_takes_its_tiles_and_no_others(options, side, px):
    model = paper(**options)
    assert (model.align, model.tile, model.halo, model.config["px_per_bin"]) == (side, side, 0, px)
    assert model.fixed_tile
    with torch.device("meta"):
        batch = {
            "h": torch.zeros(1, 3, side * px, side * px), "y": torch.zeros(1, 2, side, side),
            "valid": torch.zeros(1, 1, side, side), "gene": torch.zeros(1, 1, dtype=torch.long),
        }  # fmt: skip
        cond = model.condition(batch)
        output = model.denoise(torch.zeros(1, 1, side, side), torch.zeros(1, dtype=torch.long), cond)
    shapes = {name: tuple(value.shape) for name, value in cond.items()}
    levels = {f"control_{i}": (1, n, side // 4 >> i, side // 4 >> i) for i, n in enumerate([224, 448, 672, 896])}
    assert shapes == {"gene": (1, 1), "y": (1, 1, side, side), "scale": (1, 1, 1, 1), "kept": (1,), **levels}
    assert output.shape == (1, 1, side, side)
    for wrong in (side // 2, 2 * side):
        with pytest.raises(ValueError, match=rf"tiles of {side} x {side} bins and no others, found {wrong} x {wrong}"):
            model.check_window(wrong, wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_say_how_to_train(preset, monkeypatch):
    options = {}
    monkeypatch.setattr(stgen.train, "fit", lambda *args, **kwargs: options.update(kwargs) or {})
    c3diff(preset=preset, bin_um=160.0).fit(map_data(tile=16, stride=8), steps=7)
    assert options == {**PRESETS[preset].training, "steps": 7}
    assert options["batch_size"] >= 8


def test_arguments_override_the_preset():
    model = c3diff(preset="paper", bin_um=160.0, residual=True, scale="std", blocks=1, attention=[])
    assert "mean" in model.condition(inputs(model, side=model.align))
    assert (model.config["scale"], model.config["widths"], model.config["blocks"]) == ("std", [8, 8], 1)
    assert model.config["prediction"] == "epsilon"


BAD = {
    "preset": ({"preset": "large"}, "`preset` must be one of 'default', 'paper', found 'large'"),
    "imputation": ({"imputation": "median"}, "`imputation` must be one of 'similarity', 'mean', 'zero', 'drop', found"),
    "p_missing": ({"p_missing": 1.0}, r"`p_missing` must be a share in \[0, 1\), found 1.0"),
    "p_unconditional": ({"p_unconditional": -0.1}, r"`p_unconditional` must be a share in \[0, 1\), found -0.1"),
    "widths": ({"widths": [8]}, r"`widths` and `control_widths` must be of the same length, found \[8\] and \[8, 8\]"),
    "control_patch": ({"control_patch": 3}, "`patch` must be a multiple of `control_patch`, found 2 and 3"),
    "scale": ({"scale": "mean"}, "`scale` must be one of"),
    "prediction": ({"prediction": "noise"}, "`prediction` must be one of"),
    "genes": ({"genes": []}, "at least one gene"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    options, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        c3diff(**options)


# ---- any genes, any image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_genes", [1, 300])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_any_number_of_genes(n_genes, preset):
    model = c3diff([f"g{i}" for i in range(n_genes)], preset=preset, bin_um=160.0)
    batch = inputs(model, batch_size=1, side=model.align)
    assert model.sample(batch, 2, 1).shape == (1, 2, n_genes, model.align, model.align)
    losses = model.train().loss({**batch, "x": batch["y"], "tissue": batch["valid"]})
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize(("channels", "px"), [(1, 2), (4, 3), (16, 1)])
def test_any_image(channels, px):
    model = c3diff(image_channels=channels, px_per_bin=px)
    batch = inputs(model)
    assert model.sample(batch, 1, 1).shape == (2, 1, 3, 8, 8)
    one, two = (model.condition({**batch, "h": h}) for h in (batch["h"], batch["h"].flip(-1)))
    assert not torch.allclose(one["mean"], two["mean"], atol=1e-2)


@pytest.mark.parametrize("what", ["h", "y", "valid", "x_t", "t", "gene"])
def test_every_input_matters(what):
    model = c3diff()
    batch, t = inputs(model), torch.tensor([100, 200])
    batch["gene"] = torch.tensor([[0], [1]])
    x_t = torch.randn(2, 1, 8, 8)
    before = model.denoise(x_t, t, model.condition(batch))
    changes = {"h": lambda v: v.flip(2), "y": lambda v: v.flip(2), "valid": lambda v: v * 0.5, "gene": lambda v: v + 1}
    batch = {name: changes[name](value) if name == what else value for name, value in batch.items()}
    after = model.denoise(x_t.flip(2) if what == "x_t" else x_t, t + 300 * (what == "t"), model.condition(batch))
    assert ((after - before).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("scale", ["std", "quantile", "map"])
@pytest.mark.parametrize("residual", [True, False])
def test_network_scale_and_back(data, scale, residual):
    model = c3diff(scale=scale, residual=residual)
    model.gene_scale.fit(data)
    batch = {**batch_of(data, 0, 8), "gene": torch.tensor([[0, 2], [2, 1]])}
    cond = model.condition(batch)
    rows = torch.arange(2)[:, None]
    x = batch["x"][rows, batch["gene"]]
    z = model.to_network(x, cond)
    torch.testing.assert_close(model.from_network(z, cond), x, rtol=1e-4, atol=1e-4)
    assert ("mean" in cond) == residual
    expected = model.gene_scale.scale.expand(2, -1)
    if scale == "map":
        expected = batch["y"].amax((2, 3)) - batch["y"].amin((2, 3))
    torch.testing.assert_close(cond["scale"][:, :, 0, 0], expected[rows, batch["gene"]])
    if not residual:
        torch.testing.assert_close(z, x / cond["scale"])


def test_items_do_not_see_each_other(data):
    model = c3diff()

    def draw(*rows):
        return model.sample(batch_of(data, *rows), 2, 3, [torch.Generator().manual_seed(i) for i in rows])

    torch.testing.assert_close(draw(3), draw(0, 3, 5)[1:2], rtol=1e-3, atol=1e-3)
