"""A result on one page, for whoever has no Python: what was done, which genes to trust, and how it looks."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stgen._checks import check_types, listed
from stgen._html import Markup, figure, mapping, page, table, tag
from stgen._spatial.counts import get_counts
from stgen._spatial.files import checked_path, whole_file
from stgen._spatial.grid import Grid, get_map
from stgen._spatial.section import annotated_region
from stgen.pl._maps import maps
from stgen.pp import check_alignment
from stgen.tl import Scores
from stgen.tl.superresolution.result import TABLE

__all__ = ["report"]

logger = logging.getLogger("stgen")

N_GENES = 4  # that are drawn, unless they are named
N_ROWS = 20  # of the table of genes that are shown at once
LIBRARIES = ("stgen", "spatialdata", "anndata", "torch", "numpy", "scipy")
COLUMNS = {
    "score": "correlation out of fold", "from_image": "from the image", "from_neighbors": "from neighbors",
    "mean_counts": "counts per spot", "interval_90": "90 % interval, factor",
}  # fmt: skip


class _Result(NamedTuple):
    """A map, and what is known of it."""

    sdata: SpatialData
    key: str
    record: Mapping[str, Any]
    image_key: str | None
    low_res: str | None
    genes: pd.DataFrame | None
    """Of each gene, what was measured out of fold; None for a result of a model."""


@check_types
def report(
    sdata: SpatialData,
    key: str,
    path: str | os.PathLike,
    *,
    genes: Sequence[str] | None = None,
    scores: Scores | Mapping[str, Scores] | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a result of :func:`stgen.tl.superresolve` as one HTML file, for colleagues who have no Python.

    The page holds, as far as they are known: what should make one careful, which genes can be trusted and how wide
    their intervals are, maps of some genes with their spread, predicted and measured counts out of fold, scores, the
    whole record of how the result was made, and versions. Pictures are in the file, which needs no network.

    Parameters
    ----------
    sdata
        Object with the result.
    key
        The result's ``key_added``.
    path
        File to write; its name ends in ``.html``.
    genes
        Genes to draw; by default the four that can be predicted best, or of a model's maps the first.
    scores
        What :func:`stgen.tl.evaluate` returned for the result, or names and scores of several to compare.
    title
        Title of the page; by default the result's name.
    overwrite
        Whether a file of this name may be replaced.

    Returns
    -------
    The path. ``sdata`` is left alone.

    Raises
    ------
    KeyError
        If there is no such result, or a gene is not in it.
    ValueError
        If the name has another ending, or the file exists.
    FileNotFoundError
        If the folder does not exist.

    Examples
    --------
    >>> from stgen import datasets, pl, tl
    >>> sdata = datasets.simulated_section(size_um=600)
    >>> genes = ["EPCAM", "COL1A1", "CD3E"]
    >>> tl.superresolve(sdata, "he", genes, low_res="spot_counts", bin_um=20, progress=False)
    >>> path = pl.report(sdata, "superresolved", "section.html", genes=["EPCAM", "COL1A1"])
    >>> path.read_text(encoding="utf-8").count("data:image/png;base64")
    2
    """
    result = _result(sdata, key)
    names = [str(name) for name in get_map(sdata, key).coords["c"].values]
    genes = _shown(result, names) if genes is None else list(genes)
    get_map(sdata, key, genes)
    if not genes:
        raise ValueError("`genes` is empty; name at least one, or leave it out.")
    path = checked_path(path, (".html", ".htm"), overwrite=overwrite)
    title = f"{key}: {len(names):,} gene maps" if title is None else title
    parts = [
        tag("h1", title),
        tag("p", _summary(result, names), class_="lead"),
        _warned(_warnings(result)),
        *_maps(result, genes),
        *_trust(result, genes),
        *_scored(scores),
        *_made(result),
    ]
    with whole_file(path) as part:
        part.write_text(page(title, *parts), encoding="utf-8")
    logger.info("Report of %r on %d genes: %s.", key, len(names), path)
    return path


