"""Which cell type is where, from marker genes or a labeled reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import softmax
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, TableModel
from spatialdata.transformations import Identity, get_transformation

from stgen._checks import check_types
from stgen._spatial.counts import get_counts
from stgen._spatial.records import check_new_key, copied_table, provenance, record, shallow_copy, write_image
from stgen._spatial.section import get_table
from stgen.tl.cells.locations import Locations, locations_of
from stgen.transforms import transform_counts

__all__ = ["localize_cell_types"]

logger = logging.getLogger("stgen")

FUNCTION = "tl.localize_cell_types"
CHUNK = 512  # bins along a side of the labels' chunks
PSEUDOCOUNT = 1.0  # per gene and type, so that no gene rules out a type
UNITS = {"": "probability", "_frequency": "share of the samples", "_label": "number of the type"}

Slices = tuple[slice, ...]
Part = tuple[Slices, np.ndarray, np.ndarray]
"""Where some locations are, the evidence for each type ``(types, ...)``, and the counts in all ``(...)``, NaN if unknown."""


@check_types
def localize_cell_types(
    data: SpatialData | AnnData,
    *,
    markers: Mapping[str, Sequence[str]] | None = None,
    reference: AnnData | None = None,
    labels_column: str | None = None,
    reference_layer: str | None = None,
    prior: Literal["uniform", "reference"] = "uniform",
    map_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    temperature: float = 1.0,
    key_added: str = "cell_types",
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    r"""Tell the cell type of each bin, spot or cell, and how sure samples are of it.

    Each location is compared with every type as a whole: what holds cells of several types gets the one that explains
    it best alone, with a probability that says so. It is no deconvolution.

    Parameters
    ----------
    data
        Object with a map of expected counts, or with a table of spots or cells.
    markers
        Marker genes of each type, ``{type: [genes]}``. Markers that were not measured are left out, and named in the
        log.
    reference
        Or else: cells or spots of known type, with counts. All genes that it shares with ``data`` are used.
    labels_column
        Column of ``reference.obs`` with the types; rows without one are left out.
    reference_layer
        Layer of ``reference`` with the counts; None for ``X``.
    prior
        How frequent types are before anything is seen, with a reference: all alike, or as in the reference.
    map_key
        A map in ``sdata.images``, counts per bin, ``(c, y, x)``: from :func:`stgen.tl.superresolve`,
        :func:`stgen.pp.rasterize`, or your own.
    table_key
        Or else: a table of a SpatialData; None if there is one.
    layer
        Layer of the table with counts, or a prediction of :func:`stgen.tl.predict_expression`; None for ``X``.
    temperature
        By what evidence is divided before it becomes probabilities. More than 1 makes them more even, and changes no
        assigned type but for the weight of a prior.
    key_added
        Name of the result.
    overwrite
        Whether an earlier result of this function may be replaced.
    copy
        Return a copy with the result and leave ``data`` alone.

    Returns
    -------
    ``None``, or the copy. Of a map is written, NaN (or 0) where one of the genes is NaN:

    - ``sdata.images[key_added]``: probability of each type, float32 ``(types, y, x)``, channels named after types, on
      the bins of the map
    - ``sdata.labels[f"{key_added}_label"]``: number of the most probable type, from 1 in the order of the channels; 0
      where there is none, uint16 ``(y, x)``
    - ``sdata.images[f"{key_added}_frequency"]``: share of the samples of which each type is the most probable, where
      two or more samples were kept (``keep_samples=True``); like the probability

    Of a table:

    - ``obsm[key_added]``: probability, DataFrame ``(n_obs, types)``
    - ``obs[f"{key_added}_label"]``: the most probable type, categorical; missing where none of the genes was counted
    - ``obsm[f"{key_added}_frequency"]``: as above, DataFrame, where the samples of a prediction were kept, or those of
      the map that :func:`stgen.tl.aggregate_cells` summed into the table are still there: they are summed again, one by
      one

    Where none of the genes was counted, probabilities are those of the prior (uniform for markers), and there is no
    label.

    The record, under ``key_added`` (and the names of the other elements) in ``sdata.attrs["stgen"]`` or
    ``uns["stgen"]``, holds ``"types"`` (a name per line), ``"method"``, ``"map_key"`` or ``"layer"``, ``"genes"``,
    ``"labels_column"``, ``"prior"``, ``"temperature"``, ``"unit"``, ``"n_samples"``, ``"function"``, ``"version"``.

    Raises
    ------
    KeyError
        If a map, table, layer, or column does not exist, or a type has no marker that was measured.
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If not one of ``markers`` and ``reference`` is given, there are fewer than two types, too few genes are shared,
        values are not counts, or a key exists.

    Notes
    -----
    **Reference**: multinomial naive Bayes. With counts :math:`x_g`, the profile :math:`p_{tg}` (share of gene g in the
    counts of all reference cells of type t, one count added per gene), the prior :math:`\pi_t` and the temperature
    :math:`T`,

    .. math:: P(t \mid x) \propto \pi_t \exp\Big(\tfrac{1}{T} \sum_g x_g \log p_{tg}\Big).

    Only the shares of genes matter for the type, not the depth of a location; the depth makes it more certain. Genes
    are taken as independent, so the probabilities of locations with many counts are too certain; samples are not, if
    they are calibrated. A prediction on the scale of counts per 10,000 is taken as that many counts, the more so: raise
    the temperature.

    **Markers**: counts become ``log1p(counts per 10,000)`` of the location, and each marker is standardized over all
    locations (of the same sample). A type's score is the mean over its markers, and probabilities are the softmax of
    scores divided by
    :math:`T`.

    With samples, the same is done with each of them on its own. A map is read window by window, some genes at a time,
    and never held as a whole; the result, a channel per type, is.

    Examples
    --------
    >>> from stgen import datasets, pp, tl
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> pp.rasterize(sdata, points_key="transcripts", bin_um=20)
    >>> tl.localize_cell_types(sdata, map_key="counts", reference=sdata["cell_counts"], labels_column="cell_type")
    >>> sdata["cell_types"].sizes["c"], sdata["cell_types_label"].shape == sdata["counts"].shape[1:]
    (9, True)
    >>> tl.localize_cell_types(sdata["cell_counts"], markers={"T cell": ["CD3E", "CD3D"], "fat": ["PLIN1", "LPL"]})
    >>> sdata["cell_counts"].obs["cell_types_label"].cat.categories.to_list()
    ['T cell', 'fat']
    """
    expression = locations_of(data, map_key, table_key, layer)
    if (markers is None) == (reference is None):
        raise ValueError(
            "say what types look like: either markers={type: [genes]} or reference=<AnnData of known types>."
        )
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 < temperature < np.inf:
        raise ValueError(f"`temperature` must be a positive number, found {temperature!r}.")
    for name, value in (("labels_column", labels_column), ("reference_layer", reference_layer)):
        if reference is None and value is not None:
            raise ValueError(f"`{name}` is of a reference, and there is none: leave it out, or pass reference=.")
    if reference is None:
        method: _Markers | _Profiles = _Markers.of(markers, expression.genes)
    else:
        method = _Profiles.of(reference, labels_column, reference_layer, prior, expression.genes)
        expression = expression.of(method.genes)
    target = _Target.checked(data, map_key, table_key, key_added, overwrite=overwrite)

    probability, label = _classify(method, expression, temperature)
    frequency, n_samples = None, expression.n_samples
    if n_samples > 1:
        frequency = np.zeros_like(probability)
        for sample in expression.samples():
            of_sample = _classify(method, sample, temperature)[1]
            for number, total in enumerate(frequency, 1):
                total += of_sample == number
        frequency = np.where(np.isnan(probability), np.nan, frequency / n_samples).astype(np.float32)
    entry = provenance(
        FUNCTION, method="markers" if reference is None else "reference", types="\n".join(method.types),
        map_key=map_key, layer=layer, genes=method.genes, labels_column=labels_column,
        prior=None if reference is None else prior, temperature=float(temperature), unit=UNITS[""],
        n_samples=n_samples if n_samples > 1 else None,
    )  # fmt: skip
    where, data = target.write(method.types, probability, label, frequency, entry, copy=copy)
    logger.info(
        "Told %d types apart by %d genes in %d of %d locations: %s.",
        len(method.types), len(method.genes), np.count_nonzero(label), np.isfinite(probability[0]).sum(), where,
    )  # fmt: skip
    return data if copy else None


def _classify(method: _Markers | _Profiles, expression: Locations, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Probability ``(types, ...)`` and the number of the most probable type ``(...)``, 0 for none, over the locations."""
    probability = np.empty((len(method.types), *expression.shape), np.float32)
    label = np.zeros(expression.shape, np.uint16)
    for at, evidence, total in method.evidence(expression):
        prior = np.broadcast_to(method.log_prior, len(evidence)).reshape(-1, *[1] * total.ndim)
        found = softmax(prior + evidence / temperature, axis=0)  # NaN where something is not known
        probability[:, *at] = found
        label[at] = np.where(total > 0, found.argmax(0) + 1, 0)
    return probability, label


