"""Kriging with histology: fields over one section, from the spots measured in it and an image of the tissue.

A field is a Gaussian process. Two places are alike if they are near each other (Matern kernels of several lengths) or look
alike (kernels of image features), in a proportion that the spots decide by predicting each of them from the others. All
of it has a closed form: nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from scipy.linalg import eigh
from scipy.spatial.distance import cdist

__all__ = ["Field", "Kriging", "Places", "matern"]

LENGTHS = (1.0, 2.0, 4.0, 8.0)  # of the Matern kernels, in pitches
WIDTHS = (0.7, 1.4)  # of the Gaussian kernels of features, in medians of the distance between spots
SHARES = (0.25, 0.5, 0.75)  # of space in a kernel of both
NOISE = np.logspace(-2, 3, 16)  # variance of the noise of an average spot, in units of the signal's
ALL_KERNELS_UP_TO = 600  # spots; with more, kernels are first tried on some
FOR_MEDIAN = 2000  # spots, from which the median distance is taken
PATCHES = 4  # of neighboring spots, in which they are tried
FEW_KERNELS_FROM = 8000
CLIP = 4.0  # standard deviations of a feature: beyond what the spots show, nothing is extrapolated
WAVES = 256  # that make up a random field of a stationary kernel
MIN_WEIGHT = 1e-3  # of a kernel in an average


@dataclass(frozen=True)
class Places:
    """Where some places are, and what they look like.

    Parameters
    ----------
    xy
        Locations in pitches (distances between neighboring spots), shape ``(n, 2)``.
    features
        Image features, shape ``(n, D)``; of a spot, the mean over its disc. None without an image.
    """

    xy: np.ndarray
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, rows: np.ndarray | slice) -> Places:
        return Places(self.xy[rows], None if self.features is None else self.features[rows])


def matern(distance: np.ndarray, length: float) -> np.ndarray:
    """Matern kernel of smoothness 3/2: continuous fields with one derivative.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.kriging import matern
    >>> matern(np.array([0.0, 1.0]), 1.0).round(3)
    array([1.   , 0.483])
    """
    scaled = np.sqrt(3) / length * distance
    return (1 + scaled) * np.exp(-scaled)


Kernel = tuple[tuple[str, float], ...]  # names of basis kernels with their shares, which sum to 1


@dataclass(frozen=True)
class Basis:
    """The kernels of which all others are mixtures, each with a mean variance of 1 over the spots."""

    center: np.ndarray | None
    spread: np.ndarray | None
    linear: float
    distance: float

    @classmethod
    def of(cls, spots: Places) -> Basis:
        """With the constants of the features of some spots."""
        if spots.features is None:
            return cls(None, None, 1.0, 1.0)
        center, spread = spots.features.mean(0), spots.features.std(0)
        basis = cls(center, np.where(spread > 1e-6, spread, np.inf), 1.0, 1.0)
        x = basis.standardized(spots)
        some = x[:: -(-len(x) // FOR_MEDIAN)]
        apart = cdist(some, some, "sqeuclidean")[np.triu_indices(len(some), 1)]
        return replace(
            basis, linear=max(float((x**2).sum(1).mean()), 1e-12), distance=max(float(np.median(apart)), 1e-12)
        )

    @property
    def names(self) -> list[str]:
        """Of all kernels: those of space, then those of the image."""
        space = [f"space {length:g}" for length in LENGTHS]
        return space if self.center is None else [*space, "image linear", *(f"image {width:g}" for width in WIDTHS)]

    def standardized(self, places: Places) -> np.ndarray:
        """Features in standard deviations from the mean of the spots."""
        return np.clip((places.features - self.center) / self.spread, -CLIP, CLIP)

    def between(self, a: Places, b: Places, names: list[str]) -> dict[str, np.ndarray]:
        """Kernels between places, shape ``(len(a), len(b))`` each."""
        kernels = {}
        if any(name.startswith("space") for name in names):
            apart = cdist(a.xy, b.xy).astype(np.promote_types(a.xy.dtype, np.float32), copy=False)
        if any(name.startswith("image") for name in names):
            x, y = self.standardized(a), self.standardized(b)
            inner = x @ y.T
            unlike = np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * inner, 0) / self.distance
        for name in names:
            kind, scale = name.split()
            if kind == "space":
                kernels[name] = matern(apart, float(scale))
            elif scale == "linear":
                kernels[name] = inner / self.linear
            else:
                kernels[name] = np.exp(-unlike / (2 * float(scale) ** 2))
        return kernels

    def wave(self, name: str, n_fields: int, rng: np.random.Generator) -> Callable[[Places], np.ndarray]:
        """Random fields whose covariance is a kernel, as functions of places: ``(len(places), n_fields)``.

        Sums of cosines with random frequencies (Rahimi and Recht, 2007); exact for the linear kernel.
        """
        kind, scale = name.split()
        if scale == "linear":
            slope = rng.standard_normal((len(self.center), n_fields)) / np.sqrt(self.linear)
            return lambda places: self.standardized(places) @ slope
        n_dims = 2 if kind == "space" else len(self.center)
        frequency = rng.standard_normal((n_dims, WAVES))
        if kind == "space":  # the spectrum of this Matern kernel is Student's t with three degrees of freedom
            frequency /= float(scale) * np.sqrt(rng.chisquare(3, WAVES) / 3)
        else:
            frequency /= float(scale) * np.sqrt(self.distance)
        phase = rng.uniform(0, 2 * np.pi, WAVES)
        height = rng.standard_normal((WAVES, n_fields)) * np.sqrt(2 / WAVES)

        def fields(places: Places) -> np.ndarray:
            x = places.xy if kind == "space" else self.standardized(places)
            return np.cos(x @ frequency + phase) @ height

        return fields


@dataclass(frozen=True)
class Solved:
    """A kernel over the spots, in units of their noise, taken apart into eigenvectors."""

    kernel: Kernel
    values: np.ndarray
    vectors: np.ndarray
    image: np.ndarray
    """The image's part of the kernel, times the eigenvectors; empty without one."""