def _result(sdata: SpatialData, key: str) -> _Result:
    """The result, with its record, and what it was made from as far as it is there."""
    records = sdata.attrs.get("stgen", {})
    if key not in sdata.images or key not in records:
        found = [name for name, entry in records.items() if entry.get("statistic") == "expected"]
        raise KeyError(
            f"`key`: there is no map {key!r} with a record of how it was made; results of stgen.tl.superresolve are "
            f"{listed(found)}."
        )
    record = records[key]
    image_key = record.get("image", record.get("image_key"))
    low_res = record.get("low_res")
    own = sdata.tables.get(f"{key}{TABLE}")
    return _Result(
        sdata, key, record,
        image_key=image_key if image_key in sdata.images else None,
        low_res=low_res if low_res in sdata.tables or low_res in sdata.images else None,
        genes=None if own is None or "trusted" not in own.var else own.var,
    )  # fmt: skip


def _shown(result: _Result, names: list[str]) -> list[str]:
    """The genes to draw: those that can be predicted best, if that is known."""
    if result.genes is None:
        return names[:N_GENES]
    known = result.genes.loc[[name for name in names if name in result.genes.index]]
    return list(known.sort_values(["trusted", "score"], ascending=False).index[:N_GENES])


# ---- words -----------------------------------------------------------------------------------------------------------


def _summary(result: _Result, names: list[str]) -> str:
    grid = Grid.of_map(result.sdata, result.key)
    made = result.record
    source = [f"the counts of {made['low_res']!r}"] if "low_res" in made else []
    source += [f"the image {made['image']!r}"] if made.get("image") else []
    text = (
        f"{made.get('unit', 'values').capitalize()} for {len(names):,} genes in {grid.width:,} x {grid.height:,} bins "
        f"of {grid.bin_um:.4g} µm, by {made.get('model', made.get('function', 'unknown'))}"
    )
    text += f" from {' and '.join(source)}." if source else "."
    if result.genes is not None:
        trusted = int(result.genes["trusted"].sum())
        text += f" {trusted:,} of {len(result.genes):,} genes can be predicted between the spots."
    return text


def _warnings(result: _Result) -> list[str]:
    """What should make a reader careful."""
    found = []
    if result.genes is not None:
        n_trusted, n = int(result.genes["trusted"].sum()), len(result.genes)
        if n_trusted < n:
            found.append(
                f"{n - n_trusted:,} of {n:,} genes could not be predicted from other spots: their maps follow the "
                "number of counts of all genes, and their own pattern is not to be read from them."
            )
    left_out = int(result.record.get("n_spots_left_out", 0))
    if left_out:
        found.append(f"{left_out:,} spots without counts, or off the image, were left out.")
    if result.record.get("consistency") is False and "kernels" not in result.record:
        found.append("The maps were not held to what was measured.")
    if f"{result.key}_std" not in result.sdata.images:
        found.append("There is no spread: how sure the maps are is not known.")
    if result.image_key is not None and result.low_res in result.sdata.tables:
        try:
            aligned = check_alignment(result.sdata, image_key=result.image_key, table_key=result.low_res)
            found += aligned.warnings
        except (KeyError, ValueError) as error:
            found.append(f"Whether spots and image lie on each other could not be checked: {error.args[0]}")
    return found


def _warned(warnings: list[str]) -> Markup:
    if not warnings:
        return tag("p", "Nothing to be careful about was found.", class_="fine")
    return tag("ul", *(tag("li", warning) for warning in warnings), class_="warnings")


# ---- pictures --------------------------------------------------------------------------------------------------------


def _maps(result: _Result, genes: list[str]) -> Iterator[Markup]:
    axes = maps(result.sdata, genes, keys=result.key, low_res=result.low_res, image_key=result.image_key)
    yield tag("h2", "Maps")
    caption = "What was measured, the expected map, and its spread (standard deviation), as far as they are known."
    yield _closed(axes[0, 0].figure, caption)


def _closed(drawn: Figure, caption: str) -> Markup:
    picture = figure(drawn, caption)
    plt.close(drawn)
    return picture


def _trust(result: _Result, genes: list[str]) -> Iterator[Markup]:
    """Which genes can be predicted, and how wide their intervals are."""
    if result.genes is None:
        return
    yield tag("h2", "Which genes to trust")
    yield tag(
        "p",
        "Each spot was predicted from all others. The correlation is that of what was predicted and what was measured, "
        "per gene; a gene is trusted if it is surely above 0.1. 90 % of the spots lie within the prediction times and "
        "divided by the factor (counts plus one).",
        class_="note",
    )
    ranked = result.genes.sort_values("score", ascending=False)
    yield _gene_table(ranked.iloc[:N_ROWS])
    if len(ranked) > N_ROWS:
        rest = _gene_table(ranked.iloc[N_ROWS:])
        yield tag("details", tag("summary", f"{len(ranked) - N_ROWS:,} more genes"), rest)
    drawn = _out_of_fold(result, genes)
    if drawn is not None:
        caption = (
            "Spots, predicted from all others and measured; between the lines lie 90 % of them, as the table says."
        )
        yield tag("h2", "Predicted and measured, out of fold")
        yield _closed(drawn, caption)