# ---- what types look like --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Profiles:
    """Types as the share of each gene in their counts."""

    types: list[str]
    genes: list[str]
    log_profile: np.ndarray
    """``(types, genes)``."""
    log_prior: np.ndarray
    """``(types,)``."""

    @classmethod
    def of(
        cls, reference: AnnData, labels_column: str | None, layer: str | None, prior: str, measured: Sequence[str]
    ) -> _Profiles:
        """The types of a reference, over the genes that it shares with what was measured."""
        if not isinstance(reference, AnnData):
            raise TypeError(f"`reference` must be an AnnData, found {type(reference).__name__}.")
        if labels_column not in reference.obs:
            raise KeyError(
                f"the types of the reference are in no column {labels_column!r} of its obs; pass labels_column=<one of "
                f"{_named(reference.obs.columns)}>."
            )
        label = reference.obs[labels_column].astype("category").cat.remove_unused_categories().cat
        types, code = [str(name) for name in label.categories], label.codes.to_numpy()
        if len(set(types)) < max(2, len(types)):
            raise ValueError(
                f"obs[{labels_column!r}] of the reference must name at least two types, each once; found "
                f"{_named(types)}."
            )
        known = set(reference.var_names)
        genes = [gene for gene in measured if gene in known]
        if len(genes) < 2:
            raise ValueError(
                f"the reference shares {len(genes)} genes with the data, and at least two are needed; its genes look "
                f"like {_named(reference.var_names[:3])}, those of the data like {_named(measured[:3])}. Bring both to "
                "one naming."
            )
        counts = get_counts(reference, genes=genes, layer=layer, dense=False)
        rows = np.flatnonzero(code >= 0)
        member = sparse.csr_array((np.ones(len(rows)), (code[rows], rows)), shape=(len(types), len(code)))
        summed = np.asarray((member @ counts).todense(), dtype=np.float64)
        empty = [name for name, total in zip(types, summed.sum(1), strict=True) if total == 0]
        if empty:
            raise ValueError(
                f"the reference has no counts of the shared genes for {_named(empty)}; leave these rows out."
            )
        profile = summed + PSEUDOCOUNT
        frequency = np.bincount(code[rows], minlength=len(types)) / len(rows)
        log_prior = np.log(frequency) if prior == "reference" else np.full(len(types), -np.log(len(types)))
        return cls(types, genes, np.log(profile / profile.sum(1, keepdims=True)), log_prior)

    def evidence(self, expression: Locations) -> Iterator[Part]:
        """The log-likelihood, but for what is the same for all types."""
        weight = self.log_profile - self.log_profile.mean(0)  # small numbers, for the sake of precision
        for window in expression.windows():
            score, total = np.zeros((len(self.types), *window.shape)), np.zeros(window.shape)

            def see(genes: slice, counts: np.ndarray, score=score, total=total) -> None:
                score += np.tensordot(weight[:, genes], counts, 1)
                total += counts.sum(0, dtype=np.float64)

            window.each(see)
            yield window.at, score, total


