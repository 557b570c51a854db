"""Fitting, predicting and scoring on SpatialData and AnnData: values, identities, and every kind of bad input."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
from anndata import AnnData

from stgen import datasets, metrics, models, pp, tl
from stgen._spatial.tables import spatial_blocks
from stgen.tl.prediction.target import Prediction, Target
from stgen.transforms import transform_counts

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def sections():
    """Two patients with an embedding that is cheap to compute: the mean color of two patches."""
    made = {}
    for seed in (0, 1):
        sdata = datasets.simulated_section(seed=seed, size_um=700)
        pp.embed(sdata, image_key="he", table_key="spot_counts", model=colors, patch_um=[60, 120], patch_px=8)
        del sdata.tables["cell_counts"], sdata.shapes["cells"], sdata.points["transcripts"]
        made[f"patient {seed}"] = sdata
    return made


def colors(patches):
    """Mean and spread of each channel."""
    return np_cat(patches.mean((2, 3)), patches.std((2, 3)))


def np_cat(*parts):
    import torch

    return torch.cat(parts, 1)


@pytest.fixture
def section(sections):
    return copied(sections["patient 1"])


def copied(sdata):
    tables = {key: table.copy() for key, table in sdata.tables.items()}
    return sd.SpatialData(
        images=dict(sdata.images), shapes=dict(sdata.shapes), tables=tables, attrs=copy.deepcopy(sdata.attrs)
    )


@pytest.fixture(scope="module")
def genes(sections):
    return pp.select_genes(sections, 12, key_added=None)


@pytest.fixture(scope="module")
def probe(sections, genes):
    return tl.fit(models.LinearProbe(genes, embedding_dim=12), sections["patient 0"])


@pytest.fixture(scope="module")
def stem(sections, genes):
    model = models.Stem(genes, embedding_dim=12, width=16, depth=1, heads=2, genes_per_token=4)
    return tl.fit(model, sections["patient 0"], steps=60, batch_size=16, evaluate_every=20, **QUIET)


def fingerprint(adata):
    """Everything that a call could have changed, as a comparable value."""
    return (
        sorted(adata.layers), sorted(adata.obsm), sorted(adata.var), sorted(adata.obs),
        repr(adata.uns), float(adata.X.sum()),
    )  # fmt: skip


# ---- prediction ----------------------------------------------------------------------------------------------------


def test_prediction_is_what_the_model_gives_for_the_embedding(section, probe, genes):
    adata = section["spot_counts"]
    tl.predict_expression(section, model=probe, **QUIET)
    import torch

    expected = probe.sample({"h": torch.as_tensor(adata.obsm["X_colors"])})[:, 0].clamp(min=0).numpy()
    np.testing.assert_allclose(adata[:, genes].layers["predicted"], expected, rtol=1e-5)
    others = ~adata.var_names.isin(genes)
    assert np.isnan(adata.layers["predicted"][:, others]).all()
    np.testing.assert_array_equal(adata.var["predicted"], ~others)
    assert "predicted_std" not in adata.layers  # a probe has no spread


def test_statistics_and_spread_follow_from_the_samples(section, stem, genes):
    adata = section["spot_counts"]
    results = {}
    for statistic in ("mean", "median", "mode"):
        tl.predict_expression(adata, model=stem, n_samples=6, steps=5, statistic=statistic, key_added=statistic,
                              keep_samples=True, **QUIET)  # fmt: skip
        results[statistic] = adata[:, genes].layers[statistic]
    samples = adata.obsm["mean_samples"]
    assert samples.shape == (adata.n_obs, 6, 12)
    np.testing.assert_allclose(results["mean"], samples.mean(1), rtol=1e-5)
    np.testing.assert_allclose(results["median"], np.median(samples, 1), rtol=1e-5)
    assert (np.abs(samples - results["mode"][:, None]).min(1) == 0).all()  # the mode is one of the samples
    np.testing.assert_allclose(adata[:, genes].layers["mean_std"], samples.std(1), rtol=1e-4, atol=1e-6)
    assert samples.min() >= 0


def test_same_seed_same_samples_whatever_the_batch(section, stem, genes):
    adata = section["spot_counts"]
    for key, options in {"a": {"batch_size": 7}, "b": {"batch_size": 64}, "c": {"seed": 1}}.items():
        tl.predict_expression(adata, model=stem, n_samples=3, steps=4, key_added=key, **options, **QUIET)
    a, b, c = (adata[:, genes].layers[key] for key in "abc")
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(a - c).max() > 0.01


def test_ancestral_sampling_does_not_depend_on_the_batch_either(section, stem, genes):
    adata = section["spot_counts"]
    for key, size in {"a": 7, "b": 64}.items():
        tl.predict_expression(
            adata, model=stem, n_samples=2, steps=6, solver="ddpm", key_added=key, batch_size=size, **QUIET
        )
    np.testing.assert_allclose(adata[:, genes].layers["a"], adata[:, genes].layers["b"], atol=1e-4)


def test_genes_can_be_chosen_and_keep_their_columns(section, stem, genes):
    adata = section["spot_counts"]
    tl.predict_expression(adata, model=stem, n_samples=2, steps=4, **QUIET)
    chosen = [genes[5], genes[2]]
    tl.predict_expression(
        adata, model=stem, n_samples=2, steps=4, genes=chosen, key_added="two", keep_samples=True, **QUIET
    )
    np.testing.assert_array_equal(adata[:, chosen].layers["two"], adata[:, chosen].layers["predicted"])
    assert adata.var["two"].sum() == 2
    scores = tl.evaluate(adata, key="two")  # samples are matched to the genes' own columns
    np.testing.assert_allclose(
        scores.genes.loc[chosen, "CRPS"],
        metrics.crps(np.moveaxis(adata.obsm["two_samples"], 1, 0), truth_of(adata, chosen), centered=True),
    )


def truth_of(adata, genes):
    counts = adata[:, genes].X.toarray()
    return transform_counts(counts, np.asarray(adata.X.sum(1)).ravel(), "log1p_norm")


def test_copy_leaves_the_object_alone(section, probe):
    adata = section["spot_counts"]
    before = fingerprint(adata)
    copy_ = tl.predict_expression(adata, model=probe, copy=True, **QUIET)
    assert fingerprint(adata) == before
    assert "predicted" in copy_.layers


def test_folder_gives_what_the_model_gives_and_is_named_in_the_record(section, stem, tmp_path):
    adata = section["spot_counts"]
    tl.predict_expression(adata, model=stem, n_samples=2, steps=4, key_added="object", **QUIET)
    tl.predict_expression(adata, model=stem.save(tmp_path / "stem"), n_samples=2, steps=4, key_added="folder", **QUIET)
    np.testing.assert_array_equal(adata.layers["object"], adata.layers["folder"])
    entry = adata.uns["stgen"]["folder"]
    assert entry["weights_sha256"] == stem.weights_sha256()
    assert entry["unit"] == "log1p(counts per 10,000)"
    assert entry["model"] == "Stem"
    assert entry["fitted_on"] == "patient 0" or entry["fitted_on"] == "section"


def test_slide_without_spots_is_tiled_embedded_and_predicted(tmp_path):
    train = datasets.simulated_section(seed=0, size_um=600)
    pp.embed(train, image_key="he", table_key="spot_counts", patch_um=128)
    table = train["spot_counts"]
    genes = pp.select_genes(table, 5)
    probe = tl.fit(models.LinearProbe(genes, embedding_dim=table.obsm["X_texture"].shape[1]), table)
    slide = sd.SpatialData(images={"he": datasets.simulated_section(seed=1, size_um=600)["he"]})
    tl.predict_expression(slide, model=probe, **QUIET)
    predicted = slide["predicted"]
    assert list(predicted.var_names) == genes
    assert len(slide.shapes["predicted_tiles"]) == predicted.n_obs > 10
    assert np.isfinite(predicted.X).all()
    slide.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    np.testing.assert_array_equal(again["predicted"].X, predicted.X)
    assert again["predicted"].uns["stgen"]["predicted"]["model"] == "LinearProbe"
    assert again["predicted"].uns["spatialdata_attrs"]["region"] == "predicted_tiles"


def test_spatialdata_table_that_lacks_genes_gets_a_new_table(section, probe, genes, caplog):
    narrow = section["spot_counts"][:, genes[:3]].copy()
    del section.tables["spot_counts"]
    section.tables["spot_counts"] = narrow
    tl.predict_expression(section, model=probe, table_key="spot_counts", **QUIET)
    assert list(section["predicted"].var_names) == genes
    assert "predicted" not in section["spot_counts"].layers
    assert "9 of the 12 genes to predict are not in 'spot_counts'" in caplog.text
    assert "sdata.tables['predicted']" in caplog.text
    with pytest.raises(KeyError, match=r"9 of the 12 genes.*genes="):
        tl.predict_expression(narrow, model=probe, **QUIET)


def test_what_can_be_scored_is_listed(section, probe):
    with pytest.raises(
        KeyError, match=r"no prediction layers.*stgen.tl.predict_expression\(data, model=...\) makes one"
    ):
        tl.evaluate(section)
    tl.predict_expression(section, model=probe, key_added="probe", **QUIET)
    with pytest.raises(KeyError, match="those of the table are .*probe.*: pass key="):
        tl.evaluate(section)


@pytest.mark.parametrize("what", ["gene", "embedding"])
def test_errors_of_several_sections_name_the_one(sections, section, genes, what):
    if what == "gene":
        section.tables["spot_counts"] = section["spot_counts"][:, genes[1:]].copy()
    else:
        section["spot_counts"].uns["stgen"].clear()
    with pytest.raises(KeyError, match="section .*broken.*: .*(genes are not in the table|no histology embedding)"):
        tl.fit(models.LinearProbe(genes, embedding_dim=12), {"whole": sections["patient 0"], "broken": section})


def test_missing_embedding_is_computed_as_in_training(sections):
    section = copied(sections["patient 0"])
    pp.embed(section, image_key="he", patch_um=128)
    adata = section["spot_counts"]
    genes = pp.select_genes(adata, 4)
    probe = models.LinearProbe(genes, embedding_dim=adata.obsm["X_texture"].shape[1])
    tl.fit(probe, section, embedding_key="X_texture")
    tl.predict_expression(section, model=probe, key_added="given", **QUIET)
    fresh = copied(sections["patient 0"])
    tl.predict_expression(fresh, model=probe, image_key="he", key_added="given", **QUIET)
    np.testing.assert_array_equal(fresh["spot_counts"].obsm["X_texture"], adata.obsm["X_texture"])
    np.testing.assert_array_equal(fresh["spot_counts"].layers["given"], adata.layers["given"])
    assert fresh["spot_counts"].uns["stgen"]["X_texture"]["function"] == "pp.embed"


def test_a_prediction_is_never_taken_for_a_measurement(section, probe, stem):
    slide = sd.SpatialData(images={"he": section["he"]}, shapes={"spots": section["spots"]})
    colored = section["spot_counts"].obsm["X_colors"]
    for key, model in (("first", probe), ("second", stem)):
        model.record["embedding"]["by_name"] = False
        target = Target.find(slide, table_key=None, shapes_key="spots", key_added=key)
        target.table.obsm["X_colors"] = colored
        samples = np.ones((len(colored), 1, len(model.genes)), np.float32) * len(key)
        assert target.user_table is None
        entry = {"function": "tl.predict_expression", "transform": "log1p_norm", "unit": "u", "model": "m"}
        target.write(Prediction(samples[:, 0], embedding_key="X_colors"), model.genes, entry, as_layers=False)
    assert set(slide.tables) == {"first", "second"}
    again = Target.find(slide, table_key=None, shapes_key=None, key_added="third")
    assert again.user_table is None
    assert again.shapes_key == "spots"
    with pytest.raises(KeyError, match="X of this table is the prediction 'first' itself: there are no counts"):
        tl.evaluate(slide, key="second", table_key="first")
    with pytest.raises(ValueError, match="prediction in X"):
        tl.fit(models.LinearProbe(probe.genes, embedding_dim=12), slide, table_key="first", embedding_key="X_colors")
    with pytest.raises(ValueError, match="no counts to fit on"):
        tl.predict_expression(slide, model=None, key_added="fourth", **QUIET)
    again.key_added = "first"
    with pytest.raises(ValueError, match="overwrite=True"):
        again.check_keys(probe.genes, overwrite=False)


def test_one_call_on_a_visium_anndata_embeds_and_cross_fits():
    """The convention of scanpy.read_visium: full-resolution pixels, a smaller image, scale factors."""
    sdata = datasets.simulated_section(seed=5, size_um=600)
    source = sdata["spot_counts"]
    adata = AnnData(source.X, obs=source.obs[[]], var=source.var[[]], obsm={"spatial": source.obsm["spatial"] * 2.0})
    image = sdata["he"].to_numpy().transpose(1, 2, 0)
    factors = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 110.0}
    adata.uns["spatial"] = {"library": {"images": {"hires": image}, "scalefactors": factors}}
    fast = {"fit_options": {"steps": 10}, "n_samples": 2, "steps": 3, "folds": 2}
    tl.predict_expression(adata, **fast, **QUIET)
    assert adata.var["predicted"].sum() == 60  # a panel smaller than the default number of genes
    assert np.isfinite(adata.layers["predicted"]).all()
    assert adata.obsm["X_texture"].shape[0] == adata.n_obs
    assert "predicted_std" in adata.layers


# ---- cross-fitting -------------------------------------------------------------------------------------------------


def test_cross_fit_never_uses_a_locations_own_block(section, genes):
    """Changing the counts of one fold changes the predictions of the others, never its own."""
    adata = section["spot_counts"]
    model = models.LinearProbe(genes, embedding_dim=12, transform="log1p_raw")
    tl.predict_expression(adata, model=model, key_added="before", folds=4, **QUIET)
    assert not model.fitted
    fold = adata.obs["before_fold"].to_numpy()
    assert sorted(adata.obs["before_fold"].cat.categories) == [0, 1, 2, 3]
    assert adata.uns["stgen"]["before"]["folds"] == 4
    X = adata.X.toarray()
    X[fold == 2] = X[fold == 2][:, ::-1]
    adata.X = X
    tl.predict_expression(adata, model=model, key_added="after", folds=4, **QUIET)
    before, after = (adata[:, genes].layers[key] for key in ("before", "after"))
    np.testing.assert_allclose(before[fold == 2], after[fold == 2], atol=1e-5)
    assert np.abs(before[fold != 2] - after[fold != 2]).max() > 0.05


def test_folds_of_an_earlier_result_do_not_outlive_it(section, genes, stem):
    adata = section["spot_counts"]
    probe = models.LinearProbe(genes, embedding_dim=12)
    tl.predict_expression(adata, model=probe, folds=2, **QUIET)
    tl.predict_expression(adata, model=stem, n_samples=1, steps=2, overwrite=True, **QUIET)
    assert "predicted_fold" not in adata.obs
    assert "folds" not in adata.uns["stgen"]["predicted"]
    adata.obs["new_fold"] = "of the user's"
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"obs\['new_fold'\]"):
            tl.predict_expression(adata, model=probe, folds=2, key_added="new", overwrite=overwrite, **QUIET)
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(ValueError, match=r"layers\['counts'\] is not a result .* and is not replaced"):
        tl.predict_expression(adata, model=probe, folds=2, key_added="counts", overwrite=True, **QUIET)
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), adata.X.toarray())


def test_no_model_cross_fits_a_stem(section):
    adata = section["spot_counts"]
    tl.predict_expression(section, genes=list(adata.var_names[:8]), folds=2, steps=4, n_samples=2,
                          fit_options={"steps": 20}, key_added="self", **QUIET)  # fmt: skip
    assert adata.uns["stgen"]["self"]["model"] == "Stem"
    assert "cross-fitted in 2 folds" in adata.uns["stgen"]["self"]["fitted_on"]
    assert np.isfinite(adata.layers["self"][:, :8]).all()


def test_blocks_are_of_equal_size_and_compact():
    xy = np.random.default_rng(0).uniform(size=(160, 2)) * [3, 1]
    block = spatial_blocks(xy, 16)
    assert set(np.bincount(block)) == {10}
    within = np.mean([xy[block == b].std(0).mean() for b in range(16)])
    assert within < 0.5 * xy.std(0).mean()


def test_same_seed_same_cross_fit(section, genes):
    adata = section["spot_counts"]
    for key, seed in {"a": 0, "b": 0, "c": 1}.items():
        tl.predict_expression(adata, genes=genes, folds=2, steps=3, n_samples=2, fit_options={"steps": 5}, seed=seed,
                              key_added=key, **QUIET)  # fmt: skip
    np.testing.assert_array_equal(adata.layers["a"], adata.layers["b"])
    assert np.nanmax(np.abs(adata.layers["a"] - adata.layers["c"])) > 0.01


# ---- scores --------------------------------------------------------------------------------------------------------


def test_perfect_prediction_scores_perfectly_and_scores_agree_with_metrics(section, probe, genes):
    adata = section["spot_counts"]
    tl.predict_expression(adata, model=probe, **QUIET)
    truth = truth_of(adata, list(adata.var_names[adata.var["predicted"]]))
    scores = tl.evaluate(adata)
    pred = adata.layers["predicted"][:, adata.var["predicted"]]
    np.testing.assert_allclose(scores.genes["PCC"], metrics.pcc(pred, truth))
    assert scores.summary["MSE"] == pytest.approx(np.square(pred - truth).mean())
    full = np.full(adata.shape, np.nan, np.float32)
    full[:, adata.var["predicted"]] = truth
    adata.layers["predicted"] = full
    best = tl.evaluate(adata, ranking=genes)
    assert best.summary["PCC"] == pytest.approx(1)
    assert best.summary[["MSE", "RVD"]].tolist() == pytest.approx([0, 0], abs=1e-10)
    assert best.summary["GSC"] == pytest.approx(1)
    assert best.summary["SSC"] == pytest.approx(1)
    assert best.summary["PCC-10_ranked"] == pytest.approx(1)


def test_evaluate_needs_a_prediction(section):
    with pytest.raises(KeyError, match="no prediction"):
        tl.evaluate(section)


def test_result_goes_on_through_scanpy_and_disk(section, probe, genes, tmp_path):
    tl.predict_expression(section, model=probe, **QUIET)
    adata = section["spot_counts"]
    predicted = adata[:, adata.var["predicted"]].copy()
    predicted.X = predicted.layers["predicted"]
    sc.pp.pca(predicted, n_comps=3)
    assert np.isfinite(predicted.obsm["X_pca"]).all()
    section.write(tmp_path / "section.zarr")
    again = sd.read_zarr(tmp_path / "section.zarr")
    np.testing.assert_array_equal(again["spot_counts"].layers["predicted"], adata.layers["predicted"])
    assert tl.evaluate(again).summary["PCC"] == pytest.approx(tl.evaluate(section).summary["PCC"])


# ---- bad input -----------------------------------------------------------------------------------------------------


def spoil(adata, what):
    """An AnnData with one thing wrong."""
    adata = adata.copy()
    X = adata.X.toarray()
    if what == "nan":
        X[0, 0] = np.nan
    elif what == "negative":
        X[0, 0] = -1
    elif what == "text":
        X = X.astype(str).astype(object)
    elif what == "constant":
        X[:, :] = np.where(adata.var_names == "EPCAM", 0, X)
    if what in ("nan", "negative", "constant"):
        adata.X = X
    elif what == "text":
        adata = AnnData(X.astype("U"), obs=adata.obs, var=adata.var, obsm=dict(adata.obsm), uns=adata.uns)
    elif what == "duplicate":
        adata.var_names = ["EPCAM", *adata.var_names[1:-1], "EPCAM"]
    elif what == "empty":
        adata = adata[:0].copy()
    elif what == "few":
        adata = adata[:5].copy()
    elif what == "no coordinates":
        del adata.obsm["spatial"]
    elif what == "no embedding":
        del adata.obsm["X_colors"]
    elif what == "nan embedding":
        adata.obsm["X_colors"] = adata.obsm["X_colors"].copy()
        adata.obsm["X_colors"][0, 0] = np.nan
    return adata


BAD = {
    "nan": (ValueError, "NaN"),
    "negative": (ValueError, "negative"),
    "text": (TypeError, "must hold counts"),
    "constant": (ValueError, "constant.*EPCAM"),
    "duplicate": (ValueError, "more than once"),
    "empty": (ValueError, "empty"),
    "few": (ValueError, "too few locations.*5"),
    "no coordinates": (KeyError, "no spatial coordinates"),
    "no embedding": (KeyError, "pp.embed"),
    "nan embedding": (ValueError, "finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_fit_refuses_bad_tables_and_changes_nothing(sections, what):
    adata = spoil(sections["patient 0"]["spot_counts"], what)
    model = models.LinearProbe(["EPCAM", "COL1A1"], embedding_dim=12)
    weights, before = model.weights_sha256(), (sorted(adata.layers), sorted(adata.obsm), repr(adata.uns))
    error, message = BAD[what]
    with pytest.raises(error, match=message):
        tl.fit(model, adata)
    assert not model.fitted
    assert model.weights_sha256() == weights
    assert (sorted(adata.layers), sorted(adata.obsm), repr(adata.uns)) == before
    with pytest.raises(error, match=message):
        tl.predict_expression(adata, model=model, **QUIET)  # cross-fitting meets the same table
    assert (sorted(adata.layers), sorted(adata.obsm), repr(adata.uns)) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"genes": ["EPCAM", "NOTAGENE"]}, KeyError, "1 gene.*NOTAGENE"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99'.*cpu"),
        ({"device": "abacus"}, ValueError, "abacus"),
        ({"statistic": "max"}, ValueError, "statistic"),
        ({"n_samples": 0}, ValueError, "n_samples"),
        ({"model": "no/such folder"}, FileNotFoundError, "no folder"),
        ({"embedding_key": "X_other"}, KeyError, "X_other"),
        ({"fit_options": {"steps": 5}}, ValueError, "fit_options"),
        ({"key_added": "array_row"}, ValueError, "in use"),
    ],
)
def test_predict_refuses_bad_arguments_and_changes_nothing(section, probe, options, error, message):
    adata = section["spot_counts"]
    before = fingerprint(adata)
    with pytest.raises(error, match=message):
        tl.predict_expression(section, **{"model": probe, **QUIET, **options})
    assert fingerprint(adata) == before


def test_existing_result_is_kept_unless_told_otherwise(section, probe, stem):
    adata = section["spot_counts"]
    tl.predict_expression(adata, model=stem, n_samples=2, steps=3, keep_samples=True, **QUIET)
    before = fingerprint(adata)
    with pytest.raises(ValueError, match="overwrite=True"):
        tl.predict_expression(adata, model=probe, **QUIET)
    assert fingerprint(adata) == before
    tl.predict_expression(adata, model=probe, overwrite=True, **QUIET)
    assert "predicted_std" not in adata.layers  # nothing of the old result is left beside the new
    assert "predicted_samples" not in adata.obsm


def test_embedding_of_another_kind_is_refused(section, probe):
    adata = section["spot_counts"]
    adata.obsm["X_colors"] = adata.obsm["X_colors"][:, :4]
    before = fingerprint(adata)
    with pytest.raises(ValueError, match=r"not the embedding.*n_features is 4, not 12"):
        tl.predict_expression(adata, model=probe, **QUIET)
    assert fingerprint(adata) == before


def test_fit_says_what_embedding_dim_should_be(sections, genes):
    with pytest.raises(ValueError, match="embedding_dim=12"):
        tl.fit(models.LinearProbe(genes, embedding_dim=1536), sections)


def test_sections_embedded_differently_are_refused(sections, genes):
    other = copied(sections["patient 1"])
    other["spot_counts"].uns["stgen"]["X_colors"]["patch_um"] = 50.0
    with pytest.raises(ValueError, match="embedded otherwise"):
        tl.fit(models.LinearProbe(genes, embedding_dim=12), {"a": sections["patient 0"], "b": other})


@pytest.mark.parametrize("options", [{"stepz": 1}, {"steps": 5, "checkpoint": "other run"}])
def test_failed_fit_leaves_a_fitted_model_as_it_was(sections, stem, options, tmp_path):
    if "checkpoint" in options:
        options = {**options, "checkpoint": tmp_path / "run"}
        other = models.Stem(stem.genes, embedding_dim=12, width=8, depth=1, heads=2)
        tl.fit(other, sections["patient 0"], steps=2, batch_size=8, checkpoint=tmp_path / "run", **QUIET)
    before, record = stem.weights_sha256(), stem.record
    with pytest.raises((TypeError, ValueError), match=r"stepz|another run"):
        tl.fit(stem, sections["patient 1"], **options, **QUIET)
    assert stem.weights_sha256() == before
    assert stem.record is record
    assert not stem.training


def test_a_layer_of_the_users_is_not_replaced_by_spread(section, probe):
    adata = section["spot_counts"]
    adata.layers["z_std"] = adata.X.copy()
    with pytest.raises(ValueError, match="z_std"):
        tl.predict_expression(adata, model=probe, key_added="z", **QUIET)
    assert "z_std" in adata.layers
    assert "z" not in adata.layers


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5000}, {"solver": "euler"}, {"folds": 1}])
def test_sampler_is_checked_before_any_work(section, stem, options, monkeypatch):
    monkeypatch.setattr(models.Stem, "sample", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=next(iter(options))):
        tl.predict_expression(section, model=stem, **{**QUIET, **options})


def test_unknown_gene_is_named(sections):
    with pytest.raises(KeyError, match="NOTAGENE"):
        tl.fit(models.LinearProbe(["EPCAM", "NOTAGENE"], embedding_dim=12), sections)


def test_unknown_device_stops_fit_before_any_work(sections, genes):
    model = models.Stem(genes, embedding_dim=12, width=16, depth=1, heads=2)
    before = model.weights_sha256()
    with pytest.raises(ValueError, match="device"):
        tl.fit(model, sections, device="cuda:99")
    assert model.weights_sha256() == before


def test_unfitted_model_without_counts_is_refused(probe, section):
    slide = sd.SpatialData(images={"he": section["he"]})
    with pytest.raises(ValueError, match="no counts to fit on"):
        tl.predict_expression(slide, model=None, **QUIET)
    assert not slide.tables
    assert not slide.shapes


def test_missing_image_is_named(section, sections, genes):
    del section["spot_counts"].obsm["X_colors"]
    model = models.LinearProbe(genes, embedding_dim=12)
    tl.fit(model, sections["patient 0"])
    model.record["embedding"] |= {"model": "texture", "by_name": True}
    with pytest.raises(KeyError, match="nosuch"):
        tl.predict_expression(section, model=model, image_key="nosuch", **QUIET)
    assert "X_colors" not in section["spot_counts"].obsm


def test_record_is_a_frame_of_plain_values(section, probe):
    tl.predict_expression(section, model=probe, **QUIET)
    entry = section["spot_counts"].uns["stgen"]["predicted"]
    assert all(isinstance(v, str | int | float | bool | dict) for v in entry.values())
    assert isinstance(tl.evaluate(section).genes, pd.DataFrame)