@dataclass(frozen=True)
class Field:
    """Fields that were kriged from spots: some columns, each with its own kernel and noise.

    Parameters
    ----------
    mean
        Of each column, shape ``(G,)``.
    weights
        Of the spots, for each basis kernel: shape ``(n, G)``.
    out_of_fold
        Each spot predicted from all others, shape ``(n, G)``.
    from_image, from_neighbors
        Of the variance of each column, the share that is predicted out of fold by what the place looks like, and by what
        was measured around it; what remains is left to the mean. Shape ``(G,)``.
    noise
        Variance of the noise in units of the signal's, shape ``(G,)``.
    kernels
        Share of each basis kernel, shape ``(G,)`` each.
    """

    mean: np.ndarray
    weights: dict[str, np.ndarray]
    out_of_fold: np.ndarray
    from_image: np.ndarray
    from_neighbors: np.ndarray
    noise: np.ndarray
    kernels: dict[str, np.ndarray] = field(repr=False)

    def __getitem__(self, columns: np.ndarray | slice) -> Field:
        """Some of the columns."""
        return Field(
            self.mean[columns],
            {name: weight[:, columns] for name, weight in self.weights.items()},
            self.out_of_fold[:, columns],
            self.from_image[columns],
            self.from_neighbors[columns],
            self.noise[columns],
            {name: share[columns] for name, share in self.kernels.items()},
        )

    @property
    def length(self) -> np.ndarray:
        """Correlation length in pitches, shape ``(G,)``: that of the Matern kernels, by their shares; NaN without any."""
        shares = {float(name.split()[1]): share for name, share in self.kernels.items() if name.startswith("space")}
        total = sum(shares.values())
        return sum(length * share for length, share in shares.items()) / np.where(total > 0, total, np.nan)