@dataclass(frozen=True)
class _Markers:
    """Types as sets of genes that they express more than others."""

    types: list[str]
    genes: list[str]
    """The markers of all types."""
    weight: np.ndarray
    """``(types, markers)``: one over the number of its markers for those of a type."""

    @property
    def log_prior(self) -> float:
        return 0.0

    @classmethod
    def of(cls, markers: Mapping[str, Sequence[str]], measured: Sequence[str]) -> _Markers:
        """The types of a mapping, by those of their markers that were measured."""
        if not isinstance(markers, Mapping) or any(isinstance(genes, str) for genes in markers.values()):
            raise TypeError(f"`markers` must be {{type: [genes]}}, found {markers!r}.")
        types = [str(name) for name in markers]
        if len(set(types)) < max(2, len(types)):
            raise ValueError(f"`markers` must name at least two types, each once; found {_named(types)}.")
        known = set(measured)
        found = {name: [g for g in dict.fromkeys(genes) if g in known] for name, genes in markers.items()}
        without = [name for name, genes in found.items() if not genes]
        if without:
            raise KeyError(
                f"no marker of {_named(without)} was measured (such as {_named(list(markers[without[0]])[:3])}); the "
                f"genes look like {_named(measured[:3])}. Name others, or leave the type out."
            )
        missing = [gene for genes in markers.values() for gene in genes if gene not in known]
        if missing:
            logger.warning("%d markers were not measured and are left out: %s.", len(missing), _named(missing))
        genes = [gene for gene in measured if any(gene in of_type for of_type in found.values())]
        weight = np.array([[(gene in of_type) / len(of_type) for gene in genes] for of_type in found.values()])
        return cls(types, genes, weight)

    def evidence(self, expression: Locations) -> Iterator[Part]:
        """The mean of a type's standardized markers."""
        total = np.zeros(expression.shape)
        for window in expression.windows():

            def add(_: slice, counts: np.ndarray, here=total[window.at]) -> None:
                here += counts.sum(0, dtype=np.float64)

            window.each(add)

        markers = expression.of(self.genes)
        sums, squares = np.zeros((2, len(self.genes)))
        for window in markers.windows():

            def gather(genes: slice, counts: np.ndarray, here=total[window.at]) -> None:
                values = _scaled(counts, here)[:, here > 0]
                sums[genes] += values.sum(1)
                squares[genes] += np.square(values).sum(1)

            window.each(gather)
        mean = sums / max((total > 0).sum(), 1)
        spread = np.sqrt(np.maximum(squares / max((total > 0).sum(), 1) - mean**2, 0))
        weight = self.weight * np.divide(
            1, spread, out=np.zeros_like(spread), where=spread > 1e-6
        )  # what never varies says nothing

        for window in markers.windows():
            here = total[window.at]
            score = np.zeros((len(self.types), *window.shape))

            def see(genes: slice, counts: np.ndarray, score=score, here=here) -> None:
                centered = _scaled(counts, here) - mean[genes].reshape(-1, *[1] * here.ndim)
                score += np.tensordot(weight[:, genes], centered, 1)

            window.each(see)
            score[:, here == 0] = 0
            score[:, np.isnan(here)] = np.nan
            yield window.at, score, here


