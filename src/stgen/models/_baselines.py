"""Simple models with the interface of the others, to be reported beside every one of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stgen._checks import check_each, check_not_negative, check_whole
from stgen.data import Batch, SpotData, group_folds
from stgen.diffusion import Generators, Solver
from stgen.models._base import Model
from stgen.models._layers import Standardize
from stgen.models._options import check_size
from stgen.train import History
from stgen.transforms import TransformName

__all__ = ["LinearProbe", "Retrieval", "TrainingMean"]

PENALTIES = tuple(np.logspace(-4, 3, 29).tolist())


class PointModel(Model[SpotData]):
    """A model that predicts one value and no spread: :meth:`predict` is all that a subclass adds to its fit."""

    stochastic: ClassVar[bool] = False

    @abstractmethod
    def predict(self, h: Tensor) -> Tensor:
        """Expression on the scale ``transform``, shape ``(B, G)``, from embeddings ``(B, D)``."""

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        n_samples: int = 1,
        steps: int | None = None,
        generator: Generators = None,
        solver: Solver = "dpm++",
        noise: Callable[[], Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The prediction, projected if asked, as often as samples are asked for: shape ``(B, n_samples, G)``."""
        x = self.predict(batch["h"])
        x = x if project is None else project(x)
        return self.finite(x)[:, None].expand(-1, n_samples, -1)


class TrainingMean(PointModel):
    """The mean of the training tissue, everywhere: what any model must beat.

    Parameters
    ----------
    genes
        Names of the genes.
    embedding_dim
        Features of the histology embedding, which is not looked at.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models
    >>> from stgen.data import SpotData
    >>> model = models.TrainingMean(["A", "B"], embedding_dim=3)
    >>> _ = model.fit(SpotData(np.array([[0.0, 2.0], [2.0, 4.0]]), np.zeros((2, 3))))
    >>> model.mean
    tensor([1., 3.])
    """

    mean: Tensor

    def __init__(self, genes: Sequence[str], *, embedding_dim: int, transform: TransformName = "log1p_norm") -> None:
        super().__init__(genes=genes, embedding_dim=check_whole("embedding_dim", embedding_dim), transform=transform)
        self.register_buffer("mean", torch.zeros(len(self.genes)))

    def fit(self, train: SpotData, validation: SpotData | None = None, **options: Any) -> History:
        """Take the mean of training and validation data; there are no options."""
        self.check_options(**options)
        self.mean.copy_(joined(train, validation).x.mean(0))
        return {}

    def predict(self, h: Tensor) -> Tensor:
        """The mean, for each row of ``h``."""
        return self.mean.expand(len(h), -1)


class LinearProbe(PointModel):
    """Ridge regression of all genes on the embedding, its penalty chosen by cross-validation over groups.

    The simplest model that uses the image, and a hard one to beat in correlation.

    Parameters
    ----------
    genes
        Names of the genes.
    embedding_dim
        Features ``D`` of the histology embedding.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    penalties
        Candidates, relative to the number of training locations (features are standardized).
    clamp
        Standardized features are clamped to this many standard deviations.

    Attributes
    ----------
    penalty
        The one chosen, relative to the number of training locations.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models
    >>> from stgen.data import SpotData
    >>> h = np.random.default_rng(0).normal(size=(40, 2))
    >>> model = models.LinearProbe(["A"], embedding_dim=2, transform="none")
    >>> _ = model.fit(SpotData(h @ [[2.0], [-1.0]], h))
    >>> sample = model.sample({"h": model.standardize.mean[None]})
    >>> sample.shape
    torch.Size([1, 1, 1])
    """

    weight: Tensor
    bias: Tensor
    penalty: Tensor

    def __init__(
        self,
        genes: Sequence[str],
        *,
        embedding_dim: int,
        transform: TransformName = "log1p_norm",
        penalties: Sequence[float] = PENALTIES,
        clamp: float = 4.0,
    ) -> None:
        super().__init__(
            genes=genes, embedding_dim=check_whole("embedding_dim", embedding_dim), transform=transform,
            penalties=check_each("penalties", penalties, check_not_negative), clamp=check_size("clamp", clamp),
        )  # fmt: skip
        n_features, n_genes = self.config["embedding_dim"], len(self.genes)
        self.standardize = Standardize(n_features, self.config["clamp"])
        self.register_buffer("weight", torch.zeros(n_features, n_genes))
        self.register_buffer("bias", torch.zeros(n_genes))
        self.register_buffer("penalty", torch.tensor(0.0))

    def fit(self, train: SpotData, validation: SpotData | None = None, **options: Any) -> History:
        """Solve on training and validation data together: validation happens inside. There are no options."""
        self.check_options(**options)
        self.cross_fit(joined(train, validation))
        return {}

    def cross_fit(self, data: SpotData) -> Tensor:
        """Fit on all rows and return, for each row, the prediction of a probe that never saw the row's fold.

        The penalty is the one that best predicts differences *within* a fold. The offset of a fold (a section with
        other depth or stain, often) is set aside: no penalty can predict it, and it would drown what the penalty can
        do.

        Returns
        -------
        Shape ``(n, G)``.
        """
        h, x = data.h[:, 0], data.x
        folds = torch.as_tensor(group_folds(data.group))
        penalties = self.config["penalties"]
        fits, error = [], torch.zeros(len(penalties))
        for fold in folds.unique():
            inside = folds != fold
            standardize = Standardize(h.shape[1], self.config["clamp"]).fit(h[inside])
            fits.append((~inside, standardize(h[~inside]), *ridge(standardize(h[inside]), x[inside], penalties)))
            rows, z, weights, biases = fits[-1]
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                difference = z @ weight + bias - x[rows]
                error[i] += (difference - difference.mean(0)).square().sum()
        best = int(error.argmin())
        held_out = torch.zeros_like(x)
        for rows, z, weights, biases in fits:
            held_out[rows] = z @ weights[best] + biases[best]
        self.standardize.fit(h)  # not used below: a model that was fitted before may be on another device than the data
        weight, bias = ridge(Standardize(h.shape[1], self.config["clamp"]).fit(h)(h), x, [penalties[best]])
        self.weight.copy_(weight[0])
        self.bias.copy_(bias[0, 0])
        self.penalty.fill_(penalties[best])
        return held_out

    def predict(self, h: Tensor) -> Tensor:
        """The linear prediction."""
        return self.standardize(h) @ self.weight + self.bias


