"""The contract that all models share: construct, fit, sample, save, load."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from inspect import Parameter, isabstract, signature
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NoReturn, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from stgen import train as training
from stgen._checks import check_genes, is_sequence
from stgen._training_options import COMMON_OPTIONS, check_options
from stgen.data import Batch
from stgen.diffusion import Diffusion, Generators, Solver, centered_noise
from stgen.models import _card, _folder
from stgen.models._options import Preset
from stgen.transforms import TransformName, unit

__all__ = ["Config", "DiffusionModel", "Model", "SteppedModel", "known_models"]

T = TypeVar("T")
D = TypeVar("D", bound=training.Dataset)


class Config(dict[str, Any]):
    """What a model was constructed with: a dictionary of JSON values that refuses to be changed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "a model's config is what it was constructed with and does not change; construct another model: "
            "type(model)(**{**model.config, ...})."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)  # for copies: the default would set item by item


class Model(nn.Module, ABC, Generic[T]):
    """A model that can be fitted, sampled, saved and loaded; ``T`` is what it is fitted on.

    Parameters
    ----------
    **config
        The constructor's arguments, JSON values all; kept in ``self.config`` and written by :meth:`save`. ``genes``
        (a list of unique names) and ``transform`` (see :func:`stgen.transforms.transform_counts`) are expected in it.

    Attributes
    ----------
    config
        What the model was constructed with. It does not change.
    record
        What it was fitted on: the embedding, the training run. Empty until fitted.
    fetches
        Whether what the model names may be downloaded: not of a model that was loaded, which somebody else may have
        made.
    stochastic
        Whether samples differ. A deterministic model gives one sample and no spread.
    takes
        What the model is fitted on: the histology embeddings of ``"locations"``, ``"maps"`` with their histology, or
        ``"sections"``: their spots with the histology around them, as :class:`stgen.data.MapInputs`.
    """

    config: dict[str, Any]
    record: dict[str, Any]
    fetches: bool = True
    stochastic: ClassVar[bool] = True
    takes: ClassVar[Literal["locations", "maps", "sections"]] = "locations"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        genes = config["genes"]
        if is_sequence(genes) and len(genes) == 0:
            raise ValueError("a model needs at least one gene; stgen.pp.select_genes(adata, 200) chooses some.")
        genes = check_genes(genes)
        unit(config["transform"])
        self.config = Config(deepcopy({**config, "genes": genes}))
        self.record = {}

    def __repr__(self) -> str:
        return _card.line(self)

    def _repr_html_(self) -> str:
        return _card.markup(self)

    @property
    def genes(self) -> list[str]:
        """The genes, in the order of the last dimension of every sample."""
        return list(self.config["genes"])

    @property
    def transform(self) -> TransformName:
        """The scale on which the model takes and gives expression."""
        return cast(TransformName, self.config["transform"])

    @property
    def fitted(self) -> bool:
        """Whether the model has been fitted (or loaded)."""
        return bool(self.record)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next((p.device for p in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    @abstractmethod
    def fit(self, train: T, validation: T | None = None, **options: Any) -> training.History:
        """Fit to training data; return the history of the losses."""

    @abstractmethod
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
        """Draw samples given a batch's conditions, shape ``(B, n_samples, G, ...)``, on the scale ``transform``."""

    def check_options(self, **options: Any) -> None:
        """Refuse options that :meth:`fit` does not take and values that cannot work, before any work.

        Unless a class says otherwise, options are the keywords of its :meth:`fit`, and what any fit may be told:
        ``seed``, ``device``, ``progress``.
        """
        own = {k for k, p in signature(type(self).fit).parameters.items() if p.kind is Parameter.KEYWORD_ONLY}
        known = COMMON_OPTIONS | {k: lambda *_: None for k in own - set(COMMON_OPTIONS)}
        check_options(type(self).__name__, options, known)

    def finite(self, samples: Tensor) -> Tensor:
        """The samples, if all of them are numbers.

        Raises
        ------
        ValueError
            If a value is NaN or infinite.
        """
        if bool(torch.isfinite(samples).all()):
            return samples
        bad = [name for name, value in self.state_dict().items() if not bool(torch.isfinite(value).all())]
        advice = (
            f"its weights are, too ({', '.join(bad[:3])}): fit it anew, or load it from a folder that was saved before."
            if bad
            else "its weights are finite: look for extreme values in what it was given, and in what it was fitted on."
        )
        raise ValueError(f"this {type(self).__name__} gives values that are NaN or infinite, and {advice}")

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Attributes that decide, too, how samples are drawn, for records and for loading; JSON values."""
        return {}

    def check_sampling(self, steps: int, solver: Solver) -> None:
        """Refuse a sampler that :meth:`sample` could not use; a model that does not use one takes any."""

    def check_weights(self) -> None:
        """Refuse to be used with weights that are NaN or infinite, of which every result would be."""
        _folder.check_finite(self.state_dict(), f"the {type(self).__name__}")

    def weights_sha256(self) -> str:
        """Hash of all weights and buffers, which identifies a fitted model."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` to a folder, which is made if need be, and a card about them.

        The card, ``README.md``, is in the form of the Hugging Face Hub; one that was written by hand stays.

        Returns
        -------
        The folder, for :func:`stgen.models.load`.
        """
        if not self.fitted:
            raise ValueError(f"this {type(self).__name__} has not been fitted; call stgen.tl.fit(model, data) first.")
        content: _folder.Content = {"config": self.config, "record": self.record}
        if self.sampling_options:
            content["sampling"] = self.sampling_options
        folder = _folder.write(folder, type(self).__name__, content, self.state_dict())
        _card.write(folder, self)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Restore a model of this class from a folder that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If one of the two files is missing.
        ValueError
            If the folder holds another class, or weights that do not fit its configuration.
        """
        name, content = _folder.read(folder)
        if name != cls.__name__:
            raise ValueError(
                f"{folder} holds a {name}, not a {cls.__name__}; stgen.models.load(folder) loads any model."
            )
        return cls.restored(folder, content)

    @classmethod
    def restored(cls, folder: str | Path, content: _folder.Content) -> Self:
        """A model of this class from what a folder holds, once its sizes are known to be those of the weights there."""
        with _folder.sizes_only(folder):
            sizes = cls._constructed(folder, content)
        _folder.check_sizes(folder, sizes)
        model = cls._constructed(folder, content)
        model.load_state_dict(_folder.read_weights(folder))
        model.record = content["record"]
        model.fetches = False
        return model.eval()

    @classmethod
    def _constructed(cls, folder: str | Path, content: _folder.Content) -> Self:
        """A model of this class with the arguments and attributes that a folder names."""
        try:
            model = cls(**content["config"])
            for option in content.get("sampling", {}).keys() & model.sampling_options.keys():
                setattr(model, option, content["sampling"][option])
        except Exception as error:
            raise ValueError(
                f"the configuration in {Path(folder) / _folder.CONFIG} is not a {cls.__name__}'s: {error}"
            ) from error
        return model


def known_models() -> dict[str, dict[str, type[Model[Any]]]]:
    """All models that can be constructed, wherever they are defined: by name, then by module."""
    found: dict[str, dict[str, type[Model[Any]]]] = {}
    classes: list[type[Model[Any]]] = Model.__subclasses__()
    while classes:
        cls = classes.pop(0)
        classes += cls.__subclasses__()
        if not isabstract(cls):  # a cell of a notebook that runs again defines its class again: the last counts
            found.setdefault(cls.__name__, {})[cls.__module__] = cls
    return found


class SteppedModel(Model[D], training.Trainable):
    """A model that is trained in steps, by :func:`stgen.train.fit`.

    Attributes
    ----------
    presets
        Options that go together, by the name that ``preset`` is given.
    """

    presets: ClassVar[Mapping[str, Preset[Any]]] = {}

    @property
    def training_options(self) -> dict[str, Any]:
        """Options of :func:`stgen.train.fit` where a call gives no others: the preset's, if there is one."""
        preset = self.presets.get(self.config.get("preset", ""))
        return {} if preset is None else dict(preset.training)

    def check_options(self, **options: Any) -> None:
        """Refuse options that :func:`stgen.train.fit` does not take and values that cannot work, before any work."""
        check_options(type(self).__name__, options)

    @abstractmethod
    def initialize(self) -> None:
        """Draw initial weights from torch's global generator."""

    def fit(self, train: D, validation: D | None = None, **options: Any) -> training.History:
        """Train with :func:`stgen.train.fit`, which takes the options; those not given are :attr:`training_options`.

        A model that is not fitted begins with weights drawn from the option ``seed``, so that the same call gives the
        same model; a fitted one goes on from its weights.
        """
        options = {**self.training_options, **options}
        self.check_options(**options)
        if not self.fitted:
            with torch.random.fork_rng():
                torch.manual_seed(options.get("seed", 0))
                self.initialize()
        return training.fit(self, train, validation, **options)


class DiffusionModel(SteppedModel[D]):
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
        return self.diffusion.loss(lambda x_t, t: self.denoise(x_t, t, cond), x_0, batch.get("tissue")).losses

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
            Applied to the estimated clean samples ``(B n_samples, *sample_shape)``, on the scale ``transform``, at
            every step.

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
        draw, project_x = noise, project  # which are not bound anew below

        def flat_noise() -> Tensor:
            return draw().to(self.device).flatten(0, 1)

        def project_network(x_0: Tensor) -> Tensor:
            if project_x is None:
                return x_0
            return self.to_network(project_x(self.from_network(x_0, repeated)), repeated)

        repeated = {name: value.repeat_interleave(n_samples, 0) for name, value in cond.items()}
        x_0 = self.diffusion.sample(
            lambda x_t, t: self.denoise(x_t, t, repeated),
            flat_noise(),
            steps=25 if steps is None else steps,
            solver=solver,
            noise=flat_noise,
            project=None if project is None else project_network,
        )
        return self.finite(self.from_network(x_0, repeated)).unflatten(0, (size, n_samples))

    @abstractmethod
    def sample_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of one sample of one item of the batch."""
