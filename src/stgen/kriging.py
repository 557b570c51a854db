"""Kriging with histology: fields over one section, from the spots measured in it and an image of the tissue.

A field is a Gaussian process. Two places are alike if they are near each other (Matern kernels of several lengths) or
look alike (kernels of image features), in a proportion that the spots decide by predicting each of them from the
others. All of it has a closed form: nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy.linalg import eigh, solve

from stgen.kernels import FeatureSpace, Gaussian, Kernel, Linear, Matern, Pairs, Places, WeightedSum, matern

__all__ = ["Field", "Kriging", "Places", "kernels_of_image", "kernels_of_space", "matern", "mixtures"]

LENGTHS = (1.0, 2.0, 4.0, 8.0)  # of the Matern kernels, in pitches
WIDTHS = (0.7, 1.4)  # of the Gaussian kernels of features, in medians of the distance between spots
WIDTHS_ACROSS = (1.0, 1.4, 2.0)  # of those across sections
SHARES = (0.25, 0.5, 0.75)  # of space in a kernel of both
NOISE = np.logspace(-2, 3, 16)  # variance of the noise of an average spot, in units of the signal's
ALL_KERNELS_UP_TO = 600  # spots; with more, kernels are first tried on some
PATCHES = 4  # of neighboring spots, in which they are tried
FEW_KERNELS_FROM = 8000
MIN_WEIGHT = 1e-3  # of a kernel in an average


def kernels_of_space() -> list[Kernel]:
    """How near places are to each other, at several lengths."""
    return [Matern(length) for length in LENGTHS]


def kernels_of_image(features: np.ndarray | None, widths: Sequence[float] = WIDTHS) -> list[Kernel]:
    """How alike places look, by the features ``(n, D)`` of the spots; none without features."""
    if features is None:
        return []
    space = FeatureSpace.of(features)
    return [Linear(space), *(Gaussian(width, space) for width in widths)]


def mixtures(space: Sequence[Kernel], image: Sequence[Kernel]) -> list[Kernel]:
    """All kernels that are tried: each by itself, and every one of space with every one of the image."""
    both = [share * a + (1 - share) * b for a, b, share in product(space, image, SHARES)]
    return [*space, *image, *both]


@dataclass(frozen=True)
class Spectrum:
    """A kernel over the spots, in units of their noise, taken apart into eigenvectors.

    Parameters
    ----------
    kernel
        The kernel.
    values, vectors
        Its eigenvalues ``(n,)`` and eigenvectors ``(n, n)``.
    image
        The image's part of the kernel, times the eigenvectors; empty without one.
    """

    kernel: Kernel
    values: np.ndarray
    vectors: np.ndarray
    image: np.ndarray

    @classmethod
    def of(cls, kernel: Kernel, between: Mapping[Kernel, np.ndarray], scale: np.ndarray) -> Spectrum:
        """Of a kernel whose terms are known between the spots."""
        scaled = scale[:, None] * scale
        values, vectors = eigh(sum(share * between[term] for share, term in kernel.terms) * scaled, overwrite_a=True)
        parts = [share * between[term] for share, term in kernel.terms if term.of_image]
        image = (sum(parts) * scaled) @ vectors if parts else np.zeros((0, 0))
        return cls(kernel, np.maximum(values, 0), vectors, image)

    def errors(self, y: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """Mean squared error of spots predicted from all others, or of groups from the others: ``(len(NOISE), G)``."""
        rotated, squared = self.vectors.T @ y, self.vectors**2 if groups is None else None
        errors = np.empty((len(NOISE), y.shape[1]))
        for number, noise in enumerate(NOISE):
            inverse = 1 / (self.values + noise)
            alpha = self.vectors @ (inverse[:, None] * rotated)
            errors[number] = (self.left_out(alpha, inverse, groups, squared) ** 2).mean(0)
        return errors

    def left_out(
        self, alpha: np.ndarray, inverse: np.ndarray, groups: np.ndarray | None, squared: np.ndarray | None = None
    ) -> np.ndarray:
        """What is wrong with each spot when it, or its group, is predicted from all others: ``(n, G)``.

        With the inverse covariance C, what is left of a group S solves ``C_SS e = (C y)_S``; of a single spot, it is
        ``(C y)_i / C_ii`` (Dubrule, 1983).

        Parameters
        ----------
        alpha
            ``C y``, shape ``(n, G)``.
        inverse
            Eigenvalues of C.
        groups
            Number of each spot's group; None to leave out single spots.
        squared
            The square of the eigenvectors, if it is there already.
        """
        if groups is None:
            return np.asarray(alpha / ((self.vectors**2 if squared is None else squared) @ inverse)[:, None])
        error = np.empty_like(alpha)
        for group in np.unique(groups):
            rows = groups == group
            within = self.vectors[rows]
            error[rows] = solve((within * inverse) @ within.T, alpha[rows], assume_a="pos")
        return error


@dataclass(frozen=True)
class Field:
    """Fields that were kriged from spots: some columns, each with its own kernel and noise.

    Parameters
    ----------
    mean
        Of each column, shape ``(G,)``.
    weights
        Of the spots, for each kernel that is not a sum: shape ``(n, G)``.
    out_of_fold
        Each spot predicted from all others, shape ``(n, G)``.
    from_image, from_neighbors
        Of the variance of each column, the share that is predicted out of fold by what the place looks like, and by
        what was measured around it; what remains is left to the mean. Shape ``(G,)``.
    noise
        Variance of the noise in units of the signal's, shape ``(G,)``.
    kernels
        Share of each of them, shape ``(G,)`` each.
    """

    mean: np.ndarray
    weights: dict[Kernel, np.ndarray]
    out_of_fold: np.ndarray
    from_image: np.ndarray
    from_neighbors: np.ndarray
    noise: np.ndarray
    kernels: dict[Kernel, np.ndarray] = field(repr=False)

    def __getitem__(self, columns: np.ndarray | slice) -> Field:
        """Some of the columns."""
        return Field(
            self.mean[columns],
            {kernel: weight[:, columns] for kernel, weight in self.weights.items()},
            self.out_of_fold[:, columns],
            self.from_image[columns],
            self.from_neighbors[columns],
            self.noise[columns],
            {kernel: share[columns] for kernel, share in self.kernels.items()},
        )

    @property
    def length(self) -> np.ndarray:
        """Correlation length in pitches, shape ``(G,)``: that of the Matern kernels, by their shares; NaN without any."""
        shares = {kernel.length: share for kernel, share in self.kernels.items() if isinstance(kernel, Matern)}
        total = np.zeros(len(self.mean)) + sum(shares.values())
        weighted = sum(length * share for length, share in shares.items())
        return np.asarray(weighted / np.where(total > 0, total, np.nan))


class Kriging:
    """Prepares the kernels between the spots of a section; :meth:`solve` then fits any number of columns.

    Kernels are mixtures of one of space and one of image features, or one of these alone. For each column and kernel,
    the noise is what predicts spots best from all others; columns are predicted by the mean over kernels, weighted by
    how well each does that (its likelihood, were the errors Gaussian).

    Parameters
    ----------
    spots
        Where the spots are, and their features. At least three.
    noise
        Relative variance of the noise of each spot, shape ``(n,)``; equal by default.
    guide
        Columns ``(n, K)`` by which to choose kernels, where there are so many spots that not all kernels are solved
        (more than 600).
    groups
        Number of the group (a section, or a part of one) of each spot, shape ``(n,)``, if fields are to be predicted
        where there are no spots: then kernels are those of the image alone, each has the same weight, and noise is what
        predicts whole groups best from the others. By default fields lie among the spots. Spots of several sections
        differ by an offset of each (its depth, its stain), which no kernel could predict: elsewhere, the mean over
        sections is expected.
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

    def __init__(
        self,
        spots: Places,
        *,
        noise: np.ndarray | None = None,
        guide: np.ndarray,
        groups: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.spots, self.groups = spots, groups
        noise = np.ones(len(spots)) if noise is None else np.asarray(noise, float)
        self.precision = 1 / noise
        self.scale = np.sqrt(self.precision)
        if groups is not None:
            kernels = kernels_of_image(spots.features, WIDTHS_ACROSS)
        else:
            kernels = mixtures(kernels_of_space(), kernels_of_image(spots.features))
        if len(spots) > ALL_KERNELS_UP_TO and groups is None:
            kernels = best_kernels(kernels, spots, self.precision, guide, seed)
        between = terms_between(kernels, spots)
        self.spectra = [Spectrum.of(kernel, between, self.scale) for kernel in kernels]

    def solve(self, y: np.ndarray) -> Field:
        """Fit columns ``(n, G)``, each by itself."""
        y = np.asarray(y, float)
        (n, n_columns), (means, centered) = y.shape, self._centered(y)
        errors, variance = [spectrum.errors(centered, self.groups) for spectrum in self.spectra], (centered**2).mean(0)
        best = np.stack([e.argmin(0) for e in errors])  # (kernels, G)
        share = self._shares(np.stack([e.min(0) for e in errors]) / np.maximum(variance, 1e-12))
        share[:, variance <= 1e-12] = 0  # constant: there is nothing to predict

        terms = sorted({term for spectrum in self.spectra for _, term in spectrum.kernel.terms}, key=str)
        weights = {term: np.zeros((n, n_columns)) for term in terms}
        kernels = {term: np.zeros(n_columns) for term in terms}
        of_others, of_image, noise = np.zeros((n, n_columns)), np.zeros((n, n_columns)), np.zeros(n_columns)
        for number, spectrum in enumerate(self.spectra):
            for level in np.unique(best[number]):
                at = np.flatnonzero((best[number] == level) & (share[number] > 0))
                if len(at) == 0:
                    continue
                own, inverse = share[number, at], 1 / (spectrum.values + NOISE[level])
                rotated = inverse[:, None] * (spectrum.vectors.T @ centered[:, at])
                alpha = spectrum.vectors @ rotated
                error = spectrum.left_out(alpha, inverse, self.groups)
                of_others[:, at] += own * (centered[:, at] - error)
                for part, term in spectrum.kernel.terms:
                    weights[term][:, at] += own * part * self.scale[:, None] * alpha
                    kernels[term][at] += own * part
                if self.groups is not None:
                    of_image[:, at] += own * (centered[:, at] - error)
                elif len(spectrum.image):  # the same, of the image's part of the kernel alone
                    own_part = (spectrum.image * spectrum.vectors) @ inverse
                    of_image[:, at] += own * (spectrum.image @ rotated - own_part[:, None] * error)
                noise[at] += own * NOISE[level]
        explained = [
            (part * centered).sum(0) / np.maximum((centered**2).sum(0), 1e-12) for part in (of_image, of_others)
        ]
        return Field(
            means.mean(0), weights, self._mean_of_others(means) + of_others / self.scale[:, None], explained[0], explained[1] - explained[0], noise, kernels
        )  # fmt: skip

    def _centered(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means ``(sections, G)``, and what remains of each spot in units of its noise."""
        return centered_on(y, self.precision, self.spots.section)

    def _mean_of_others(self, means: np.ndarray) -> np.ndarray:
        """The mean of each spot ``(n, G)``, if its group, which is its section, had not been measured."""
        if len(means) == 1 or self.spots.section is None:
            return means
        others = (means.sum(0) - means) / (len(means) - 1)
        return np.asarray(others[np.unique(self.spots.section, return_inverse=True)[1]])

    def _shares(self, relative: np.ndarray) -> np.ndarray:
        """Weight of each kernel in the mean over all, from the share of the variance that it leaves: ``(kernels, G)``."""
        if self.groups is not None:  # too few to tell kernels apart
            return np.full(relative.shape, 1 / len(relative))
        likelihood = -len(self.spots) / 2 * np.log(np.maximum(relative, 1e-6))
        share = np.exp(likelihood - likelihood.max(0))
        share /= share.sum(0)
        share = np.where(share >= MIN_WEIGHT, share, 0)
        return np.asarray(share / share.sum(0))

    def predict(self, fields: Field, places: Places) -> np.ndarray:
        """Fields at other places, shape ``(len(places), G)``."""
        out = np.broadcast_to(fields.mean, (len(places), len(fields.mean))).copy()
        pairs = Pairs(places, self.spots)
        for kernel, weight in fields.weights.items():
            if np.abs(weight).max(initial=0) > 0:
                out += kernel.between(pairs) @ weight
        return out

    def draw(self, y: np.ndarray, fields: Field, n_samples: int, seed: int) -> Callable[[Places], np.ndarray]:
        """What spots and image leave open about some columns: random deviations from :meth:`predict`.

        A draw from the prior, less what kriging would make of it if it had been measured with noise: a draw from the
        posterior (Matheron's rule; Wilson et al., 2020). All columns share the mean of their kernels here, and have
        their own variance and noise.

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
        shares = {
            term: float((share * known).sum() / total)
            for term, share in fields.kernels.items()
            if (share * known).any()
        }
        n, n_columns = y.shape
        if not shares:
            return lambda places: np.zeros((len(places), n_samples, n_columns))
        kernel = WeightedSum(tuple((share, term) for term, share in shares.items()))
        spectrum = Spectrum.of(kernel, terms_between([kernel], self.spots), self.scale)
        centered = self._centered(np.asarray(y, float))[1]
        errors, variance = spectrum.errors(centered, self.groups), (centered**2).mean(0)
        level = errors.argmin(0)
        noise = NOISE[level]
        rotated = spectrum.vectors.T @ centered
        signal = ((rotated**2) / (spectrum.values[:, None] + noise)).mean(0)  # the variance that makes y most likely
        signal = np.where(errors.min(0) < variance, signal, 0)
        wave = kernel.wave(n_samples * n_columns, rng)

        def prior(places: Places) -> np.ndarray:
            return np.asarray(wave(places).reshape(len(places), n_samples, n_columns))

        measured = self.scale[:, None, None] * prior(self.spots)
        measured = measured + np.sqrt(noise) * rng.standard_normal(measured.shape)
        inner = np.tensordot(spectrum.vectors, measured, (0, 0)) / (spectrum.values[:, None, None] + noise)
        weights = self.scale[:, None] * (spectrum.vectors @ inner.reshape(n, -1))

        def deviations(places: Places) -> np.ndarray:
            known = (kernel(places, self.spots) @ weights).reshape(len(places), n_samples, n_columns)
            return np.asarray((prior(places) - known) * np.sqrt(signal))

        return deviations


def centered_on(
    y: np.ndarray, precision: np.ndarray, section: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Means of spots ``(n, G)`` in each section, weighted by their precision; and what remains, in units of the noise.

    Returns
    -------
    Shapes ``(sections, G)`` and ``(n, G)``.
    """
    number = np.zeros(len(y), int) if section is None else np.unique(section, return_inverse=True)[1]
    each = [(precision[rows], y[rows]) for rows in (number == i for i in range(number.max() + 1))]
    means = np.stack([weight @ values / weight.sum() for weight, values in each])
    return means, (y - means[number]) * np.sqrt(precision)[:, None]


def terms_between(kernels: Sequence[Kernel], spots: Places) -> dict[Kernel, np.ndarray]:
    """Between the spots, each kernel that occurs in the sums: shape ``(n, n)``."""
    pairs = Pairs(spots, spots)
    return {term: term.between(pairs) for term in {term for kernel in kernels for _, term in kernel.terms}}


def best_kernels(
    kernels: Sequence[Kernel], spots: Places, precision: np.ndarray, guide: np.ndarray, seed: int
) -> list[Kernel]:
    """The kernels that predict the guide best, in patches of the section: the more spots, the fewer.

    As many as can be solved in the time that all would take with ``ALL_KERNELS_UP_TO`` spots.
    """
    rng = np.random.default_rng(seed)
    rows: set[int] = set()
    while len(rows) < ALL_KERNELS_UP_TO:
        around = Pairs(spots, spots[rng.integers(len(spots), size=1)])
        apart = (
            around.distance if around.same_section is None else np.where(around.same_section, around.distance, np.inf)
        )
        rows |= set(np.argsort(apart[:, 0])[: ALL_KERNELS_UP_TO // PATCHES].tolist())
    some = np.array(sorted(rows))
    between, y = terms_between(kernels, spots[some]), centered_on(guide[some], precision[some], spots[some].section)[1]
    scale = np.sqrt(precision[some])
    error = [Spectrum.of(kernel, between, scale).errors(y).min(0) for kernel in kernels]
    order = np.argsort([np.log(np.maximum(e, 1e-12)).mean() for e in error])
    n_kept = int(len(kernels) * (ALL_KERNELS_UP_TO / len(spots)) ** 3)
    n_kept = max(n_kept, 1 if len(spots) >= FEW_KERNELS_FROM else 2)
    return [kernels[i] for i in order[:n_kept]]