def _gene_table(var: pd.DataFrame) -> Markup:
    columns = [name for name in COLUMNS if name in var]
    rows = []
    for gene, row in var.iterrows():
        cells: list[object] = [tag("i", gene), "yes" if row["trusted"] else "no"]
        for name in columns:
            value = float(np.exp(row[name]) if name == "interval_90" else row[name])
            if name == "score":
                width = f"width:{60 * min(max(value, 0.0), 1.0):.0f}px" if value == value else "width:0"
                bar = tag(
                    "span", tag("span", class_="bar", style=width), class_="bars" if row["trusted"] else "bars no"
                )
                cells.append(tag("span", bar, f"{value:.2f}"))
            else:
                cells.append(round(value, 2))
        rows.append(cells)
    return table(rows, ["gene", "trusted", *(COLUMNS[name] for name in columns)])


def _out_of_fold(result: _Result, genes: list[str]) -> Figure | None:
    """Predicted and measured counts of some genes in spots; None where the counts are not there."""
    own = result.sdata.tables[f"{result.key}{TABLE}"]
    genes = [gene for gene in genes if gene in own.var_names]
    if result.low_res is None or result.low_res not in result.sdata.tables or not genes:
        return None
    measured = _measured(result, result.low_res, own, genes)
    predicted = np.asarray(own[:, genes].X, dtype=np.float64)
    drawn, axes = plt.subplots(1, len(genes), figsize=(2.9 * len(genes), 3.1), squeeze=False, layout="constrained")
    for ax, gene, x, y in zip(axes[0], genes, predicted.T, measured.T, strict=True):
        width = float(own.var.at[gene, "interval_90"])
        x, y = np.log1p(x), np.log1p(y)
        top = max(x.max(), y.max()) * 1.05 + 0.1
        ax.plot([0, top], [0, top], color="0.4", lw=1)
        for shift in (-width, width):
            ax.plot([0, top], [shift, top + shift], color="0.4", lw=1, ls="--")
        ax.scatter(x, y, s=7, alpha=0.4, linewidths=0, rasterized=True)
        ax.set(xlim=(0, top), ylim=(-0.05 * top, top), aspect="equal", xlabel="predicted, log1p(counts)")
        inside = np.mean(np.abs(x - y) <= width + 1e-6)
        ax.set_title(f"{gene}: {inside:.0%} inside", fontsize="medium")
    axes[0, 0].set_ylabel("measured, log1p(counts)")
    return drawn


def _measured(result: _Result, low_res: str, own: AnnData, genes: list[str]) -> np.ndarray:
    """Counts of the spots of the table of predictions, in its order."""
    counts = result.sdata.tables[low_res]
    of_spot = pd.Index(annotated_region(result.sdata, counts, low_res, None)[1])
    rows = of_spot.get_indexer(annotated_region(result.sdata, own, f"{result.key}{TABLE}", None)[1])
    return get_counts(counts, genes=genes, layer=result.record.get("layer"))[rows]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _scored(scores: Scores | Mapping[str, Scores] | None) -> Iterator[Markup]:
    if scores is None:
        return
    scores = {"score": scores} if isinstance(scores, Scores) else dict(scores)
    frame = pd.DataFrame({name: of.summary for name, of in scores.items()})
    yield tag("h2", "Scores")
    rows = [
        (name, *(float(f"{value:.4g}") for value in row))
        for name, row in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    yield table(rows, ["over all genes", *frame])


def _made(result: _Result) -> Iterator[Markup]:
    """The records and the versions."""
    yield tag("h2", "How it was made")
    yield mapping(result.record)
    inputs = [name for name in (result.low_res, result.image_key) if name in result.sdata.attrs.get("stgen", {})]
    for name in inputs:
        yield tag("p", f"{name!r}, from which it was made:", class_="note")
        yield mapping(result.sdata.attrs["stgen"][name])
    yield tag("h2", "Versions")
    yield mapping(_versions())
    yield tag("footer", "Written by stgen.")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "Python": platform.python_version()}
