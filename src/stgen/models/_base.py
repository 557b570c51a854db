"""The contract that all models share: construct, fit, sample, save, load."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stgen.data import Batch, MapData, SpotData
from stgen.diffusion import Diffusion, Generators, Solver, centered_noise
from stgen.transforms import TransformName, unit

__all__ = ["DiffusionModel", "Model", "SteppedModel"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Model(nn.Module, ABC):
    """A model that can be fitted, sampled, saved and loaded.

    Parameters
    ----------
    **config
        The constructor's arguments, JSON values all; kept in ``self.config`` and written by :meth:`save`. ``genes``
        (a list of unique names) and ``transform`` (see :func:`stgen.transforms.transform_counts`) are expected in it.

    Attributes
    ----------
    config
        What the model was constructed with.
    record
        What it was fitted on: the embedding, the training run. Empty until fitted.
    stochastic
        Whether samples differ. A deterministic model gives one sample and no spread.
    takes
        What the model is fitted on: the histology embeddings of ``"locations"``, or ``"maps"`` with their histology.
    progress
        Share of the training that is done, from 0 to 1, for what changes while it proceeds; 1 when it does not.
    """

    stochastic: ClassVar[bool] = True
    takes: ClassVar[Literal["locations", "maps"]] = "locations"
    progress: float = 1.0

    def __init__(self, **config: Any) -> None:
        super().__init__()
        genes = config["genes"]
        if not genes:
            raise ValueError("a model needs at least one gene; stgen.pp.select_genes(adata, 200) chooses some.")
        if len(set(genes)) < len(genes):
            twice = sorted({gene for gene in genes if genes.count(gene) > 1})
            raise ValueError(f"`genes` must be unique, found more than once: {', '.join(twice[:5])}.")
        unit(config["transform"])
        self.config = config
        self.record: dict[str, Any] = {}

    @property
    def genes(self) -> list[str]:
        """The genes, in the order of the last dimension of every sample."""
        return self.config["genes"]

    @property
    def transform(self) -> TransformName:
        """The scale on which the model takes and gives expression."""
        return self.config["transform"]

    @property
    def fitted(self) -> bool:
        """Whether the model has been fitted (or loaded)."""
        return bool(self.record)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next((p.device for p in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    @abstractmethod
    def fit(
        self, train: SpotData | MapData, validation: SpotData | MapData | None = None, **options: Any
    ) -> dict[str, list[float]]:
        """Fit to training data; return the history of the losses."""

    @abstractmethod
    def sample(
        self,
        batch: Batch,
        n_samples: int = 1,
        steps: int | None = None,
        generator: Sequence[torch.Generator] | None = None,
        solver: Solver = "dpm++",
        noise: Callable[[], Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draw samples given a batch's conditions, shape ``(B, n_samples, G, ...)``, on the scale ``transform``."""

    @property
    def sampling_options(self) -> dict[str, Any]:
        """What else decides how samples are drawn, for the record of a result; JSON values."""
        return {}

    def check_sampling(self, steps: int, solver: Solver) -> None:
        """Refuse a sampler that :meth:`sample` could not use; a model that does not use one takes any."""

    def weights_sha256(self) -> str:
        """Hash of all weights and buffers, which identifies a fitted model."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` to a folder, which is made if need be.

        Returns
        -------
        The folder, for :func:`stgen.models.load`.
        """
        if not self.fitted:
            raise ValueError(f"this {type(self).__name__} has not been fitted; call stgen.tl.fit(model, data) first.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"class": type(self).__name__, "config": self.config, "record": self.record}
        (folder / CONFIG).write_text(json.dumps(content, indent=1))
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Model:
        """Restore a model of this class from a folder that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If one of the two files is missing.
        ValueError
            If the folder holds another class, or weights that do not fit its configuration.
        """
        content = read_config(folder)
        if content["class"] != cls.__name__:
            raise ValueError(
                f"{folder} holds a {content['class']}, not a {cls.__name__}; stgen.models.load(folder) loads any model."
            )
        try:
            model = cls(**content["config"])
        except TypeError as error:
            raise ValueError(
                f"the configuration in {Path(folder) / CONFIG} is not a {cls.__name__}'s: {error}"
            ) from error
        try:
            model.load_state_dict(load_file(Path(folder) / WEIGHTS))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the weights in {Path(folder) / WEIGHTS} do not fit {CONFIG} beside them: {error}"
            ) from error
        model.record = content["record"]
        return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of a model folder's ``config.json``, once both files are known to be there."""
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete model folder: {' and '.join(missing)} missing. "
            "model.save(folder) writes both files."
        )
    content = json.loads((folder / CONFIG).read_text())
    absent = {"class", "config", "record"} - content.keys()
    if absent:
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(sorted(absent))}: it was not written by model.save(folder)."
        )
    return content


