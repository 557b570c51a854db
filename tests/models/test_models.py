from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

from stgen import models
from stgen.data import SpotData, group_folds
from stgen.models import LinearProbe, Retrieval, Stem, TrainingMean, _folder
from stgen.models._layers import Standardize

GENES = ["A", "B", "C", "D"]
SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "image_hidden": 8, "genes_per_token": 1}


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


def test_cross_fit_works_wherever_the_model_is(spots):
    """Data stay on the CPU; the model may have been left on an accelerator by the fit before. ``meta`` stands in."""
    expected = LinearProbe(GENES, embedding_dim=5).cross_fit(spots)
    assert torch.equal(LinearProbe(GENES, embedding_dim=5).to("meta").cross_fit(spots), expected)
    elsewhere = Retrieval(GENES, embedding_dim=5).to("meta")
    elsewhere.fit(spots)
    assert elsewhere.reference.device.type == elsewhere.expression.device.type == "meta"


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
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
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
    assert set(content) == {"class", "config", "record", "format", "weights", "sha256"}
    assert content["class"] == name.split()[0]
    assert content["config"]["genes"] == GENES


def test_nothing_is_pickled(spots, tmp_path, monkeypatch):
    import pickle

    model = fitted("Stem with probe", spots)
    for function in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("pickle was used"))
    assert models.load(model.save(tmp_path)).weights_sha256() == model.weights_sha256()


@pytest.mark.parametrize("name", KINDS)
def test_impossible_samplers_are_refused_by_those_who_use_one(spots, name):
    model = fitted(name, spots)
    model.check_sampling(25, "dpm++")
    if model.stochastic:
        with pytest.raises(ValueError, match="found 'euler'"):
            model.check_sampling(25, "euler")
        with pytest.raises(ValueError, match="found 0"):
            model.check_sampling(0, "dpm++")
    else:
        model.check_sampling(0, "euler")


def test_another_fit_is_another_hash(spots):
    model = fitted("LinearProbe", spots)
    before = model.weights_sha256()
    model.fit(spots.subset(np.arange(60)))
    assert model.weights_sha256() != before


def test_only_fitted_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="this Stem has not been fitted; call stgen.tl.fit"):
        Stem(GENES, embedding_dim=5).save(tmp_path / "model")
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
    content = json.loads(file.read_text())
    del content["sha256"]
    file.write_text(json.dumps(_folder.sealed({**content, "class": name})))
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
    with pytest.raises(ValueError, match="its checksum is another"):
        models.load(tmp_path)
    del content["sha256"]
    file.write_text(json.dumps(_folder.sealed(content)))
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

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = ["config.json", "model.safetensors"]
    assert models.load("owner/name").genes == models.load("owner/name", revision="v1").genes == GENES
    assert asked == [("owner/name", None, files), ("owner/name", "v1", files)]
    with pytest.raises(ValueError, match="`revision` is of a model on the Hub"):
        models.load(tmp_path, revision="v1")


@pytest.mark.parametrize("cls", [TrainingMean, LinearProbe, Retrieval, Stem])
def test_bad_arguments(cls):
    with pytest.raises(ValueError, match="at least one gene"):
        cls([], embedding_dim=2)
    with pytest.raises(ValueError, match="must be names without repetition, found more than once: B, C"):
        cls(["C", "A", "B", "B", "C"], embedding_dim=2)
    with pytest.raises(ValueError, match="unknown transform 'log'"):
        cls(["A"], embedding_dim=2, transform="log")


def test_refitting_forgets_the_data_before(spots):
    other = SpotData(spots.x * 3 + 1, spots.h * 2 - 1, spots.group)
    for name in ("TrainingMean", "LinearProbe", "Retrieval"):
        again, fresh = fitted(name, other), fitted(name, spots)
        again.fit(spots)
        assert again.weights_sha256() == fresh.weights_sha256(), name
