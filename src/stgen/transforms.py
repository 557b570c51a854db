"""Scales of expression: from counts to the scale on which a model is trained, scored and reported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TransformName", "inverse_transform", "transform_counts", "unit"]

TransformName = Literal["log1p_norm", "log1p_raw", "log2p1_raw", "none"]

TARGET_SUM = 1e4

UNITS: dict[str, str] = {
    "log1p_norm": f"log1p(counts per {TARGET_SUM:,.0f})",
    "log1p_raw": "log1p(counts)",
    "log2p1_raw": "log2(counts + 1)",
    "none": "as given",
}


def unit(name: TransformName) -> str:
    """Unit of the values that a transform gives, in words.

    Examples
    --------
    >>> from stgen.transforms import unit
    >>> unit("log1p_raw")
    'log1p(counts)'
    """
    if not isinstance(name, str) or name not in UNITS:
        raise ValueError(f"unknown transform {name!r}; the transforms are {', '.join(map(repr, UNITS))}.")
    return UNITS[name]


def transform_counts(counts: np.ndarray, total: np.ndarray, name: TransformName) -> np.ndarray:
    """Bring counts to a named scale. Zero counts map to zero on every scale.

    Parameters
    ----------
    counts
        Counts of the modeled genes, shape ``(n, G)``.
    total
        Counts of each location over **all** measured genes, shape ``(n,)``; used by ``"log1p_norm"``.
    name
        ``"log1p_norm"``: natural log of one plus counts scaled to 10,000 per location; ``"log1p_raw"``: of one plus
        counts; ``"log2p1_raw"``: base 2, as Stem's released code does; ``"none"``: as given.

    Returns
    -------
    float32 array, shape ``(n, G)``.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.transforms import transform_counts
    >>> transform_counts(np.array([[0.0, 3.0]]), np.array([3.0]), "log2p1_raw")
    array([[0., 2.]], dtype=float32)
    """
    unit(name)
    counts = np.asarray(counts, dtype=np.float32)
    if name == "log1p_norm":
        total = np.maximum(np.asarray(total, dtype=np.float32), 1)  # an empty location stays at zero
        return np.log1p(counts * (np.float32(TARGET_SUM) / total[:, None]))
    if name == "log1p_raw":
        return np.log1p(counts)
    if name == "log2p1_raw":
        return np.log2(counts + 1)
    return counts


@overload
def inverse_transform(x: np.ndarray, name: TransformName) -> np.ndarray: ...
@overload
def inverse_transform(x: Tensor, name: TransformName) -> Tensor: ...
def inverse_transform(x: Any, name: TransformName) -> Any:
    """Bring a named scale back to counts; the inverse of :func:`transform_counts`.

    Parameters
    ----------
    x
        Expression on the scale, an array or a tensor of any shape.
    name
        As in :func:`transform_counts`, but not ``"log1p_norm"``, whose library sizes are not in ``x``.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.transforms import inverse_transform
    >>> inverse_transform(np.array([0.0, 2.0]), "log2p1_raw")
    array([0., 3.])
    """
    unit(name)
    if name == "log1p_norm":
        raise ValueError(
            "log1p_norm cannot be undone without library sizes; use transform='log1p_raw' where counts are needed."
        )
    if name == "none":
        return x
    expm1 = x.expm1 if hasattr(x, "expm1") else lambda: np.expm1(x)
    return expm1() if name == "log1p_raw" else 2.0**x - 1
