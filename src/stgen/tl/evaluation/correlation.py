"""Which genes go together: correlation between genes, in a prediction and in the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen.metrics import pcc
from stgen.tl.comparison.compared import find_compared
from stgen.transforms import TransformName

__all__ = ["GeneCorrelation", "gene_correlation"]


@dataclass(frozen=True)
class GeneCorrelation:
    """Result of :func:`stgen.tl.gene_correlation`.

    Examples
    --------
    >>> import pandas as pd
    >>> from stgen.tl import GeneCorrelation
    >>> matrix = pd.DataFrame(
    ...     [[1.0, 0.5, 0.2], [0.5, 1.0, 0.1], [0.2, 0.1, 1.0]], index=list("ABC"), columns=list("ABC")
    ... )
    >>> round(GeneCorrelation(matrix, matrix, "log1p(counts)").gsc, 6)
    1.0
    """

    prediction: pd.DataFrame
    """Pearson correlation ``(G, G)`` across locations; the mean of the samples' where samples were kept."""
    truth: pd.DataFrame | None
    """The same of the truth; None where none was named."""
    unit: str
    """Scale of the expression that was correlated."""

    @property
    def gsc(self) -> float:
        """Gene structure correlation: Pearson correlation of the upper triangles; NaN without a truth or three genes."""
        if self.truth is None or len(self.truth) < 3:
            return float("nan")
        upper = np.triu_indices(len(self.truth), 1)
        prediction, truth = (x.to_numpy()[upper][:, None] for x in (self.prediction, self.truth))
        return float(pcc(prediction, truth)[0])


@check_types
def gene_correlation(
    data: SpatialData | AnnData,
    *,
    key: str = "predicted",
    truth_key: str | None = None,
    genes: Sequence[str] | None = None,
    transform: TransformName | None = None,
    table_key: str | None = None,
) -> GeneCorrelation:
    """Correlation between genes across locations, in a prediction and in the truth. C3-Diff, Figure 4b.

    Parameters
    ----------
    data
        Object with the prediction: a map in ``sdata.images``, or a layer of a table. Nothing is written into it.
    key
        A map, such as :func:`stgen.tl.superresolve` makes, or else a layer of the table, such as
        :func:`stgen.tl.predict_expression` makes; ``"X"`` for the table's ``X``.
    truth_key
        The true counts: a map on the same grid; or a layer of the table, or ``"X"``. For results of
        :func:`stgen.tl.predict_expression` the counts that stand beside them by default; for others there is no truth
        unless you name one.
    genes
        Genes to correlate, in this order; None for all that prediction and truth share.
    transform
        Scale on which counts are correlated: ``"log1p_raw"`` by default for maps, ``"log1p_norm"`` for tables. Results
        of :func:`stgen.tl.predict_expression` are on their own scale, and so is then the truth.
    table_key
        Table of a SpatialData, where there are several.

    Returns
    -------
    ``prediction`` and ``truth``: DataFrames ``(G, G)`` with the genes as index and columns, 0 for genes that are
    constant; and ``gsc``, how well they agree. Where samples were kept, ``prediction`` is the mean of their matrices:
    the matrix of a mean of samples shows co-expression that no sample has. Of maps, only bins that are known for all
    genes, in both, take part.

    Raises
    ------
    KeyError
        If the result, the truth or a gene does not exist.
    ValueError
        If maps are on different grids, counts are no counts, the transform does not fit, or there are fewer than two
        genes or locations.

    Notes
    -----
    The truth's matrix carries the counting noise of its locations, which pulls correlations towards zero: a prediction
    of the true rates shows stronger ones than the counts themselves.

    Examples
    --------
    >>> from stgen import datasets, tl
    >>> sdata = datasets.simulated_section(size_um=500)
    >>> spots = sdata["spot_counts"]
    >>> found = tl.gene_correlation(spots, key="rate", truth_key="X", genes=["EPCAM", "KRT8", "COL1A1", "CD3E"])
    >>> found.prediction.shape, bool(found.gsc > 0.5)
    ((4, 4), True)
    """
    compared = find_compared(data, key, truth_key=truth_key, genes=genes, transform=transform, table_key=table_key)
    if len(compared.genes) < 2:
        raise ValueError(f"at least two genes are needed, found {', '.join(compared.genes) or 'none'}.")
    drawn, truth = compared.correlations()
    frame = {"index": pd.Index(compared.genes, name="gene"), "columns": compared.genes}
    return GeneCorrelation(
        prediction=pd.DataFrame(np.mean(drawn, 0), **frame),
        truth=None if truth is None else pd.DataFrame(truth, **frame),
        unit=compared.unit,
    )