def _scaled(counts: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``log1p(counts per 10,000)``, float64 ``(k, ...)``."""
    rows = transform_counts(counts.reshape(len(counts), -1).T, total.ravel(), "log1p_norm")
    return rows.T.reshape(counts.shape).astype(np.float64)


# ---- result ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where the result goes."""

    data: SpatialData | AnnData
    map_key: str | None
    table_key: str | None
    key: str

    @classmethod
    def checked(
        cls, data: SpatialData | AnnData, map_key: str | None, table_key: str | None, key: str, *, overwrite: bool
    ) -> _Target:
        """Refuse keys that exist, unless they are an earlier result that may be replaced, and names that cannot be stored."""
        names = key, f"{key}_frequency", f"{key}_label"
        if map_key is None:
            table = get_table(data, table_key=table_key)
            slots = zip((table.obsm, table.obsm, table.obs), ("obsm", "obsm", "obs"), names, strict=True)
            made, others = table.uns, {}
        else:
            kinds = "images", "images", "labels"
            slots = zip(
                (getattr(data, kind) for kind in kinds), (f"sdata.{kind}" for kind in kinds), names, strict=True
            )
            made, others = data.attrs, {name.lower(): name for _, name, _ in data.gen_elements()}
        entry = made.get("stgen", {}).get(key)
        ours = entry is not None and entry.get("function") == FUNCTION
        for container, what, name in slots:
            check_new_key(container, name, overwrite=overwrite, what=what)
            record_of_another = name == key and entry is not None
            taken = name if (name in container or record_of_another) and not ours else None
            if name not in container:
                taken = others.get(name.lower(), taken)
            if taken is not None:
                raise ValueError(
                    f"{taken!r} is there and not a result of {FUNCTION}, so it is not replaced; pass another "
                    "key_added=."
                )
        trial = SpatialData()  # refuses names that cannot be stored
        if map_key is None:
            trial["trial"] = TableModel.parse(
                AnnData(np.zeros((1, 1)), obs=pd.DataFrame({names[2]: ["a"]}, index=["0"]))
            )
        else:
            write_image(trial, key, np.zeros((1, 1, 1)), channels=["x"], transformations={"global": Identity()})
        return cls(data, map_key, table_key, key)

    def write(
        self,
        types: list[str],
        probability: np.ndarray,
        label: np.ndarray,
        frequency: np.ndarray | None,
        entry: dict[str, Any],
        *,
        copy: bool,
    ) -> tuple[str, SpatialData | AnnData]:
        """Put the finished result into the object, or into a copy; say where it is, and return the object."""
        data = self.data
        if copy:
            data = shallow_copy(data) if isinstance(data, SpatialData) else copied_table(data)
        results = {"": probability} | ({} if frequency is None else {"_frequency": frequency})
        if self.map_key is None:
            table = get_table(data, table_key=self.table_key)
            table.obsm.pop(f"{self.key}_frequency", None)  # of an earlier result
            for suffix, values in results.items():
                table.obsm[f"{self.key}{suffix}"] = pd.DataFrame(values.T, index=table.obs_names, columns=types)
            codes = pd.Categorical.from_codes(label.astype(int) - 1, categories=types)
            table.obs[f"{self.key}_label"] = codes
            record(table, self.key, entry)
            return f"obsm[{self.key!r}] and obs['{self.key}_label']", data
        transformations = get_transformation(data.images[self.map_key], get_all=True)
        data.images.pop(f"{self.key}_frequency", None)
        data.attrs["stgen"] = {k: v for k, v in data.attrs.get("stgen", {}).items() if k != f"{self.key}_frequency"}
        for suffix, values in results.items():
            write_image(
                data, f"{self.key}{suffix}", values, channels=types, transformations=transformations, overwrite=True
            )
        data.labels[f"{self.key}_label"] = Labels2DModel.parse(
            label, dims=("y", "x"), transformations=transformations, chunks=(CHUNK, CHUNK)
        )
        for suffix in (*results, "_label"):
            record(data, f"{self.key}{suffix}", {**entry, "unit": UNITS[suffix]})
        return f"images[{self.key!r}] and labels['{self.key}_label']; sdata.write(path) saves them", data


def _named(values: Sequence[Any], limit: int = 5) -> str:
    names = [str(value) for value in values]
    return (", ".join(names[:limit]) or "none") + (", ..." if len(names) > limit else "")
