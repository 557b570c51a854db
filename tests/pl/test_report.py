"""The report: what is on the page is what is in the object, and nothing is fetched."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata
from PIL import Image

from stgen import _html, models, pl, tl

GENES = ["EPCAM", "COL1A1", "CD3E", "ERBB2", "PLIN1"]


@pytest.fixture(scope="module")
def mapped(simulated):
    """With maps of the section's own spots, one gene of which is not to be trusted."""
    sdata = spatialdata.deepcopy(simulated)
    tl.superresolve(sdata, "he", GENES, low_res="spot_counts", bin_um=20, progress=False)
    sdata["superresolved_out_of_fold"].var.loc["PLIN1", "trusted"] = False
    return sdata


class Page(HTMLParser):
    """Text, tables and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well formed

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_page_holds_what_the_object_knows(mapped, tmp_path, caplog):
    before = str(mapped)
    path = pl.report(mapped, "superresolved", tmp_path / "report.html", genes=["CD3E", "PLIN1"], title="A <b> & c")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert "A <b> & c" in page.text
    assert "4 of 5 genes can be predicted between the spots" in page.text
    assert "1 of 5 genes could not be predicted" in page.text
    trusted, record, versions = page.tables[0], page.tables[1], page.tables[-1]
    var = mapped["superresolved_out_of_fold"].var.sort_values("score", ascending=False)
    assert [row[0] for row in trusted[1:]] == var.index.to_list()
    assert [row[1] for row in trusted[1:]] == np.where(var["trusted"], "yes", "no").tolist()
    assert [float(row[2]) for row in trusted[1:]] == var["score"].round(2).tolist()
    assert [float(row[-1]) for row in trusted[1:]] == np.exp(var["interval_90"]).round(2).tolist()
    assert dict(record)["low_res"] == "spot_counts"
    assert {name for name, _ in versions} >= {"stgen", "Python", "torch"}
    assert str(mapped) == before
    assert not plt.get_fignums()  # figures are closed
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_page_is_self_contained_and_its_pictures_are_whole(mapped, tmp_path):
    text = pl.report(mapped, "superresolved", tmp_path / "report.html").read_text(encoding="utf-8")
    references = Page(text).references
    assert len(references) == 2
    for reference in references:
        kind, data = reference.split(",", 1)
        assert kind == "data:image/png;base64"
        image = Image.open(BytesIO(base64.b64decode(data)))
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert not re.search(r"https?://|<script|@import|url\(", text)


def test_shown_are_the_genes_that_can_be_predicted_best(mapped, tmp_path, monkeypatch):
    drawn = []
    original = pl._report.maps
    monkeypatch.setattr(
        "stgen.pl._report.maps",
        lambda sdata, genes, **options: drawn.extend(genes) or original(sdata, genes, **options),
    )
    pl.report(mapped, "superresolved", tmp_path / "report.html")
    var = mapped["superresolved_out_of_fold"].var
    assert drawn == var[var["trusted"]].sort_values("score", ascending=False).index[:4].to_list()


def test_result_of_a_model_with_scores(simulated, tmp_path):
    from stgen import pp

    sdata = spatialdata.deepcopy(simulated)
    pp.rasterize(sdata, genes=GENES, bin_um=20)
    pp.degrade(sdata, map_key="counts", factor=5)
    model = models.Interpolate(GENES, factor=5, bin_um=20)
    tl.superresolve(sdata, model=model, low_res="counts_5x", progress=False)
    scores = tl.evaluate(sdata, key="superresolved", truth_key="counts")
    path = pl.report(sdata, "superresolved", tmp_path / "report.html", scores={"interpolated": scores})
    page = Page(path.read_text(encoding="utf-8"))
    assert "There is no spread" in page.text
    table = page.tables[0]
    assert table[0] == ["over all genes", "interpolated"]
    assert dict(table[1:])["PCC"] == f"{scores.summary['PCC']:.4g}"
    assert "'counts_5x', from which it was made" in page.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "nothing"}, KeyError, "results of stgen.tl.superresolve are superresolved"),
        ({"key": "he"}, KeyError, "no map 'he' with a record"),
        ({"genes": ["A"]}, KeyError, "genes are not in the map"),
        ({"genes": []}, ValueError, "`genes` is empty"),
        ({"genes": "EPCAM"}, TypeError, "`genes` must be a list of names"),
        ({"path": "report.pdf"}, ValueError, "must end in .html"),
        ({"path": "there.html"}, ValueError, "exists already"),
        ({"path": "no/report.html"}, FileNotFoundError, "no folder"),
        ({"scores": 3}, TypeError, "`scores` must be"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(mapped, tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    with pytest.raises(error, match=message):
        pl.report(mapped, **({"key": "superresolved", "path": "report.html"} | options))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("there.html", "mine")]


def test_text_is_escaped_and_numbers_are_short():
    assert _html.tag("td", "<a & b>", class_="x") == '<td class="x">&lt;a &amp; b&gt;</td>'
    assert _html.tag("td", _html.Markup("<i>a</i>")) == "<td><i>a</i></td>"
    assert [_html.number(v) for v in (1234567, 0.123456, float("nan"), True, None, 3.0)] == [
        "1,234,567", "0.1235", "", "True", "", "3",
    ]  # fmt: skip
