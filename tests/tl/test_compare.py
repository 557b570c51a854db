"""The fair comparison: what its numbers are, that it resumes and repeats, and that nothing leaks from the test section."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

from stgen import models, pp, tl, train
from stgen.tl.comparison import compare as _compare

SPLIT = {"test": "C", "patients": {"A": "Ada", "B": "Ada", "C": "Cy"}}
MODELS = {
    "TrainingMean": "TrainingMean",
    "LinearProbe": "LinearProbe",
    "tiny Stem": {
        "model": "Stem",
        "config": {"width": 8, "depth": 1, "heads": 2, "genes_per_token": 4},
        "fit": {"steps": 6, "batch_size": 8, "evaluate_every": 2},
    },
}
FAST = {"genes": 8, "n_samples": 3, "steps": 2, "seeds": (0, 1), "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def sections():
    """Three sections whose counts follow a shared law of six features; the features stand for their embedding."""
    law = np.random.default_rng(9).normal(0, 0.4, (6, 20))
    made = {}
    for seed, name in enumerate("ABC"):
        rng = np.random.default_rng(seed)
        h = rng.normal(size=(36, 6)).astype(np.float32)
        counts = sparse.csr_matrix(rng.poisson(np.exp(1 + h @ law)), dtype=np.float32)
        made[name] = AnnData(counts, var=pd.DataFrame(index=["EPCAM", "COL1A1", *(f"G{i}" for i in range(18))]))
        made[name].obs_names = [f"{name}{i}" for i in range(36)]
        made[name].obsm.update({"spatial": np.indices((6, 6)).reshape(2, -1).T * 100.0, "X_colors": h})
        made[name].uns["stgen"] = {"X_colors": {"function": "pp.embed", "model": "colors", "patch_um": 60.0}}
    return made


@pytest.fixture
def data(sections):
    return {name: table.copy() for name, table in sections.items()}


@pytest.fixture(scope="module")
def done(sections, tmp_path_factory):
    """A complete comparison: its folder and its table."""
    folder = tmp_path_factory.mktemp("done") / "comparison"
    return folder, tl.compare(MODELS, sections, folder=folder, **SPLIT, **FAST)


def state(data):
    """Everything that a call could have changed in the sections."""
    return [
        (
            name, table.X.toarray().tobytes(), sorted(table.layers), list(table.var), list(table.obs), repr(table.uns),
            {k: np.asarray(v).tobytes() for k, v in table.obsm.items()},
        )
        for name, table in data.items()
    ]  # fmt: skip


def files(folder):
    """What is in a folder, byte for byte."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(folder, file="comparison.json"):
    return json.loads((folder / file).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def run_of(folder, label, seed=0):
    return content(folder, f"runs/{label}/seed_{seed}/scores.json")


# ---- what the numbers are --------------------------------------------------------------------------------------------


def test_numbers_are_those_of_fit_predict_and_evaluate(done, data):
    folder, table = done
    training = {name: data[name] for name in "AB"}
    genes = pp.select_genes(training, 8, key_added=None)
    assert content(folder)["genes"] == genes
    spec = MODELS["tiny Stem"]
    model = models.Stem(genes, embedding_dim=6, transform="log1p_norm", **spec["config"])
    tl.fit(model, training, seed=1, device="cpu", progress=False, **spec["fit"])
    tl.predict_expression(
        data["C"], model=model, n_samples=3, steps=2, seed=1, keep_samples=True, device="cpu", progress=False
    )
    scores = tl.evaluate(data["C"], ranking=genes)
    row = table[(table["model"] == "tiny Stem") & (table["seed"] == 1)].iloc[0]
    pd.testing.assert_series_equal(row[scores.summary.index].astype(float), scores.summary, check_names=False)
    kept = run_of(folder, "tiny Stem", 1)
    assert kept["weights_sha256"] == model.weights_sha256()
    per_gene = pd.DataFrame(kept["sections"]["C"]["genes"]).set_index("gene")
    pd.testing.assert_frame_equal(per_gene.astype(scores.genes.dtypes), scores.genes)


def test_one_row_per_model_seed_and_section(sections, tmp_path):
    folder = tmp_path / "run"
    patients = {"A": 1, "B": 2, "C": 1}
    table = tl.compare(
        MODELS, sections, test=["C", "B"], patients=patients, allow_same_patient=True, folder=folder, **FAST
    )
    runs = [
        ("TrainingMean", 0),
        ("LinearProbe", 0),
        ("tiny Stem", 0),
        ("tiny Stem", 1),
    ]  # a probe has nothing to repeat
    assert list(zip(table["model"], table["seed"], table["section"], strict=True)) == [
        (*run, name) for run in runs for name in "BC"
    ]
    assert table["same_patient"].tolist() == [False, True] * len(runs)
    scores = table.columns[4:]
    assert {dtype.name for dtype in table.dtypes[4:]} == {"float64"}
    assert table["CRPS"].notna().tolist() == [model == "tiny Stem" for model in table["model"]]
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "scores.csv", float_precision="round_trip")[scores], table[scores]
    )
    assert table.groupby("model")["PCC"].mean()["TrainingMean"] == 0


