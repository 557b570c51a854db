"""Fitted models in the place of LazySlide's own: what ``lazyslide.tl.feature_prediction`` asks of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Self, get_args

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from stgen._checks import check_choice, check_seed, check_whole
from stgen.data import Batch
from stgen.diffusion import Solver
from stgen.models._base import Model

__all__ = ["FeaturePredictor"]


class FeaturePredictor:
    """A fitted model of locations as a model of LazySlide, which predicts from the features of tiles.

    It has the interface of ``lazyslide_models.base.FeaturePredictionModel`` and needs neither package itself. A tile
    gets the same prediction in whatever batch it comes: its random numbers follow from its features and the seed.

    Parameters
    ----------
    model
        A fitted model of locations, such as :class:`stgen.models.Stem`, whose embedding was made as the features are.
    n_samples
        Samples whose mean is predicted; a deterministic model gives one.
    steps, solver
        Sampler, see :meth:`stgen.diffusion.Diffusion.sample`.
    seed
        Random seed.

    Attributes
    ----------
    model
        The model.
    name
        Name of its family, from which LazySlide names the table.

    Raises
    ------
    TypeError
        If ``model`` is no model.
    ValueError
        If it is not fitted, or is one of maps.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models
    >>> from stgen.data import SpotData
    >>> rng = np.random.default_rng(0)
    >>> model = models.LinearProbe(["EPCAM", "CD3E"], embedding_dim=3, transform="none")
    >>> model.record = {"history": model.fit(SpotData(rng.normal(size=(32, 2)), rng.normal(size=(32, 3))))}
    >>> predictor = models.FeaturePredictor(model)  # lazyslide.tl.feature_prediction(wsi, predictor, "uni2")
    >>> {gene: values.shape for gene, values in predictor.predict(np.zeros((5, 3))).items()}
    {'EPCAM': (5,), 'CD3E': (5,)}
    """

    needs_coords = False
    whole_slide = False
    features_model_name: str | None = None

    def __init__(
        self, model: Model[Any], *, n_samples: int = 20, steps: int = 25, solver: Solver = "dpm++", seed: int = 0
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(
                f"`model` must be a model, found {type(model).__name__}; stgen.models.load(folder) loads one."
            )
        if model.takes != "locations":
            raise ValueError(
                f"{type(model).__name__} takes maps, and LazySlide gives features of tiles; pass a model of locations, "
                "such as stgen.models.Stem."
            )
        if not model.fitted:
            raise ValueError(f"this {type(model).__name__} has not been fitted; call stgen.tl.fit(model, data) first.")
        n_samples = check_whole("n_samples", n_samples)
        check_choice("solver", solver, get_args(Solver))
        self.n_samples = n_samples if model.stochastic else 1
        self.steps, self.seed = check_whole("steps", steps), check_seed(seed)
        model.check_sampling(steps, solver)
        self.model, self.name, self.solver = model.eval(), type(model).__name__, solver

    def get_transform(self) -> Callable[..., Any] | None:
        """None: features are taken as they are."""
        return None

    def to(self, device: str | torch.device) -> Self:
        """Move the model to a device."""
        self.model.to(device)
        return self

    def try_compile(self, **compile_kws: Any) -> None:
        """Nothing: samples are drawn with random numbers that a compiled model would not keep."""

    @torch.no_grad()
    def predict(self, features: Any, coords: Any = None) -> dict[str, np.ndarray]:
        """Expected expression of each gene.

        Parameters
        ----------
        features
            Features of tiles, ``(n, D)``; an array, a sparse matrix or a tensor.
        coords
            Not looked at.

        Returns
        -------
        For each gene float32 ``(n,)``, on the model's scale (``model.transform``).

        Raises
        ------
        ValueError
            If features are not finite, or not as many as the model takes.
        """
        h = _array(features)
        width = self.model.config.get("embedding_dim", h.shape[-1])
        if h.ndim != 2 or h.shape[1] != width or not np.isfinite(h).all():
            raise ValueError(
                f"the model takes {width} finite features of each tile, found the shape {h.shape}: pass the features "
                "with which it was fitted."
            )
        batch: Batch = {"h": torch.as_tensor(h, device=self.model.device)}
        generators = [self._generator(row) for row in h]
        drawn: Tensor = self.model.sample(batch, self.n_samples, self.steps, generators, self.solver)
        mean = drawn.clamp(min=0).float().mean(1).cpu().numpy()
        return dict(zip(self.model.genes, mean.T, strict=True))

    def _generator(self, row: np.ndarray) -> torch.Generator:
        """The random numbers of a tile."""
        digest = hashlib.sha256(row.tobytes() + self.seed.to_bytes(8, "little")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _array(features: Any) -> np.ndarray:
    """Features as a float32 array."""
    if isinstance(features, Tensor):
        features = features.detach().cpu().numpy()
    if sparse.issparse(features):
        features = features.toarray()
    return np.ascontiguousarray(features, dtype=np.float32)
