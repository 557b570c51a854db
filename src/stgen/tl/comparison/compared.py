"""A prediction beside its truth, gene by gene, whether they are layers of a table or maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from stgen import metrics
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import get_map, map_counts_checked
from stgen._spatial.section import get_table
from stgen._spatial.tables import expression
from stgen.tl.evaluation.maps import MapPair, MapScale, map_correlation
from stgen.transforms import TransformName, transform_counts, unit

__all__ = ["Compared", "MapsCompared", "TableCompared", "Values", "find_compared", "known_genes"]


class Values(NamedTuple):
    """What was predicted, what is true, and the samples of the prediction, on one scale."""

    prediction: np.ndarray
    """Shape ``(n,)``."""
    truth: np.ndarray | None
    """Shape ``(n,)``; None where no truth was named."""
    samples: np.ndarray | None
    """Shape ``(S, n)``; None where none were kept."""

    @property
    def known_truth(self) -> np.ndarray:
        """The truth, where :func:`find_compared` was told to ``need`` it."""
        if self.truth is None:
            raise ValueError("no truth was named.")
        return self.truth

    @property
    def kept_samples(self) -> np.ndarray:
        """The samples, where :func:`find_compared` was told to ``need`` them."""
        if self.samples is None:
            raise ValueError("no samples were kept.")
        return self.samples


def find_compared(
    data: SpatialData | AnnData,
    key: str,
    *,
    truth_key: str | None = None,
    genes: str | Sequence[str] | None = None,
    transform: TransformName | None = None,
    table_key: str | None = None,
    need: Sequence[Literal["truth", "samples"]] = (),
) -> Compared:
    """A prediction and its truth, with every check that must come before any work.

    Parameters
    ----------
    data
        Object with maps, or with a table.
    key
        A map of a SpatialData, or else a layer of its table; ``"X"`` for ``X``.
    truth_key
        The truth: a map on the same grid; or a layer, or ``"X"``. Results of ``tl.predict_expression`` have one without
        being told: the counts beside them.
    genes
        Genes to take, in this order; None for all that prediction and truth share.
    transform
        Scale to which counts are brought: ``"log1p_raw"`` by default for maps, ``"log1p_norm"`` for tables. Results of
        ``tl.predict_expression`` are on their own.
    table_key
        Table of a SpatialData, where there are several.
    need
        What must be there.

    Raises
    ------
    KeyError
        If the result, the truth, what is needed or a gene does not exist.
    ValueError
        If maps are on different grids, counts are no counts, or the transform does not fit.
    """
    is_map = isinstance(data, SpatialData) and table_key is None and key in data.images
    found: Compared
    if is_map:
        found = MapsCompared.find(data, key, truth_key, transform or "log1p_raw")
    else:
        found = TableCompared.find(get_table(data, table_key=table_key), key, truth_key, transform)
    kind, function = ("map", "superresolve") if is_map else ("layer", "predict_expression")
    if "truth" in need and not found.has_truth:
        raise KeyError(f"no truth to compare {key!r} with was named: pass truth_key=<{kind} of true counts>.")
    if "samples" in need and found.n_samples < 2:
        raise KeyError(
            f"no samples of {key!r} were kept; stgen.tl.{function}(..., keep_samples=True) keeps those of models that "
            "sample."
        )
    return found if genes is None else replace(found, genes=known_genes(found.genes, genes, key))


def known_genes(there: list[str], genes: str | Sequence[str], key: str) -> list[str]:
    """The genes, each once, if all of them are there."""
    genes = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    missing = [gene for gene in genes if gene not in there]
    if missing or not genes:
        raise KeyError(
            f"{len(missing)} of {len(genes)} genes are not in {key!r} (and its truth): "
            f"{', '.join(missing[:5]) or 'none named'}; found "
            f"{', '.join(there[:5])}{', ...' if len(there) > 5 else ''} ({len(there)} in all)."
        )
    return genes


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableCompared:
    """Layers of a table; a location is a row."""

    table: AnnData
    key: str
    truth_key: str | None
    genes: list[str]
    transform: TransformName
    is_result: bool
    """Whether the prediction is one of ``tl.predict_expression``, which is on the scale already."""

    @classmethod
    def find(cls, table: AnnData, key: str, truth_key: str | None, transform: TransformName | None) -> TableCompared:
        """Layers of a table, all of their genes."""
        entry = table.uns.get("stgen", {}).get(key, {})
        is_result = entry.get("function") == "tl.predict_expression"
        alone = is_result and entry.get("values_in") == "X"  # no counts beside it
        for name in (None if alone else key, truth_key):
            if name is not None and name != "X" and name not in table.layers:
                raise KeyError(
                    f"`keys` or `truth_key`: there is no layer {name!r} in the table, and no map of this name; its "
                    f"layers are {', '.join(map(repr, table.layers)) or 'none'}. Pass a layer's name, 'X', or "
                    "table_key=."
                )
        if is_result and transform not in (None, entry["transform"]):
            raise ValueError(f"the prediction {key!r} is on the scale {entry['transform']!r}; leave `transform` out.")
        transform = entry["transform"] if is_result else transform or "log1p_norm"
        unit(transform)
        genes = list(table.var_names)
        if is_result and not alone:
            truth_key = truth_key or entry.get("layer") or "X"
            genes = list(table.var_names[np.asarray(table.var[key], dtype=bool)])
        return cls(table, key, truth_key, genes, transform, is_result)

    @property
    def has_truth(self) -> bool:
        """Whether a truth was named."""
        return self.truth_key is not None

    @property
    def unit(self) -> str:
        """Unit of all values, in words."""
        return unit(self.transform)

    @property
    def n_samples(self) -> int:
        """How many samples were kept."""
        return self.table.obsm[f"{self.key}_samples"].shape[1] if f"{self.key}_samples" in self.table.obsm else 0

    def all(self) -> Values:
        """Everything: prediction and truth ``(n, G)``, samples ``(S, n, G)``."""
        if self.is_result:
            columns = self.table.var_names.get_indexer(self.genes)
            stored = self.table.layers[self.key] if self.key in self.table.layers else self.table.X
            prediction = np.asarray(stored)[:, columns].astype(np.float64)
        else:
            prediction = self._counts(self.key)
        truth = None if self.truth_key is None else self._counts(self.truth_key)
        return Values(prediction, truth, self._samples() if self.n_samples else None)

    def each(self) -> Iterator[tuple[str, Values]]:
        """Gene after gene, and its values over all locations."""
        prediction, truth, samples = self.all()
        for g, gene in enumerate(self.genes):
            yield (
                gene,
                Values(
                    prediction[:, g],
                    None if truth is None else truth[:, g],
                    None if samples is None else samples[:, :, g],
                ),
            )

    def at(self, location: str | int | tuple[int, int]) -> Values:
        """The values of all genes at a row, given by its name or number: ``(G,)``, samples ``(S, G)``."""
        if isinstance(location, tuple):
            raise KeyError(f"there is no row {location}; rows have a name, or a number.")
        if isinstance(location, str) and location not in self.table.obs_names:
            raise KeyError(f"there is no row {location!r}; rows are {', '.join(self.table.obs_names[:3])}, ...")
        row = self.table.obs_names.get_loc(location) if isinstance(location, str) else location
        if not -self.table.n_obs <= row < self.table.n_obs:
            raise KeyError(f"there is no row {row}; the table has {self.table.n_obs}.")
        prediction, truth, samples = self.all()
        return Values(
            prediction[row], None if truth is None else truth[row], None if samples is None else samples[:, row]
        )

    def correlations(self) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Gene-gene correlation of every sample, or of the prediction where there are none, and of the truth."""
        prediction, truth, samples = self.all()
        drawn = prediction[None] if samples is None else samples
        return [metrics.gene_correlation(x) for x in drawn], None if truth is None else metrics.gene_correlation(truth)

    def _counts(self, name: str) -> np.ndarray:
        layer = name if name in self.table.layers else None
        if self.is_result:
            return expression(self.table, self.genes, self.transform, layer=layer).astype(np.float64)
        counts = get_counts(self.table, layer=layer, dense=False)
        of_genes = counts[:, self.table.var_names.get_indexer(self.genes)].toarray()
        return transform_counts(of_genes, np.asarray(counts.sum(1)).ravel(), self.transform).astype(np.float64)

    def _samples(self) -> np.ndarray:
        order = self.table.uns["stgen"][self.key]["sample_genes"].split("\n")
        kept = np.asarray(self.table.obsm[f"{self.key}_samples"], dtype=np.float64)
        return np.moveaxis(kept[:, :, [order.index(gene) for gene in self.genes]], 1, 0)