class SteppedModel(Model):
    """A model that is trained in steps, by :func:`stgen.train.fit`."""

    @abstractmethod
    def initialize(self) -> None:
        """Draw initial weights from torch's global generator."""

    @property
    def adversary(self) -> nn.Module | None:
        """The part of the model that is trained against the rest, if there is one."""
        return None

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Training losses of a batch: the total under ``"loss"``, every term by its name.

        With an :attr:`adversary`, in training, also ``"discriminator"``: what it minimizes. No gradient of it reaches the
        rest of the model, and none of ``"loss"`` the adversary.
        """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """:meth:`loss`, under the name that wrappers for several GPUs call."""
        return self.loss(batch)

    def fit(
        self, train: SpotData | MapData, validation: SpotData | MapData | None = None, **options: Any
    ) -> dict[str, list[float]]:
        """Train with :func:`stgen.train.fit`, which takes the options.

        A model that is not fitted begins with weights drawn from the option ``seed``, so that the same call gives the
        same model; a fitted one goes on from its weights.
        """
        from stgen.train import fit

        if not self.fitted:
            with torch.random.fork_rng():
                torch.manual_seed(options.get("seed", 0))
                self.initialize()
        return fit(self, train, validation, **options)


class DiffusionModel(SteppedModel):
    """A model trained and sampled by diffusion.

    A family says how a batch becomes a condition (:meth:`condition`), what the network is (:meth:`denoise`) and on what
    scale it diffuses (:meth:`to_network`, :meth:`from_network`); training and sampling are the same for all.

    Attributes
    ----------
    diffusion
        Noise schedule, parameterization, solvers.
    """

    diffusion: Diffusion

    @abstractmethod
    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Everything the network needs to know of a batch besides the noised value; first dimension ``B``."""

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The network: its prediction at noise levels ``t`` (``(B,)``), of the shape of ``x_t``."""

    @abstractmethod
    def to_network(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Expression (scale ``transform``) to the network's own scale."""

    @abstractmethod
    def from_network(self, x_0: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Inverse of :meth:`to_network`; ``x_0`` is ``(B, ..., G)`` with possibly a dimension of samples at 1."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Training losses of a batch: the total under ``"loss"``, every term by its name."""
        cond = self.condition(batch)
        x_0 = self.to_network(batch["x"], cond)
        return self.diffusion.loss(lambda x_t, t: self.denoise(x_t, t, cond), x_0, batch.get("tissue"))

    def check_sampling(self, steps: int, solver: Solver) -> None:
        """Refuse a sampler that :meth:`sample` could not use."""
        self.diffusion.check_sampling(steps, solver)

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        n_samples: int = 1,
        steps: int | None = 25,
        generator: Generators = None,
        solver: Solver = "dpm++",
        noise: Callable[[], Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draw samples given a batch's conditions.

        Parameters
        ----------
        batch
            The conditions; ``x`` is not looked at.
        n_samples
            Samples for each item. Their noise is centered (:func:`stgen.diffusion.centered_noise`).
        steps
            Network evaluations; ``None`` for 25.
        generator
            One random generator for each item, which makes an item's samples independent of its batch; or one for all.
        solver
            See :meth:`stgen.diffusion.Diffusion.sample`.
        noise
            Draws standard normal noise ``(B, n_samples, *sample_shape)``, once or (``"ddpm"``) at every step; takes the
            place of ``generator``.
        project
            Applied to the estimated clean samples ``(B n_samples, *sample_shape)``, on the scale ``transform``, at every
            step.

        Returns
        -------
        Shape ``(B, n_samples, ...)``, on the scale ``transform``.
        """
        cond = self.condition(batch)
        size = len(next(iter(cond.values())))
        if noise is None:
            if generator is None or isinstance(generator, torch.Generator):
                seeds = torch.randint(2**62, (size,), generator=generator)
                generator = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
            noise = partial(centered_noise, n_samples, self.sample_shape(batch), generator)

        def flat_noise() -> Tensor:
            return noise().to(self.device).flatten(0, 1)

        def project_network(x_0: Tensor) -> Tensor:
            return self.to_network(project(self.from_network(x_0, repeated)), repeated)

        repeated = {name: value.repeat_interleave(n_samples, 0) for name, value in cond.items()}
        x_0 = self.diffusion.sample(
            lambda x_t, t: self.denoise(x_t, t, repeated),
            flat_noise(),
            steps=25 if steps is None else steps,
            solver=solver,
            noise=flat_noise,
            project=None if project is None else project_network,
        )
        return self.from_network(x_0, repeated).unflatten(0, (size, n_samples))

    @abstractmethod
    def sample_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of one sample of one item of the batch."""