def ridge(h: Tensor, x: Tensor, penalties: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Ridge regression with intercept for several penalties at once, from one eigendecomposition.

    Parameters
    ----------
    h, x
        Features ``(n, D)`` and targets ``(n, G)``.
    penalties
        Penalties relative to ``n``: minimizes ``mean (x - h w - b)^2 + penalty |w|^2``.

    Returns
    -------
    Weights ``(P, D, G)`` and intercepts ``(P, 1, G)``.
    """
    h, x = h.double(), x.double()
    h_mean, x_mean = h.mean(0), x.mean(0)
    h, x = h - h_mean, x - x_mean
    values, vectors = torch.linalg.eigh(h.T @ h / len(h))
    cross = vectors.T @ (h.T @ x / len(h))
    weight = torch.stack([vectors @ (cross / (values.clamp(min=0) + p)[:, None]) for p in penalties])
    bias = x_mean - h_mean @ weight
    return weight.float(), bias[:, None].float()


class Retrieval(PointModel):
    """Mean expression of the ``k`` training locations whose histology looks most alike.

    Parameters
    ----------
    genes
        Names of the genes.
    embedding_dim
        Features ``D`` of the histology embedding.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    k
        Number of neighbors, by Euclidean distance of standardized features.
    clamp
        Standardized features are clamped to this many standard deviations.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models
    >>> from stgen.data import SpotData
    >>> model = models.Retrieval(["A"], embedding_dim=1, transform="none", k=1)
    >>> _ = model.fit(SpotData(np.array([[5.0], [7.0]]), np.array([[0.0], [1.0]])))
    >>> model.sample({"h": model.standardize.inverse(model.reference)})[:, 0]
    tensor([[5.],
            [7.]])
    """

    reference: Tensor
    expression: Tensor

    def __init__(
        self,
        genes: Sequence[str],
        *,
        embedding_dim: int,
        transform: TransformName = "log1p_norm",
        k: int = 20,
        clamp: float = 4.0,
    ) -> None:
        super().__init__(
            genes=genes, embedding_dim=check_whole("embedding_dim", embedding_dim), transform=transform,
            k=check_whole("k", k), clamp=check_size("clamp", clamp),
        )  # fmt: skip
        self.standardize = Standardize(self.config["embedding_dim"], self.config["clamp"])
        self.register_buffer("reference", torch.zeros(0, self.config["embedding_dim"]))
        self.register_buffer("expression", torch.zeros(0, len(self.genes)))

    def fit(self, train: SpotData, validation: SpotData | None = None, **options: Any) -> History:
        """Remember training and validation data; there are no options."""
        self.check_options(**options)
        data = joined(train, validation)
        device = self.device
        self.reference = self.standardize.fit(data.h[:, 0])(data.h[:, 0].to(device))
        self.expression = data.x.to(device, copy=True)
        return {}

    def predict(self, h: Tensor) -> Tensor:
        """Mean of the nearest."""
        nearest = torch.cdist(self.standardize(h), self.reference).topk(
            min(self.config["k"], len(self.reference)), largest=False
        )
        return self.expression[nearest.indices].mean(1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("reference", "expression"):  # their length is that of the training data
            if prefix + name in state_dict:
                buffer = getattr(self, name)
                setattr(self, name, buffer.new_empty(len(state_dict[prefix + name]), buffer.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def joined(train: SpotData, validation: SpotData | None) -> SpotData:
    """Training and validation data as one."""
    if validation is None or len(validation) == 0:
        return train
    return SpotData(*(np.concatenate([getattr(d, name) for d in (train, validation)]) for name in ("x", "h", "group")))