# ---- maps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapsCompared:
    """Maps on one grid; a location is a bin that is known in both, and a gene is read when it is asked for."""

    maps: MapPair
    has_truth: bool
    genes: list[str]
    scale: MapScale

    @classmethod
    def find(cls, sdata: SpatialData, key: str, truth_key: str | None, transform: TransformName) -> MapsCompared:
        """Maps and all genes that they share."""
        if truth_key is not None and truth_key not in sdata.images:
            raise KeyError(f"there is no map {truth_key!r}; sdata.images has {', '.join(map(repr, sdata.images))}.")
        maps = MapPair.find(sdata, key, truth_key or key, None)
        return cls(maps, truth_key is not None, maps.genes, MapScale.checked(transform, None, maps.genes))

    @property
    def unit(self) -> str:
        """Unit of all values, in words."""
        return unit(self.scale.transform)

    @property
    def n_samples(self) -> int:
        """How many samples were kept."""
        return self.maps.n_samples

    def each(self) -> Iterator[tuple[str, Values]]:
        """Gene after gene, and its values over the bins where it is known, if there are any."""
        for gene in self.genes:
            prediction, truth, samples = self.maps.read(gene, self.scale)
            known = np.isfinite(prediction) & np.isfinite(truth)
            if not known.any():
                continue
            yield (
                gene,
                Values(
                    prediction[known],
                    truth[known] if self.has_truth else None,
                    None if samples is None else samples[:, known],
                ),
            )

    def at(self, location: str | int | tuple[int, int]) -> Values:
        """The values of all genes in a bin, given by its row and column: ``(G,)``, samples ``(S, G)``."""
        if isinstance(location, str | int):
            raise KeyError(f"there is no bin {location!r}; bins are given by row and column, such as (0, 0).")
        height, width = get_map(self.maps.sdata, self.maps.key).shape[1:]
        y, x = location
        if not (0 <= y < height and 0 <= x < width):
            raise KeyError(f"there is no bin {location}; the map has {height} x {width} (rows x columns).")
        prediction = self._bin(self.maps.key, self.genes, y, x)
        truth = self._bin(self.maps.truth_key, self.genes, y, x) if self.has_truth else None
        samples = None
        if self.n_samples:
            channels = [f"{gene}:{i}" for i in range(self.n_samples) for gene in self.genes]
            samples = self._bin(f"{self.maps.key}_samples", channels, y, x).reshape(self.n_samples, -1)
        return Values(prediction, truth, samples)

    def _bin(self, key: str, channels: list[str], y: int, x: int) -> np.ndarray:
        counts = map_counts_checked(get_map(self.maps.sdata, key, channels)[:, y, x].data, f"The map {key!r}")
        return np.array([self.scale(value, gene) for value, gene in zip(counts, channels, strict=True)]).ravel()

    def correlations(self) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Gene-gene correlation of every sample, or of the prediction where there are none, and of the truth.

        Over the bins where every gene is known, gathered by windows.
        """
        known = np.ones(get_map(self.maps.sdata, self.maps.key).shape[1:], bool)
        for gene in self.genes:
            prediction, truth, _ = replace(self.maps, n_samples=0).read(gene, self.scale)
            known &= np.isfinite(prediction) & np.isfinite(truth)
        if known.sum() < 2:
            raise ValueError(
                f"there are no two bins in which all {len(self.genes)} genes are known; name fewer genes=."
            )
        drawn = [map_correlation(stack, self.genes, known, self.scale) for stack in self.maps.single(self.genes)]
        if not self.has_truth:
            return drawn, None
        true = get_map(self.maps.sdata, self.maps.truth_key, self.genes)
        return drawn, map_correlation(true, self.genes, known, self.scale)


Compared = TableCompared | MapsCompared
