"""What models and results say of themselves."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from stgen import models, pl
from stgen.data import SpotData
from stgen.pp import AlignmentReport
from stgen.tl.evaluation.scores import score


@pytest.fixture
def fitted() -> models.Stem:
    rng = np.random.default_rng(0)
    data = SpotData(rng.normal(size=(32, 2)), rng.normal(size=(32, 3)))
    model = models.Stem(["EPCAM", "CD3E"], embedding_dim=3, transform="none", width=16, depth=1, heads=2)
    history = model.fit(data, data, steps=4, evaluate_every=2, progress=False)
    model.record = {"sections": ["a", "b"], "n_locations": 1032, "history": history, "version": "0.1.0"}
    return model


def test_repr_is_a_line(fitted):
    n = sum(weights.numel() for weights in fitted.parameters())
    assert repr(fitted) == f"Stem(2 genes, fitted on 2 sections, 1,032 locations, {n:,} weights)"
    assert repr(models.TrainingMean(["A"], embedding_dim=3)) == "TrainingMean(1 gene, not fitted)"
    assert "Stem(2 genes" in repr(nn.Sequential(fitted))


def test_html_holds_the_facts_and_is_escaped(fitted):
    html = fitted._repr_html_()
    for part in ("Stem", "2 sections", "4 steps", "validation loss"):
        assert part in html
    model = models.TrainingMean(["<b>"], embedding_dim=3)
    assert "&lt;b&gt;" in model._repr_html_()
    assert "<b><" not in model._repr_html_()


def test_card_is_saved_and_does_not_change_what_is_loaded(fitted, tmp_path):
    folder = fitted.save(tmp_path / "model")
    card = (folder / "README.md").read_text(encoding="utf-8")
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert header.splitlines()[0] == "library_name: stgen"
    for expected in (
        "2 sections",
        "`EPCAM`, `CD3E`",
        fitted.weights_sha256(),
        "tl.predict_expression",
        "None were recorded",
    ):
        assert expected in body
    assert models.load(folder).weights_sha256() == fitted.weights_sha256()
    (folder / "README.md").unlink()
    assert models.load(folder).record == fitted.record  # nothing is read from it


def test_card_holds_scores_and_a_card_by_hand_stays(fitted, tmp_path):
    fitted.record["scores"] = {"Stem": {"PCC": 0.41234, "RVD": 0.1}, "LinearProbe": {"PCC": 0.4}}
    folder = fitted.save(tmp_path / "model")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| | PCC | RVD |\n| --- | ---: | ---: |\n| Stem | 0.4123 | 0.1 |\n| LinearProbe | 0.4 |  |" in card
    fitted.save(folder)
    (folder / "README.md").write_text("By hand.")
    fitted.save(folder)
    assert (folder / "README.md").read_text() == "By hand."


def test_scores_and_alignment_have_html():
    truth = np.random.default_rng(0).normal(size=(20, 12))
    scores = score(truth + 1, truth, [f"<gene {i}>" for i in range(12)])
    html = scores._repr_html_()
    assert html.count("<tr>") == 1 + len(scores.summary) + 1 + 10
    assert "&lt;gene 0&gt;" in html
    assert "2 more genes" in html
    report = AlignmentReport(3, 1.0, 0.5, 0.1, 0.3, 0.25, (100.0, 50.0), 10.0, ("a < b",))
    assert "a &lt; b" in report._repr_html_()
    assert "50 %" in report._repr_html_()


def test_scores_alone_are_drawn():
    truth = np.random.default_rng(0).normal(size=(20, 3))
    ax = pl.scores(score(truth + 1, truth, ["A", "B", "C"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["prediction"]
    np.testing.assert_allclose(ax.collections[0].get_offsets()[:, 0], 1)
