from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

from stgen import models
from stgen.data import SpotData, group_folds
from stgen.models import LinearProbe, Retrieval, Stem, TrainingMean
from stgen.models._layers import Standardize, timestep_embedding

GENES = ["A", "B", "C", "D"]
SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "image_hidden": 8, "genes_per_token": 1}


def stem(genes=GENES, *, seed=0, random=True, **options):
    """A small Stem without a probe, its weights at random instead of at their start, where the output is zero."""
    options = {"embedding_dim": 5, "transform": "none", "mean": "none", "image_dropout": 0.0, **SMALL, **options}
    torch.manual_seed(seed)
    model = Stem(genes, **options).eval()
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, len(model.genes), generator=generator)
    h = torch.randn(n, 5, generator=generator)
    return x_t, torch.arange(n) * 100, model.condition({"h": h})


def fitted(name, spots):
    """One small fitted model of each kind."""
    torch.manual_seed(0)
    common = {"embedding_dim": 5, "transform": "log1p_raw"}
    model = {
        "TrainingMean": lambda: TrainingMean(GENES, **common),
        "LinearProbe": lambda: LinearProbe(GENES, **common),
        "Retrieval": lambda: Retrieval(GENES, k=3, **common),
        "Stem": lambda: Stem(GENES, mean="none", **common, **SMALL),
        "Stem with probe": lambda: Stem(GENES, mean="probe", learned_variance=True, **{**common, **SMALL}),
    }[name]()
    options = {"steps": 3, "batch_size": 8, "progress": False} if isinstance(model, Stem) else {}
    model.fit(spots, **options)
    model.record = {"sections": ["one"], "embedding": {"n_features": 5}}
    return model


KINDS = ["TrainingMean", "LinearProbe", "Retrieval", "Stem", "Stem with probe"]


# ---- Stem: its size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_genes", "expected"), [(200, 35_639_042), (300, 35_677_442), (1000, 35_946_242)])
def test_paper_preset_has_the_published_number_of_parameters(n_genes, expected):
    with torch.device("meta"):
        model = Stem([f"g{i}" for i in range(n_genes)], preset="paper", learned_variance=True, embedding_dim=1536)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_paper_preset_is_the_paper():
    with torch.device("meta"):
        model = Stem(GENES, preset="paper")
    assert model.config["transform"] == "log2p1_raw"
    assert model.diffusion.prediction == "epsilon"
    assert (model.diffusion.schedule, model.diffusion.timesteps) == ("linear", 1000)
    assert model.probe is None
    assert not model.config["learned_variance"]
    fixed = sum(p.numel() for p in model.parameters())
    assert 35_639_042 - (200 - 4) * 384 - fixed == 384 + 1  # the second output channel


def test_arguments_override_the_preset():
    assert stem(width=32).config["width"] == 32
    assert stem(width=32).config["heads"] == 2
    with pytest.raises(ValueError, match="must be one of 'small', 'paper', found 'large'"):
        Stem(GENES, preset="large")


# ---- Stem: the transformer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"mean": "probe"}, {"genes_per_token": 3}])
def test_untrained_output_is_exactly_zero(options):
    model = stem(random=False, **options)
    output = model.denoise(*inputs(model))
    assert output.shape == ((6, 2, 4) if options.get("learned_variance") else (6, 4))
    assert (output == 0).all()


def test_untrained_blocks_are_the_identity():
    model = stem(random=False)
    tokens, c = torch.randn(3, 4, 16), torch.randn(3, 16)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)