def test_folder_has_no_pickles_and_its_models_load(done, sections):
    folder, _ = done
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".csv", ".md", ".safetensors"}
    assert not list(folder.rglob("checkpoint"))
    model = models.load(folder / "runs" / "LinearProbe" / "seed_0" / "model")
    assert model.genes == content(folder)["genes"]
    assert model.record["sections"] == ["A", "B"]
    assert content(folder)["made_with"]["torch"] == torch.__version__
    assert content(folder)["patients"] == SPLIT["patients"]


def test_order_of_models_and_sections_does_not_matter(done, sections, tmp_path):
    backward = dict(reversed(MODELS.items()))
    table = tl.compare(backward, dict(reversed(sections.items())), folder=tmp_path / "run", **SPLIT, **FAST)
    keys = ["model", "seed"]
    pd.testing.assert_frame_equal(
        table.sort_values(keys, ignore_index=True), done[1].sort_values(keys, ignore_index=True), check_exact=True
    )
    before = files(done[0])
    again = tl.compare(backward, sections, folder=done[0], **SPLIT, **FAST)  # the same comparison, which is there
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert files(done[0]) == before


def test_test_section_decides_neither_genes_nor_weights(done, data, tmp_path):
    rng = np.random.default_rng(0)
    data["C"].X = rng.poisson(5, data["C"].shape).astype(np.float32)
    data["C"].obsm["X_colors"] = rng.normal(size=data["C"].obsm["X_colors"].shape).astype(np.float32)
    table = tl.compare(MODELS, data, folder=tmp_path / "run", **SPLIT, **FAST)
    assert content(tmp_path / "run")["genes"] == content(done[0])["genes"]
    for label, seed in (("LinearProbe", 0), ("tiny Stem", 0), ("tiny Stem", 1)):
        assert run_of(tmp_path / "run", label, seed)["weights_sha256"] == run_of(done[0], label, seed)["weights_sha256"]
    assert (table["MSE"] != done[1]["MSE"]).all()


def test_genes_are_of_the_panel_that_all_sections_share(done, data, tmp_path):
    genes = content(done[0])["genes"]
    data["C"] = data["C"][:, data["C"].var_names != genes[1]].copy()
    tl.compare(["TrainingMean"], data, folder=tmp_path / "run", **SPLIT, **FAST)
    ranked = pp.select_genes({name: data[name] for name in "AB"}, 9, key_added=None)
    assert content(tmp_path / "run")["genes"] == [genes[0], *ranked[2:]]