class Kriging:
    """Prepares the kernels between the spots of a section; :meth:`solve` then fits any number of columns.

    Kernels are mixtures of one of space and one of image features, or one of these alone. For each column and kernel, the
    noise is what predicts spots best from all others; columns are predicted by the mean over kernels, weighted by how well
    each does that (its likelihood, were the errors Gaussian).

    Parameters
    ----------
    spots
        Where the spots are, and their features. At least three.
    noise
        Relative variance of the noise of each spot, shape ``(n,)``; equal by default.
    guide
        Columns ``(n, K)`` by which to choose kernels, where there are so many spots that not all kernels are solved
        (more than 600).
    seed
        For the choice of spots on which they are tried.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.kriging import Kriging, Places
    >>> xy = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), -1).reshape(-1, 2)
    >>> y = np.sin(xy[:, :1] / 2)
    >>> kriging = Kriging(Places(xy), guide=y)
    >>> field = kriging.solve(y)
    >>> kriging.predict(field, Places(np.array([[3.5, 3.5]]))).round(1), np.sin(1.75).round(1)
    (array([[1.]]), np.float64(1.0))
    """

    def __init__(self, spots: Places, *, noise: np.ndarray | None = None, guide: np.ndarray, seed: int = 0) -> None:
        self.spots = spots
        self.basis = Basis.of(spots)
        noise = np.ones(len(spots)) if noise is None else np.asarray(noise, float)
        self.precision = 1 / noise
        self.scale = np.sqrt(self.precision)
        kernels = mixtures(self.basis.names)
        if len(spots) > ALL_KERNELS_UP_TO:
            kernels = self._best(kernels, guide, seed)
        between = self.basis.between(spots, spots, sorted({name for kernel in kernels for name, _ in kernel}))
        self.solved = [self._decompose(kernel, between) for kernel in kernels]

    def _best(self, kernels: list[Kernel], guide: np.ndarray, seed: int) -> list[Kernel]:
        """The kernels that predict best in some patches of the section; how many, depends on what each costs."""
        rng = np.random.default_rng(seed)
        rows: set[int] = set()
        while len(rows) < ALL_KERNELS_UP_TO:
            apart = cdist(self.spots.xy, self.spots.xy[rng.integers(len(self.spots))][None])[:, 0]
            rows |= set(np.argsort(apart)[: ALL_KERNELS_UP_TO // PATCHES].tolist())
        some = np.array(sorted(rows))
        trial = copy(self)
        trial.spots, trial.precision, trial.scale = self.spots[some], self.precision[some], self.scale[some]
        between = trial.basis.between(trial.spots, trial.spots, trial.basis.names)
        y = trial._centered(guide[some])[1]
        error = [trial._errors(trial._decompose(kernel, between), y)[0].min(0) for kernel in kernels]
        order = np.argsort([np.log(np.maximum(e, 1e-12)).mean() for e in error])
        n_kept = int(len(kernels) * (ALL_KERNELS_UP_TO / len(self.spots)) ** 3)
        n_kept = max(n_kept, 1 if len(self.spots) >= FEW_KERNELS_FROM else 2)
        return [kernels[i] for i in order[:n_kept]]

    def _decompose(self, kernel: Kernel, between: dict[str, np.ndarray]) -> Solved:
        scaled = self.scale[:, None] * self.scale
        values, vectors = eigh(sum(share * between[name] for name, share in kernel) * scaled, overwrite_a=True)
        parts = [share * between[name] for name, share in kernel if name.startswith("image")]
        image = (sum(parts) * scaled) @ vectors if parts else np.zeros((0, 0))
        return Solved(kernel, np.maximum(values, 0), vectors, image)

    def _centered(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over spots, weighted by their precision, and what remains in units of the noise."""
        mean = self.precision @ y / self.precision.sum()
        return mean, (y - mean) * self.scale[:, None]

    def _errors(self, solved: Solved, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean squared error of spots predicted from all others, for each noise: ``(len(NOISE), G)``; and of the mean.

        With the inverse covariance C, that error is ``(C y)_i / C_ii`` (Dubrule, 1983).
        """
        rotated, squared = solved.vectors.T @ y, solved.vectors**2
        errors = np.empty((len(NOISE), y.shape[1]))
        for number, noise in enumerate(NOISE):
            inverse = 1 / (solved.values + noise)
            errors[number] = (
                ((solved.vectors @ (inverse[:, None] * rotated)) / (squared @ inverse)[:, None]) ** 2
            ).mean(0)
        return errors, (y**2).mean(0)

    def solve(self, y: np.ndarray) -> Field:
        """Fit columns ``(n, G)``, each by itself."""
        y = np.asarray(y, float)
        (n, n_columns), (mean, centered) = y.shape, self._centered(y)
        errors, variance = zip(*(self._errors(solved, centered) for solved in self.solved), strict=True)
        best = np.stack([e.argmin(0) for e in errors])  # (kernels, G)
        relative = np.stack([e.min(0) for e in errors]) / np.maximum(variance[0], 1e-12)
        likelihood = -n / 2 * np.log(np.maximum(relative, 1e-6))
        share = np.exp(likelihood - likelihood.max(0))
        share /= share.sum(0)
        share = np.where(share >= MIN_WEIGHT, share, 0)
        share /= share.sum(0)
        share[:, variance[0] <= 1e-12] = 0  # constant: there is nothing to predict

        names = sorted({name for solved in self.solved for name, _ in solved.kernel})
        weights = {name: np.zeros((n, n_columns)) for name in names}
        kernels = {name: np.zeros(n_columns) for name in names}
        of_others, of_image, noise = np.zeros((n, n_columns)), np.zeros((n, n_columns)), np.zeros(n_columns)
        for number, solved in enumerate(self.solved):
            for level in np.unique(best[number]):
                at = np.flatnonzero((best[number] == level) & (share[number] > 0))
                if len(at) == 0:
                    continue
                own, inverse = share[number, at], 1 / (solved.values + NOISE[level])
                rotated = inverse[:, None] * (solved.vectors.T @ centered[:, at])
                alpha = solved.vectors @ rotated
                error = alpha / (solved.vectors**2 @ inverse)[:, None]
                of_others[:, at] += own * (centered[:, at] - error)
                for name, part in solved.kernel:
                    weights[name][:, at] += own * part * self.scale[:, None] * alpha
                    kernels[name][at] += own * part
                if len(solved.image):  # the same, of the image's part of the kernel alone
                    own_part = (solved.image * solved.vectors) @ inverse
                    of_image[:, at] += own * (solved.image @ rotated - own_part[:, None] * error)
                noise[at] += own * NOISE[level]
        explained = [
            (part * centered).sum(0) / np.maximum((centered**2).sum(0), 1e-12) for part in (of_image, of_others)
        ]
        return Field(
            mean, weights, mean + of_others / self.scale[:, None], explained[0], explained[1] - explained[0], noise, kernels
        )  # fmt: skip

    def predict(self, fields: Field, places: Places) -> np.ndarray:
        """Fields at other places, shape ``(len(places), G)``."""
        out = np.broadcast_to(fields.mean, (len(places), len(fields.mean))).copy()
        used = [name for name, weight in fields.weights.items() if np.abs(weight).max(initial=0) > 0]
        for name, kernel in self.basis.between(places, self.spots, used).items():
            out += kernel @ fields.weights[name]
        return out

    def draw(self, y: np.ndarray, fields: Field, n_samples: int, seed: int) -> Callable[[Places], np.ndarray]:
        """What spots and image leave open about some columns: random deviations from :meth:`predict`.

        A draw from the prior, less what kriging would make of it if it had been measured with noise: a draw from the
        posterior (Matheron's rule; Wilson et al., 2020). All columns share the mean of their kernels here, and have their own
        variance and noise.

        Parameters
        ----------
        y
            The columns, shape ``(n, G)``.
        fields
            What :meth:`solve` made of them.
        n_samples
            Number of draws.
        seed
            Random seed.

        Returns
        -------
        A function of places that gives the deviations, shape ``(len(places), n_samples, G)``.
        """
        rng = np.random.default_rng(seed)
        known = np.maximum(fields.from_image + fields.from_neighbors, 0)
        total = max(float(known.sum()), 1e-12)
        kernel = tuple(
            (name, float((share * known).sum() / total))
            for name, share in fields.kernels.items()
            if (share * known).any()
        )
        n, n_columns = y.shape
        if not kernel:
            return lambda places: np.zeros((len(places), n_samples, n_columns))
        solved = self._decompose(kernel, self.basis.between(self.spots, self.spots, [name for name, _ in kernel]))
        centered = self._centered(np.asarray(y, float))[1]
        errors, variance = self._errors(solved, centered)
        level = errors.argmin(0)
        noise = NOISE[level]
        rotated = solved.vectors.T @ centered
        signal = ((rotated**2) / (solved.values[:, None] + noise)).mean(0)  # the variance that makes y most likely
        signal = np.where(errors.min(0) < variance, signal, 0)
        waves = [(np.sqrt(share), self.basis.wave(name, n_samples * n_columns, rng)) for name, share in kernel]

        def prior(places: Places) -> np.ndarray:
            return sum(height * wave(places) for height, wave in waves).reshape(len(places), n_samples, n_columns)

        measured = self.scale[:, None, None] * prior(self.spots)
        measured = measured + np.sqrt(noise) * rng.standard_normal(measured.shape)
        inner = np.tensordot(solved.vectors, measured, (0, 0)) / (solved.values[:, None, None] + noise)
        weights = self.scale[:, None] * (solved.vectors @ inner.reshape(n, -1))

        def deviations(places: Places) -> np.ndarray:
            between = self.basis.between(places, self.spots, [name for name, _ in kernel])
            known = sum(share * between[name] for name, share in kernel) @ weights
            return (prior(places) - known.reshape(len(places), n_samples, n_columns)) * np.sqrt(signal)

        return deviations


def mixtures(names: list[str]) -> list[Kernel]:
    """All kernels that are tried: each basis kernel alone, and every one of space with every one of the image."""
    space = [name for name in names if name.startswith("space")]
    image = [name for name in names if name.startswith("image")]
    alone = [((name, 1.0),) for name in names]
    return alone + [((a, share), (b, 1 - share)) for a, b, share in product(space, image, SHARES)]
