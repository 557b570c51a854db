"""Models as LazySlide takes them, by its published interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from stgen import models
from stgen.data import SpotData

GENES = ["EPCAM", "CD3E"]


def fitted(cls=models.Stem, **options):
    rng = np.random.default_rng(0)
    data = SpotData(np.abs(rng.normal(size=(32, 2))), rng.normal(size=(32, 3)))
    model = cls(GENES, embedding_dim=3, transform="none", **options)
    model.record = {"history": model.fit(data, **({"steps": 4, "progress": False} if cls is models.Stem else {}))}
    return model


@pytest.fixture(scope="module")
def stem():
    return fitted(width=16, depth=1, heads=2)


def test_it_has_the_published_interface(stem):
    base = pytest.importorskip("lazyslide_models.base")
    assert isinstance(models.FeaturePredictor(stem), base.FeaturePredictionModelProtocol)


def test_it_has_what_the_interface_names(stem):
    predictor = models.FeaturePredictor(stem)
    assert predictor.model is stem
    assert predictor.name == "Stem"
    assert (predictor.needs_coords, predictor.whole_slide, predictor.features_model_name) == (False, False, None)
    assert predictor.get_transform() is None
    assert predictor.to("cpu") is predictor
    predictor.try_compile(mode="default")


def test_a_prediction_depends_on_the_tile_and_not_on_its_batch(stem):
    features = np.random.default_rng(1).normal(size=(9, 3))
    predictor = models.FeaturePredictor(stem, n_samples=3, steps=4, seed=5)
    whole = predictor.predict(features)
    parts = [predictor.predict(part) for part in (features[:4], torch.as_tensor(features[4:]))]
    order = np.random.default_rng(2).permutation(9)
    turned = predictor.predict(sparse.csr_matrix(features[order]))
    other = models.FeaturePredictor(stem, n_samples=3, steps=4, seed=6).predict(features)
    assert list(whole) == GENES
    for gene in GENES:
        assert whole[gene].shape == (9,)
        np.testing.assert_allclose(np.concatenate([part[gene] for part in parts]), whole[gene], rtol=1e-5)
        np.testing.assert_allclose(turned[gene], whole[gene][order], rtol=1e-5)
        assert not np.allclose(other[gene], whole[gene])


def test_a_deterministic_model_gives_its_own_prediction():
    probe = fitted(models.LinearProbe)
    features = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    expected = probe.sample({"h": torch.as_tensor(features)})[:, 0].clamp(min=0).numpy()
    predicted = models.FeaturePredictor(probe).predict(features)
    np.testing.assert_allclose(np.column_stack([predicted[gene] for gene in GENES]), expected, rtol=1e-6)


def test_what_it_cannot_take_is_refused(stem):
    with pytest.raises(TypeError, match="`model` must be a model, found str"):
        models.FeaturePredictor("folder")
    with pytest.raises(ValueError, match="takes maps"):
        models.FeaturePredictor(models.Interpolate(GENES, factor=5))
    with pytest.raises(ValueError, match="has not been fitted"):
        models.FeaturePredictor(models.TrainingMean(GENES, embedding_dim=3))
    with pytest.raises(ValueError, match="`n_samples` must be a whole number"):
        models.FeaturePredictor(stem, n_samples=0)
    predictor = models.FeaturePredictor(stem)
    for wrong in (np.ones((2, 4)), np.ones(3), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match="3 finite features"):
            predictor.predict(wrong)