def test_initial_weights_are_those_of_the_paper():
    model = stem(random=False, width=64, image_hidden=256)
    for layer in (model.time[0], model.time[2], model.image[2]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()
    assert float(model.gene_type.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.05)  # Kaiming
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier
    assert float(model.blocks[0].qkv.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_block_written_out(activation):
    """Layer norm, modulation, attention head by head, gate; then the same with the MLP. Peebles & Xie (2023), Figure 3."""
    block = stem(activation=activation).blocks[0]
    tokens, c = torch.randn(3, 4, 16), torch.randn(3, 16)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(c * c.sigmoid())[:, None].split(16, -1)

    def modulated(x, shift, scale):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale) + shift

    q, k, v = block.qkv(modulated(tokens, shift_a, scale_a)).split(16, -1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        attention = (q[..., head] @ k[..., head].mT / 8**0.5).softmax(-1)
        heads.append(attention @ v[..., head])
    x = tokens + gate_a * block.out(torch.cat(heads, -1))
    hidden = block.mlp[0](modulated(x, shift_m, scale_m))
    if activation == "gelu":
        hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = hidden * hidden.sigmoid()
    torch.testing.assert_close(block(tokens, c), x + gate_m * block.mlp[2](hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("mean", ["none", "probe"])
def test_genes_are_a_set(learned_variance, mean):
    """One gene a token: genes in another order, with their embeddings, give the same answer in that order."""
    model = stem(learned_variance=learned_variance, mean=mean)
    x_t, t, cond = inputs(model)
    if mean == "probe":
        cond["mean"] = torch.randn(6, 4)
    expected = model.denoise(x_t, t, cond)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        model.gene_type.copy_(model.gene_type[order])
    if mean == "probe":
        cond["mean"] = cond["mean"][:, order]
    torch.testing.assert_close(model.denoise(x_t[:, order], t, cond), expected[..., order], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, expected[..., order], atol=1e-2)


@pytest.mark.parametrize("genes_per_token", [1, 3])
def test_items_do_not_see_each_other(genes_per_token):
    model = stem(genes_per_token=genes_per_token)
    x_t, t, cond = inputs(model)
    together = model.denoise(x_t, t, cond)
    for i in range(6):
        alone = model.denoise(x_t[i : i + 1], t[i : i + 1], {"h": cond["h"][i : i + 1]})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["x_t", "t", "h", "gene"])
def test_every_input_matters(what):
    model = stem()
    x_t, t, cond = inputs(model)
    before = model.denoise(x_t, t, cond)
    if what == "gene":
        with torch.no_grad():
            model.gene_type[1] = torch.linspace(-1, 1, 16)
    after = model.denoise(
        x_t + (what == "x_t"), t + 300 * (what == "t"), {"h": cond["h"] + (what == "h")} if what == "h" else cond
    )
    assert ((after - before).abs() > 1e-3).any(1).all()


def test_genes_that_do_not_fill_the_last_token():
    """Five genes at three a token are six of which the last is zero and not reported."""
    five, six = (stem([f"g{i}" for i in range(n)], genes_per_token=3) for n in (5, 6))
    six.load_state_dict({**five.state_dict(), **{k: v for k, v in six.state_dict().items() if k.startswith("scale.")}})
    assert len(five.gene_type) == 2
    x_t, t, cond = inputs(five)
    padded = torch.nn.functional.pad(x_t, (0, 1))
    assert five.denoise(x_t, t, cond).shape == (6, 5)
    torch.testing.assert_close(five.denoise(x_t, t, cond), six.denoise(padded, t, cond)[:, :5])


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([0, 7]), 256)
    assert embedding.shape == (2, 256)
    assert torch.equal(embedding[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    torch.testing.assert_close(embedding[1, [0, 128]], torch.tensor([np.cos(7), np.sin(7)], dtype=torch.float32))
    torch.testing.assert_close(embedding[1, 128 + 64], torch.tensor(np.sin(7 / 100), dtype=torch.float32))


# ---- Stem: scales, residuals, samples -------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["none", "probe"])
@pytest.mark.parametrize("standardize", [True, False])
def test_network_scale_and_back(spots, mean, standardize):
    model = stem(mean=mean, standardize=standardize)
    model.fit(spots, steps=1, batch_size=8, progress=False)
    cond = model.condition({"h": spots.h[:, 0]})
    z = model.to_network(spots.x, cond)
    torch.testing.assert_close(model.from_network(z, cond), spots.x, rtol=1e-4, atol=1e-4)
    if mean == "none" and standardize:
        torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    if mean == "none" and not standardize:
        assert torch.equal(z, spots.x)


def test_residuals_are_those_of_unseen_locations(spots):
    """The scale of the residual is that of the cross-fitted probe, and its offset is left in."""
    model = stem(mean="probe")
    model.fit(spots, steps=1, batch_size=8, progress=False)
    probe = LinearProbe(GENES, embedding_dim=5)
    residual = spots.x - probe.cross_fit(spots)
    torch.testing.assert_close(model.scale.scale, residual.std(0, correction=0))
    assert (model.scale.mean == 0).all()
    assert float(residual.std()) > float((spots.x - probe.predict(spots.h[:, 0])).std())
    with_mean = SpotData(spots.x, spots.h, mean=spots.x + 2)
    batch = torch.utils.data.default_collate([with_mean[i] for i in range(4)])
    assert torch.equal(model.condition(batch)["mean"], spots.x[:4] + 2)  # the batch's own, where it has one
    torch.testing.assert_close(model.condition({"h": batch["h"]})["mean"], probe.predict(batch["h"]))


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm"])
def test_same_seed_same_sample_whatever_the_batch(solver):
    model = stem()
    h = torch.randn(7, 5)

    def draw(rows):
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return model.sample({"h": h[rows]}, 3, 5, generators, solver)

    together = draw(list(range(7)))
    assert together.shape == (7, 3, 4)
    for rows in ([0], [4, 5], [6, 2, 1]):
        torch.testing.assert_close(draw(rows), together[rows], rtol=1e-3, atol=1e-3)
    assert torch.equal(draw([3]), draw([3]))
    assert not torch.allclose(together[0, 0], together[0, 1])


def test_one_generator_for_all():
    model = stem()
    batch = {"h": torch.randn(1, 5).expand(3, -1)}
    one, two = (model.sample(batch, 2, 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.allclose(one[0], one[1])
    assert not torch.equal(one, model.sample(batch, 2, 3, torch.Generator().manual_seed(2)))


def test_expression_in_the_batch_is_not_looked_at():
    model = stem()
    h = torch.randn(2, 5)
    draws = [
        model.sample(batch, 2, None, [torch.Generator().manual_seed(i) for i in range(2)])
        for batch in ({"h": h}, {"h": h, "x": torch.full((2, 4), torch.nan)})
    ]
    assert torch.equal(*draws)


def test_sampling_an_untrained_probe_model_gives_the_probe(spots):
    """With a network that says x_0 = 0 the residual is zero: what is left is the mean model."""
    model = stem(mean="probe", prediction="x_0", random=False)
    model.probe.fit(spots)
    drawn = model.sample({"h": spots.h[:5, 0]}, 2, 3)
    torch.testing.assert_close(drawn, model.probe.predict(spots.h[:5, 0])[:, None].expand(-1, 2, -1))


# ---- baselines ------------------------------------------------------------------------------------------------------


def test_training_mean(spots):
    model = TrainingMean(GENES, embedding_dim=5)
    model.fit(spots.subset(np.arange(40)), spots.subset(np.arange(40, 72)))
    torch.testing.assert_close(model.sample({"h": spots.h[:3, 0]}, 2), spots.x.mean(0).expand(3, 2, 4))


@pytest.mark.parametrize("penalty", [1e-3, 0.3, 20.0])
def test_probe_is_the_ridge_regression_of_sklearn(spots, penalty):
    probe = LinearProbe(GENES, embedding_dim=5, penalties=[penalty], clamp=100)
    probe.fit(spots)
    h = spots.h[:, 0].numpy()
    z = (h - h.mean(0)) / h.std(0)
    expected = Ridge(alpha=penalty * len(h)).fit(z, spots.x.numpy())
    np.testing.assert_allclose(probe.predict(spots.h[:, 0]), expected.predict(z), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probe.weight.T, expected.coef_, rtol=1e-4, atol=1e-5)
    assert float(probe.penalty) == pytest.approx(penalty)


def test_probe_recovers_a_linear_map():
    rng = np.random.default_rng(0)
    h, a = rng.normal(size=(200, 5)), rng.normal(size=(5, 4))
    probe = LinearProbe(GENES, embedding_dim=5, clamp=100, penalties=[1e-8, 1.0])
    probe.fit(SpotData(h @ a + 3, h))
    new = rng.normal(size=(20, 5))
    np.testing.assert_allclose(probe.predict(torch.tensor(new, dtype=torch.float32)), new @ a + 3, atol=1e-3)
    assert float(probe.penalty) == pytest.approx(1e-8)


def test_probe_gives_up_on_noise():
    """With nothing to learn the largest penalty wins, and the prediction is nearly the mean."""
    rng = np.random.default_rng(0)
    data = SpotData(rng.normal(size=(60, 4)), rng.normal(size=(60, 30)), np.arange(60) // 10)
    probe = LinearProbe(GENES, embedding_dim=30)
    probe.fit(data)
    assert float(probe.penalty) >= 10
    assert float(probe.predict(data.h[:, 0]).std(0).max()) < 0.1


def test_more_features_than_locations():
    rng = np.random.default_rng(0)
    data = SpotData(rng.normal(size=(20, 4)), rng.normal(size=(20, 50)), np.arange(20) // 4)
    probe = LinearProbe(GENES, embedding_dim=50)
    probe.fit(data)
    assert torch.isfinite(probe.predict(data.h[:, 0])).all()


def test_cross_fit_never_saw_the_row(spots):
    """Other values in one group change what is predicted for the other groups and not for this one."""
    probe = LinearProbe(GENES, embedding_dim=5, penalties=[0.1])
    before = probe.cross_fit(spots)
    group = spots.group == 2
    changed = spots.x.clone()
    changed[group] += torch.randn(int(group.sum()), 4) * 10
    after = LinearProbe(GENES, embedding_dim=5, penalties=[0.1]).cross_fit(SpotData(changed, spots.h, spots.group))
    own_fold = group_folds(spots.group) == group_folds(spots.group)[group][0]
    assert torch.equal(before[own_fold], after[own_fold])
    assert not np.isclose(before[~own_fold], after[~own_fold]).any(1).all()
    features = spots.h.clone()
    features[group] *= 5
    moved = LinearProbe(GENES, embedding_dim=5, penalties=[0.1]).cross_fit(SpotData(spots.x, features, spots.group))
    others = own_fold & ~group  # same fold: their predictor has seen neither
    assert torch.equal(before[others], moved[others])


def test_cross_fit_by_hand(spots):
    """Each fold is predicted by a probe fitted on the others."""
    predicted = LinearProbe(GENES, embedding_dim=5, penalties=[0.1]).cross_fit(spots)
    folds = group_folds(spots.group)
    for fold in np.unique(folds):
        probe = LinearProbe(GENES, embedding_dim=5, penalties=[0.1])
        probe.fit(spots.subset(folds != fold))
        inside = folds == fold
        torch.testing.assert_close(predicted[inside], probe.predict(spots.h[inside, 0]), rtol=1e-4, atol=1e-4)


def test_penalty_looks_at_differences_within_folds():
    """Sections stained otherwise: their offsets would ask for another penalty than the differences inside them."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(5), 20)
    h = rng.normal(size=(100, 5))
    x = h @ rng.normal(size=(5, 4)) + 0.5 * rng.normal(size=(100, 4))
    data = SpotData(x, h + 3 * rng.normal(size=(5, 5))[group], group)
    penalties = np.logspace(-4, 2, 13)
    within, raw = [], []
    for penalty in penalties:
        held_out = LinearProbe(GENES, embedding_dim=5, penalties=[penalty]).cross_fit(data)
        error = (held_out - data.x).numpy().reshape(5, 20, 4)
        raw.append(np.square(error).sum())
        within.append(np.square(error - error.mean(1, keepdims=True)).sum())
    probe = LinearProbe(GENES, embedding_dim=5, penalties=penalties.tolist())
    probe.fit(data)
    assert float(probe.penalty) == pytest.approx(penalties[np.argmin(within)])
    assert np.argmin(within) != np.argmin(raw)


def test_one_neighbor_is_the_row_itself(spots):
    model = Retrieval(GENES, embedding_dim=5, k=1)
    model.fit(spots)
    torch.testing.assert_close(model.sample({"h": spots.h[:, 0]})[:, 0], spots.x)


def test_retrieval_is_that_of_sklearn(spots):
    from sklearn.neighbors import KNeighborsRegressor

    train, new = spots.subset(np.arange(50)), spots.subset(np.arange(50, 72))
    model = Retrieval(GENES, embedding_dim=5, k=4, clamp=100)
    model.fit(train)
    h = train.h[:, 0].numpy()
    z, z_new = ((a - h.mean(0)) / h.std(0) for a in (h, new.h[:, 0].numpy()))
    expected = KNeighborsRegressor(4).fit(z, train.x.numpy()).predict(z_new)
    np.testing.assert_allclose(model.predict(new.h[:, 0]), expected, rtol=1e-4, atol=1e-5)


def test_more_neighbors_than_rows_is_the_mean(spots):
    model = Retrieval(GENES, embedding_dim=5, k=500)
    model.fit(spots)
    torch.testing.assert_close(model.predict(spots.h[:2, 0]), spots.x.mean(0).expand(2, 4))


@pytest.mark.parametrize("cls", [TrainingMean, LinearProbe, Retrieval])
def test_point_models(spots, cls, untouched_rng):
    model = cls(GENES, embedding_dim=5)
    assert model.fit(spots) == {}
    assert not model.stochastic
    assert models.Stem.stochastic
    drawn = model.sample({"h": spots.h[:6, 0]}, 3)
    assert drawn.shape == (6, 3, 4)
    assert torch.equal(drawn[:, 0], drawn[:, 2])


def test_standardize():
    x = torch.tensor([[1.0, 5.0, 0.1], [3.0, 5.0, 0.1], [8.0, 5.0, 0.1]])
    standardize = Standardize(3, clamp=1.2).fit(x)
    z = standardize(x)
    assert float(z.max()) == pytest.approx(1.2)
    torch.testing.assert_close(z[:, 1:], torch.zeros(3, 2), atol=1e-6, rtol=0)  # constant features stay finite
    torch.testing.assert_close(standardize.inverse(z)[:2], x[:2])


# ---- what all models share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_loaded_bit_for_bit(spots, name, tmp_path):
    model = fitted(name, spots)
    folder = model.save(tmp_path / "deep" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    restored = models.load(folder)
    assert type(restored) is type(model)
    assert not restored.training
    assert restored.fitted
    assert restored.config == json.loads(json.dumps(model.config))
    assert restored.record == model.record
    assert (restored.genes, restored.transform) == (GENES, "log1p_raw")
    assert restored.weights_sha256() == model.weights_sha256()
    for key, value in model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key]), key
    batch = {"h": spots.h[:6, 0]}
    draws = [
        m.eval().sample(batch, 2, 4, [torch.Generator().manual_seed(i) for i in range(6)]) for m in (model, restored)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("name", KINDS)
def test_configuration_is_plain_json(spots, name, tmp_path):
    content = json.loads(
        (fitted(name, spots).save(tmp_path) / "config.json").read_text(),
        parse_constant=lambda value: pytest.fail(f"{value} is no JSON"),
    )
    assert set(content) == {"class", "config", "record"}
    assert content["class"] == name.split()[0]
    assert content["config"]["genes"] == GENES


def test_nothing_is_pickled(spots, tmp_path, monkeypatch):
    import pickle

    model = fitted("Stem with probe", spots)
    for function in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("pickle was used"))
    models.load(model.save(tmp_path))


def test_another_fit_is_another_hash(spots):
    model = fitted("LinearProbe", spots)
    before = model.weights_sha256()
    model.fit(spots.subset(np.arange(60)))
    assert model.weights_sha256() != before


def test_only_fitted_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="this Stem has not been fitted; call stgen.tl.fit"):
        stem().save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("load", [models.load, TrainingMean.load])
def test_incomplete_folder(spots, tmp_path, missing, load):
    (fitted("TrainingMean", spots).save(tmp_path) / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"not a complete model folder: {missing} missing"):
        load(tmp_path)


def test_folder_of_another_class(spots, tmp_path):
    fitted("TrainingMean", spots).save(tmp_path)
    with pytest.raises(ValueError, match="holds a TrainingMean, not a Stem; stgen.models.load"):
        Stem.load(tmp_path)


@pytest.mark.parametrize("name", ["DiffSTX", "Model", "DiffusionModel", "load"])
def test_unknown_class(spots, tmp_path, name):
    file = fitted("TrainingMean", spots).save(tmp_path) / "config.json"
    file.write_text(file.read_text().replace("TrainingMean", name))
    with pytest.raises(ValueError, match=rf"holds a '{name}', which this version of stgen does not know"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["LinearProbe", "Retrieval", "Stem"])
@pytest.mark.parametrize("how", ["lacking", "extra", "shape", "no safetensors"])
def test_tampered_weights(spots, tmp_path, name, how):
    file = fitted(name, spots).save(tmp_path) / "model.safetensors"
    weights = load_file(file)
    key = {"LinearProbe": "weight", "Retrieval": "reference", "Stem": "gene_type"}[name]
    if how == "lacking":
        del weights[key]
    elif how == "extra":
        weights["more"] = torch.zeros(1)
    else:
        weights[key] = weights[key][:, :-1].contiguous()
    save_file(weights, file)
    if how == "no safetensors":
        file.write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(ValueError, match="the weights in .* do not fit config.json"):
        models.load(tmp_path)


@pytest.mark.parametrize("change", [lambda c: c["config"].update(widht=3), lambda c: c["config"].pop("genes")])
def test_tampered_configuration(spots, tmp_path, change):
    file = fitted("TrainingMean", spots).save(tmp_path) / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a TrainingMean's"):
        models.load(tmp_path)


def test_foreign_configuration(spots, tmp_path):
    file = fitted("TrainingMean", spots).save(tmp_path) / "config.json"
    file.write_text('{"architectures": ["Bert"]}')
    with pytest.raises(ValueError, match="lacks class, config, record"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/nothing", "./nowhere", "two words"])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match="there is no folder .* and the Hugging Face Hub gives no such model"):
        models.load(name)


def test_a_hub_id_is_downloaded(spots, tmp_path, monkeypatch):
    import huggingface_hub

    fitted("TrainingMean", spots).save(tmp_path)
    asked = []

    def snapshot_download(repo_id, *, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.load("owner/name").genes == GENES
    assert asked == [("owner/name", ["config.json", "model.safetensors"])]


@pytest.mark.parametrize("cls", [TrainingMean, LinearProbe, Retrieval, Stem])
def test_bad_arguments(cls):
    with pytest.raises(ValueError, match="at least one gene"):
        cls([], embedding_dim=2)
    with pytest.raises(ValueError, match="must be unique, found more than once: B, C"):
        cls(["C", "A", "B", "B", "C"], embedding_dim=2)
    with pytest.raises(ValueError, match="unknown transform 'log'"):
        cls(["A"], embedding_dim=2, transform="log")


def test_refitting_forgets_the_data_before(spots):
    other = SpotData(spots.x * 3 + 1, spots.h * 2 - 1, spots.group)
    for name in ("TrainingMean", "LinearProbe", "Retrieval"):
        again, fresh = fitted(name, other), fitted(name, spots)
        again.fit(spots)
        assert again.weights_sha256() == fresh.weights_sha256(), name