def test_options_of_the_genes_and_a_list_of_them(data, tmp_path):
    options = {"flavor": "mean_var", "exclude": None}
    genes = pp.select_genes({name: data[name] for name in "AB"}, 8, key_added=None, **options)
    tables = [
        tl.compare(["LinearProbe"], data, folder=tmp_path / str(i), **SPLIT, **{**FAST, **choice})
        for i, choice in enumerate([{"gene_options": options}, {"genes": genes}])
    ]
    assert content(tmp_path / "0")["genes"] == content(tmp_path / "1")["genes"] == genes
    assert content(tmp_path / "0")["genes_chosen"] == {"n": 8, **options}
    assert content(tmp_path / "1")["genes_chosen"] is None
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_objects_of_the_user_stay_as_they_are_and_spatialdata_gives_the_same(done, data, tmp_path):
    sections = {}
    for name, table in data.items():
        table.layers["counts"], table.X = table.X, table.X * 0.5
        table.obs["predicted"], table.layers["predicted"] = 1, table.X.copy()  # names that are in use already
        spots = ShapesModel.parse(table.obsm.pop("spatial"), geometry=0, radius=25.0)
        table.obs["region"], table.obs["spot"] = pd.Categorical(["spots"] * 36), np.arange(36)
        table = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
        sections[name] = SpatialData(shapes={"spots": spots}, tables={"counts": table, "other": table.copy()})
    tables = {name: sdata["counts"] for name, sdata in sections.items()}
    before = state(tables)
    where = {"table_key": "counts", "layer": "counts", "embedding_key": "X_colors"}
    table = tl.compare(MODELS, sections, folder=tmp_path / "run", **where, **SPLIT, **FAST)
    assert state(tables) == before
    assert not any(sdata.attrs.get("stgen") for sdata in sections.values())
    pd.testing.assert_frame_equal(table, done[1], check_exact=True)
    assert content(tmp_path / "run") == content(done[0])


# ---- resuming and repeating ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["between models", "in a fit", "before the scores are written"])
def test_resumed_is_as_uninterrupted_and_nothing_is_done_twice(done, sections, tmp_path, monkeypatch, when):
    folder, fitted = tmp_path / "run", []

    def noted_fit(model, *args, **options):
        if when == "between models" and len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(type(model).__name__)
        return tl.fit(model, *args, **options)

    def interrupted(*_):
        raise KeyboardInterrupt

    evaluate, steps = train._State.evaluate, []

    def noted_evaluate(self, *args):
        steps.append(self.step)
        if when == "in a fit" and len(steps) == 3:
            raise KeyboardInterrupt
        evaluate(self, *args)

    monkeypatch.setattr(_compare, "fit", noted_fit)
    monkeypatch.setattr(train._State, "evaluate", noted_evaluate)
    if when == "before the scores are written":
        monkeypatch.setattr(_compare, "_as_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tl.compare(MODELS, sections, folder=folder, **SPLIT, **FAST)
    monkeypatch.undo()
    monkeypatch.setattr(_compare, "fit", noted_fit)
    monkeypatch.setattr(train._State, "evaluate", noted_evaluate)
    first, when = list(fitted), ""
    fitted.clear()
    table = tl.compare(MODELS, sections, folder=folder, **SPLIT, **FAST)
    pd.testing.assert_frame_equal(table, done[1], check_exact=True)
    assert content(folder) == content(done[0])
    if first == ["TrainingMean", "LinearProbe", "Stem"]:
        assert fitted == ["Stem", "Stem"]
        assert steps == [2, 4, 6, 6, 2, 4, 6]  # the first Stem went on from its checkpoint at step 4
    else:
        assert len(first) + len(fitted) == (4 if len(first) == 2 else 5)


def test_finished_comparison_is_only_read(done, sections, monkeypatch):
    folder, table = done
    before = files(folder)
    for name in ("fit", "predict_expression", "evaluate", "write_text"):
        monkeypatch.setattr(_compare, name, lambda *_, **__: pytest.fail("work was begun"))
    for given in ((MODELS, {**SPLIT, **FAST}), (folder, {"device": "cpu"})):
        again = tl.compare(given[0], sections, folder=folder, **given[1])
        pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert files(folder) == before


def test_repeated_from_its_folder_every_number_is_the_same(done, sections, tmp_path):
    folder, table = done
    again = tl.compare(str(folder), sections, folder=tmp_path / "again", device="cpu", progress=False)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert content(tmp_path / "again") == content(folder)
    for run in folder.glob("runs/*/*"):
        first, second = (
            content(place / run.relative_to(folder), "scores.json") for place in (folder, tmp_path / "again")
        )
        for seconds in ("fit_s", "predict_s"):
            first.pop(seconds)
            second.pop(seconds)
        assert first == second


def test_other_versions_are_warned_of(done, sections, tmp_path, caplog):
    folder = tmp_path / "old"
    folder.mkdir()
    earlier = content(done[0])
    earlier["made_with"]["torch"] = "1.0"
    (folder / "comparison.json").write_text(json.dumps(earlier))
    with caplog.at_level(logging.WARNING, "stgen"):
        tl.compare(folder, sections, folder=tmp_path / "again", device="cpu", progress=False)
    assert "torch was '1.0'" in caplog.text


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_data_of_another_comparison_are_refused(done, data, tmp_path):
    data["B"].X.data[5] += 1
    data["C"].obsm["X_colors"] = data["C"].obsm["X_colors"] * 1.001
    before = state(data), files(done[0])
    with pytest.raises(ValueError, match=r"data\.B\.counts was .*data\.C\.embedding was ") as error:
        tl.compare(done[0], data, folder=tmp_path / "again", device="cpu", progress=False)
    assert "data.A" not in str(error.value)
    assert "locations" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.B\.counts"):
        tl.compare(MODELS, data, folder=done[0], **SPLIT, **FAST)
    assert (state(data), files(done[0])) == before
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (0, 2)}, r"seeds was \[0, 1\] and is \[0, 2\]"),
        ({"n_samples": 4}, "n_samples was 3 and is 4"),
        ({"genes": 7}, "genes_chosen.n was 8 and is 7"),
        ({"transform": "log1p_raw"}, "transform was 'log1p_norm'"),
        ({"patients": {"A": 1, "B": 1, "C": 2}}, "patients.A was 'Ada' and is '1'"),
        ({"models": {**MODELS, "LinearProbe": {"model": "LinearProbe", "config": {"clamp": 3}}}},
         "models.LinearProbe.config.clamp was None and is 3"),
        ({"models": ["LinearProbe"]}, r"models.tiny Stem was \{.* and is None"),
    ],
)  # fmt: skip
def test_folder_of_another_comparison_is_refused(done, sections, changed, message):
    before = files(done[0])
    with pytest.raises(ValueError, match=message):
        tl.compare(folder=done[0], data=sections, **{"models": MODELS, **SPLIT, **FAST, **changed})
    assert files(done[0]) == before


