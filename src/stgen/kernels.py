"""Kernels: how alike two places are by where they lie and by what they look like. They add, and are scaled.

``0.25 * Matern(2.0) + 0.75 * Gaussian(0.7, features)`` is a kernel; called with two sets of places it gives the
covariances between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial.distance import cdist

__all__ = [
    "FeatureSpace",
    "Gaussian",
    "Kernel",
    "Linear",
    "Matern",
    "Pairs",
    "Places",
    "Product",
    "WeightedSum",
    "matern",
]

CLIP = 4.0  # standard deviations of a feature: beyond what the spots show, nothing is extrapolated
FOR_MEDIAN = 2000  # spots, from which the median distance is taken
WAVES = 256  # that make up a random field of a stationary kernel
PRODUCTS = 16  # of random fields that make up one of a product


@dataclass(frozen=True)
class Places:
    """Where some places are, and what they look like.

    Parameters
    ----------
    xy
        Locations in pitches (distances between neighboring spots), shape ``(n, 2)``.
    features
        Image features, shape ``(n, D)``; of a spot, the mean over its disc. None without an image.
    section
        Number of the section that each lies in, shape ``(n,)``; negative for none. Places of different sections, and
        those in none, are never near each other. None if there is only one section.
    """

    xy: np.ndarray
    features: np.ndarray | None = None
    section: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, rows: np.ndarray | slice) -> Places:
        features, section = (None if part is None else part[rows] for part in (self.features, self.section))
        return Places(self.xy[rows], features, section)


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Features in standard deviations from the mean of some spots, and how far spots lie apart in them.

    Parameters
    ----------
    center, spread
        Of each feature, shape ``(D,)``. The spread of a constant one is infinite: it says nothing.
    squared_norm
        Mean over the spots.
    squared_distance
        Median over pairs of spots.
    """

    center: np.ndarray
    spread: np.ndarray
    squared_norm: float = 1.0
    squared_distance: float = 1.0

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureSpace:
        """Of the features ``(n, D)`` of some spots."""
        spread = features.std(0)
        space = cls(features.mean(0), np.where(spread > 1e-6, spread, np.inf))
        x = space.standardized(features)
        some = x[:: -(-len(x) // FOR_MEDIAN)]
        apart = cdist(some, some, "sqeuclidean")[np.triu_indices(len(some), 1)]
        norm, distance = float((x**2).sum(1).mean()), float(np.median(apart))
        return cls(space.center, space.spread, max(norm, 1e-12), max(distance, 1e-12))

    def standardized(self, features: np.ndarray | None) -> np.ndarray:
        """Features ``(n, D)`` in standard deviations, at most four."""
        if features is None:
            raise ValueError("a kernel of features needs places with features.")
        return np.asarray(np.clip((features - self.center) / self.spread, -CLIP, CLIP))


class Pairs:
    """Two sets of places, with what several kernels between them need, each computed once.

    Parameters
    ----------
    a, b
        The places.
    """

    def __init__(self, a: Places, b: Places) -> None:
        self.a, self.b = a, b
        self._products: dict[FeatureSpace, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def distance(self) -> np.ndarray:
        """In pitches, shape ``(len(a), len(b))``; whatever section they lie in."""
        kind = np.promote_types(self.a.xy.dtype, np.float32)
        return np.asarray(cdist(self.a.xy, self.b.xy).astype(kind, copy=False))

    @cached_property
    def same_section(self) -> np.ndarray | None:
        """Whether both lie in the same section, shape ``(len(a), len(b))``; None if there is only one."""
        if self.a.section is None and self.b.section is None:
            return None
        a, b = (np.zeros(len(p), int) if p.section is None else p.section for p in (self.a, self.b))
        return np.asarray((a[:, None] == b) & (a >= 0)[:, None])

    def inner(self, space: FeatureSpace) -> np.ndarray:
        """Inner products of the standardized features, shape ``(len(a), len(b))``."""
        return self._of_features(space)[0]

    def unlike(self, space: FeatureSpace) -> np.ndarray:
        """Squared distances of the standardized features, shape ``(len(a), len(b))``."""
        return self._of_features(space)[1]

    def _of_features(self, space: FeatureSpace) -> tuple[np.ndarray, np.ndarray]:
        if space not in self._products:
            x, y = space.standardized(self.a.features), space.standardized(self.b.features)
            inner = x @ y.T
            unlike = np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * inner, 0)
            self._products[space] = inner, unlike
        return self._products[space]


Fields = Callable[[Places], np.ndarray]
"""Random fields as a function of places: ``(len(places), n_fields)``."""


class Kernel(ABC):
    """A covariance of two places. Kernels add, and are multiplied by numbers and by each other."""

    @abstractmethod
    def between(self, pairs: Pairs) -> np.ndarray:
        """The kernel between two sets of places, shape ``(len(a), len(b))``."""

    @abstractmethod
    def wave(self, n_fields: int, rng: np.random.Generator) -> Fields:
        """Random fields with mean zero, whose covariance is the kernel."""

    def __call__(self, a: Places, b: Places) -> np.ndarray:
        """The kernel between places, shape ``(len(a), len(b))``."""
        return self.between(Pairs(a, b))

    @property
    def of_image(self) -> bool:
        """Whether the kernel compares what places look like, and not only where they are."""
        return False

    @property
    def terms(self) -> tuple[tuple[float, Kernel], ...]:
        """The kernels of which this one is a sum, with their weights."""
        return ((1.0, self),)

    def __add__(self, other: Kernel) -> WeightedSum:
        return WeightedSum((*self.terms, *other.terms))

    def __mul__(self, other: float | Kernel) -> Kernel:
        if isinstance(other, Kernel):
            return Product(self, other)
        return WeightedSum(tuple((other * weight, kernel) for weight, kernel in self.terms))

    __rmul__ = __mul__


@dataclass(frozen=True)
class WeightedSum(Kernel):
    """A sum of kernels, each with a weight.

    Parameters
    ----------
    parts
        Weights and kernels.

    Examples
    --------
    >>> from stgen.kernels import Matern
    >>> print(0.25 * Matern(1.0) + 0.75 * Matern(4.0))
    0.25 space 1 + 0.75 space 4
    """

    parts: tuple[tuple[float, Kernel], ...]

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {kernel}" for weight, kernel in self.parts)

    @property
    def of_image(self) -> bool:
        """Whether one of the parts does."""
        return any(kernel.of_image for _, kernel in self.parts)

    @property
    def terms(self) -> tuple[tuple[float, Kernel], ...]:
        """The parts."""
        return self.parts

    def between(self, pairs: Pairs) -> np.ndarray:
        """The sum."""
        return np.asarray(sum(weight * kernel.between(pairs) for weight, kernel in self.parts))

    def wave(self, n_fields: int, rng: np.random.Generator) -> Fields:
        """Sums of independent fields."""
        waves = [(np.sqrt(weight), kernel.wave(n_fields, rng)) for weight, kernel in self.parts]
        return lambda places: np.asarray(sum(height * wave(places) for height, wave in waves))


@dataclass(frozen=True)
class Product(Kernel):
    """A product of two kernels: places are alike if they are by both.

    Parameters
    ----------
    left, right
        The two.
    """

    left: Kernel
    right: Kernel

    def __str__(self) -> str:
        return f"({self.left}) x ({self.right})"

    @property
    def of_image(self) -> bool:
        """Whether one of both does."""
        return self.left.of_image or self.right.of_image

    def between(self, pairs: Pairs) -> np.ndarray:
        """The product."""
        return np.asarray(self.left.between(pairs) * self.right.between(pairs))

    def wave(self, n_fields: int, rng: np.random.Generator) -> Fields:
        """Sums of products of independent fields."""
        left, right = (kernel.wave(n_fields * PRODUCTS, rng) for kernel in (self.left, self.right))

        def fields(places: Places) -> np.ndarray:
            product = left(places) * right(places)
            return np.asarray(product.reshape(len(places), n_fields, PRODUCTS).sum(2) / np.sqrt(PRODUCTS))

        return fields


@dataclass(frozen=True)
class Matern(Kernel):
    """Near each other: Matern kernel of smoothness 3/2, zero between different sections.

    Parameters
    ----------
    length
        In pitches.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.kernels import Matern, Places
    >>> Matern(1.0)(Places(np.zeros((1, 2))), Places(np.array([[0.0, 0.0], [1.0, 0.0]]))).round(3)
    array([[1.   , 0.483]])
    """

    length: float

    def __str__(self) -> str:
        return f"space {self.length:g}"

    def between(self, pairs: Pairs) -> np.ndarray:
        """By the distance of the places."""
        kernel = matern(pairs.distance, self.length)
        return kernel if pairs.same_section is None else kernel * pairs.same_section

    def wave(self, n_fields: int, rng: np.random.Generator) -> Fields:
        """Random cosines; the spectrum of this kernel is Student's t with three degrees of freedom."""
        frequency = rng.standard_normal((2, WAVES)) / (self.length * np.sqrt(rng.chisquare(3, WAVES) / 3))
        phase, height = _cosines(n_fields, rng)
        entropy = int(rng.spawn(1)[0].integers(2**62))

        def fields(places: Places) -> np.ndarray:
            angle = places.xy @ frequency + phase
            if places.section is not None:  # waves of other sections have other phases: their fields are independent
                for section in np.unique(places.section[places.section > 0]):
                    shift = np.random.default_rng([entropy, int(section)]).uniform(0, 2 * np.pi, WAVES)
                    angle[places.section == section] += shift
            values = np.cos(angle) @ height
            return values if places.section is None else np.where(places.section[:, None] >= 0, values, 0)

        return fields


@dataclass(frozen=True)
class Linear(Kernel):
    """Alike in features: their inner product, with a mean variance of 1 over the spots.

    Parameters
    ----------
    space
        Of the features.
    """

    space: FeatureSpace

    def __str__(self) -> str:
        return "image linear"

    @property
    def of_image(self) -> bool:
        """Yes."""
        return True

    def between(self, pairs: Pairs) -> np.ndarray:
        """Inner products."""
        return pairs.inner(self.space) / self.space.squared_norm

    def wave(self, n_fields: int, rng: np.random.Generator) -> Fields:
        """Random slopes."""
        slope = rng.standard_normal((len(self.space.center), n_fields)) / np.sqrt(self.space.squared_norm)
        return lambda places: self.space.standardized(places.features) @ slope


@dataclass(frozen=True)
class Gaussian(Kernel):
    """Alike in features: Gaussian of their distance.

    Parameters
    ----------
    width
        Standard deviation, in medians of the distance between spots.
    space
        Of the features.
    """

    width: float
    space: FeatureSpace

    def __str__(self) -> str:
        return f"image {self.width:g}"

    @property
    def of_image(self) -> bool:
        """Yes."""
        return True

    def between(self, pairs: Pairs) -> np.ndarray:
        """By the distance of the features."""
        return np.exp(-(pairs.unlike(self.space) / self.space.squared_distance) / (2 * self.width**2))

    def wave(self, n_fields: int, rng: np.random.Generator) -> Fields:
        """Random cosines; the spectrum of this kernel is Gaussian."""
        frequency = rng.standard_normal((len(self.space.center), WAVES))
        frequency /= self.width * np.sqrt(self.space.squared_distance)
        phase, height = _cosines(n_fields, rng)
        return lambda places: np.cos(self.space.standardized(places.features) @ frequency + phase) @ height


def matern(distance: np.ndarray, length: float) -> np.ndarray:
    """Matern kernel of smoothness 3/2: continuous fields with one derivative.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.kernels import matern
    >>> matern(np.array([0.0, 1.0]), 1.0).round(3)
    array([1.   , 0.483])
    """
    scaled = np.sqrt(3) / length * distance
    return np.asarray((1 + scaled) * np.exp(-scaled))


def _cosines(n_fields: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Phases and heights of the cosines that make up fields with a variance of 1 (Rahimi and Recht, 2007)."""
    phase = rng.uniform(0, 2 * np.pi, WAVES)
    return phase, rng.standard_normal((WAVES, n_fields)) * np.sqrt(2 / WAVES)