def test_same_patient_is_refused_or_told(sections, tmp_path):
    same = {"A": "Ada", "B": "Bo", "C": "Bo"}
    arguments = {"models": ["TrainingMean"], "data": sections, "test": "C", **FAST}
    with pytest.raises(
        ValueError, match="'Bo' stands on both sides.*'B' is trained on, 'C' tested.*allow_same_patient"
    ):
        tl.compare(folder=tmp_path / "run", patients=same, **arguments)
    with pytest.raises(ValueError, match="patients={'A': ..., 'B': ..., 'C': ...}"):
        tl.compare(folder=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()
    told = tl.compare(folder=tmp_path / "told", patients=same, allow_same_patient=True, **arguments)
    assert told["same_patient"].tolist() == [True]
    assert tl.compare(tmp_path / "told", sections, folder=tmp_path / "again", progress=False)["same_patient"].all()
    unknown = tl.compare(folder=tmp_path / "unknown", allow_same_patient=True, **arguments)
    assert unknown["same_patient"].isna().all()


STEM = {"model": "Stem", "config": {"width": 8, "heads": 2}}
BAD = {
    "no model": ({"models": []}, ValueError, "at least one model"),
    "model twice": ({"models": ["LinearProbe", "LinearProbe"]}, ValueError, "each label once"),
    "same folder": ({"models": {"a": "LinearProbe", "A": "Retrieval"}}, ValueError, "each label once"),
    "unknown model": ({"models": ["Steam"]}, ValueError, "LinearProbe, Retrieval, Stem, TrainingMean; found 'Steam'"),
    "one name": ({"models": "Stem"}, FileNotFoundError, r"pass a list: \['Stem'\]"),
    "model of maps": ({"models": ["Stem", "C3Diff"]}, ValueError, "C3Diff makes maps.*map_key"),
    "an object": ({"models": {"m": models.TrainingMean(["A"], embedding_dim=1)}}, TypeError, "`models` must be a list of names or a mapping.*found .*TrainingMean"),
    "label": ({"models": {"../up": "Retrieval"}}, ValueError, "names a folder.*up"),
    "key": ({"models": {"m": {"model": "Stem", "width": 8}}}, ValueError, 'found "width"'),
    "no name": ({"models": {"m": {"config": {}}}}, ValueError, "found None"),
    "config": ({"models": {"m": {"model": "Stem", "config": {"widht": 8}}}}, TypeError, "model 'm'.*widht"),
    "config value": ({"models": {"m": {"model": "Stem", "config": {"preset": "huge"}}}}, ValueError, "model 'm'.*huge"),
    "shared": ({"models": {"m": {"model": "Stem", "config": {"transform": "none"}}}}, ValueError, '"transform" of "con'),
    "no JSON": ({"models": {"m": {"model": "Stem", "config": {"width": np.float32(8)}}}}, TypeError, "JSON"),
    "fit option": ({"models": {"m": {**STEM, "fit": {"stepz": 8}}}}, ValueError, '"stepz" of "fit"'),
    "our option": ({"models": {"m": {**STEM, "fit": {"seed": 8}}}}, ValueError, '"seed" of "fit"'),
    "probe's option": ({"models": {"m": {"model": "LinearProbe", "fit": {"lr": 1}}}}, ValueError, '"lr" of "fit"'),
    "validation": ({"models": {"m": {**STEM, "fit": {"validation": 1.5}}}}, ValueError, "model 'm'.*validation.*1.5"),
    "no test": ({"test": None}, ValueError, "test="),
    "unknown test": ({"test": ["C", "Z"]}, KeyError, "there is no 'Z'"),
    "nothing to train on": ({"test": ["A", "B", "C"]}, ValueError, "none is left"),
    "patients": ({"patients": {"A": 1, "C": 2}}, KeyError, "no entry for 'B'"),
    "no seed": ({"seeds": ()}, ValueError, "seeds"),
    "seed twice": ({"seeds": (1, 1)}, ValueError, "seeds"),
    "odd seed": ({"seeds": (0.5,)}, ValueError, "seeds"),
    "n_samples": ({"n_samples": 0}, ValueError, "n_samples"),
    "steps": ({"steps": 5000, "models": {"m": STEM}}, ValueError, "steps"),
    "solver": ({"solver": "euler", "models": {"m": STEM}}, ValueError, "solver"),
    "transform": ({"transform": "sqrt"}, ValueError, "sqrt"),
    "no genes": ({"genes": 0}, ValueError, "genes"),
    "empty genes": ({"genes": []}, ValueError, "at least one gene"),
    "many genes": ({"genes": 5000}, ValueError, "smaller genes="),
    "gene's name": ({"genes": "EPCAM"}, TypeError, "list of names"),
    "unknown gene": ({"genes": ["EPCAM", "NOTAGENE"]}, KeyError, "section 'A'.*NOTAGENE"),
    "genes and options": ({"genes": ["EPCAM"], "gene_options": {"flavor": "hvg"}}, ValueError, "no `gene_options`"),
    "gene option": ({"gene_options": {"layer": "x"}}, ValueError, "found layer"),
    "flavor": ({"gene_options": {"flavor": "best"}}, ValueError, "flavor"),
    "embedding": ({"embedding_key": "X_other"}, KeyError, "section.*A.*X_other"),
    "layer": ({"layer": "other"}, KeyError, "section 'A'.*other"),
    "device": ({"device": "abacus"}, ValueError, "abacus"),
    "one section": ({"data": "C"}, TypeError, "`data` must be a mapping of text to a SpatialData"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_before_any_work(data, tmp_path, monkeypatch, what):
    changed, error, message = BAD[what]
    monkeypatch.chdir(tmp_path)
    for name in ("fit", "write_text"):
        monkeypatch.setattr(_compare, name, lambda *_, **__: pytest.fail("work was begun"))
    before = state(data)
    arguments = {"models": ["LinearProbe"], "data": data, **SPLIT, **FAST, **changed}
    with pytest.raises(error, match=message):
        tl.compare(folder="run", **arguments)
    assert state(data) == before
    assert not list(tmp_path.iterdir())


def spoil(table, what):
    """A section with one thing wrong."""
    if what == "nan":
        table.X.data[0] = np.nan
    elif what == "negative":
        table.X.data[0] = -1
    elif what == "no embedding":
        del table.obsm["X_colors"]
    elif what == "no coordinates":
        del table.obsm["spatial"]
    elif what == "other embedding":
        table.uns["stgen"]["X_colors"]["patch_um"] = 50.0
    elif what == "duplicate":
        table.var_names = ["EPCAM", *table.var_names[:-1]]
    elif what == "empty":
        return table[:0].copy()
    elif what == "prediction":
        table.uns["stgen"]["p"] = {"values_in": "X"}
    elif what == "lacks a gene":
        return table[:, table.var_names != "EPCAM"].copy()
    return table


SPOILED = {
    "nan": (ValueError, "NaN"),
    "negative": (ValueError, "negative"),
    "no embedding": (KeyError, "pp.embed"),
    "no coordinates": (KeyError, "coordinates"),
    "other embedding": (ValueError, "patch_um is 50.0, not 60.0"),
    "duplicate": (ValueError, "more than once"),
    "empty": (ValueError, "empty"),
    "prediction": (ValueError, "prediction in X"),
    "lacks a gene": (KeyError, "EPCAM"),
}


@pytest.mark.parametrize("name", ["B", "C"])
@pytest.mark.parametrize("what", SPOILED)
def test_bad_sections_are_named_before_any_work(data, tmp_path, what, name):
    error, message = SPOILED[what]
    data[name] = spoil(data[name], what)
    before = state(data)
    with pytest.raises(error, match=f"section .*{name}.*{message}"):
        tl.compare(["LinearProbe"], data, folder=tmp_path / "run", **SPLIT, **{**FAST, "genes": ["EPCAM", "COL1A1"]})
    assert state(data) == before
    assert not (tmp_path / "run").exists()


def test_what_only_training_needs_is_asked_of_training_only(data, tmp_path):
    genes = {**FAST, "genes": ["EPCAM", "COL1A1"]}
    data["C"].X = np.where(data["C"].var_names == "EPCAM", 0, data["C"].X.toarray())
    few = {**data, "C": data["C"][:8].copy()}
    assert np.isfinite(tl.compare(["LinearProbe"], few, folder=tmp_path / "run", **SPLIT, **genes)["PCC"]).all()
    for table, message in ((data["C"], "constant.*EPCAM"), (few["C"], "too few locations.*8 found")):
        with pytest.raises(ValueError, match=message):
            tl.compare(["LinearProbe"], {"A": table, "C": data["A"]}, folder=tmp_path / "other", **SPLIT, **genes)
    assert not (tmp_path / "other").exists()


def test_section_that_is_trained_on_is_no_test(data, tmp_path):
    data["C"] = data["A"].copy()
    with pytest.raises(ValueError, match="'C' holds the same counts as 'A'"):
        tl.compare(["LinearProbe"], data, folder=tmp_path / "run", **SPLIT, **FAST)
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_something_else_are_left_alone(done, sections, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="something else"):
            tl.compare(["TrainingMean"], sections, folder=folder, **SPLIT, **FAST)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "comparison.json").write_text('{"models": {}}')
    with pytest.raises(ValueError, match="lacks data, embedding.*not written by"):
        tl.compare(tmp_path / "other", sections, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_repetition_takes_everything_from_the_folder(done, sections, tmp_path):
    with pytest.raises(ValueError, match="leave seeds, test out|leave test, seeds out"):
        tl.compare(done[0], sections, folder=tmp_path / "new", test="C", seeds=(0, 1))
    for data, message in (
        ({name: sections[name] for name in "AC"}, "there is no 'B'"),
        ({**sections, "D": sections["A"]}, "'A', 'B', 'C' only"),
    ):
        with pytest.raises(KeyError, match=message):
            tl.compare(done[0], data, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
