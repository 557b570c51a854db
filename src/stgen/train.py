"""The one training loop, on Accelerate: any device, mixed precision, several processes, exact resume.

All randomness of a step (which rows, which view, which noise, which dropout) is a function of the seed and the step's
number. A run that is killed and resumed therefore ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from stgen._checks import (
    check_choice,
    check_flag,
    check_not_negative,
    check_positive,
    check_seed,
    check_share,
    check_text,
    check_whole,
    unknown_option,
)
from stgen.data import Batch, StepSampler, with_each

__all__ = ["Dataset", "Trainable", "check_device", "fit"]

MOST_WORKERS = 256

logger = logging.getLogger("stgen")

History = dict[str, list[float]]


class Dataset(Protocol):
    """What can be trained on: items with several views (rotations of an image, say), each a part of a batch."""

    n_views: int

    @property
    def noise_levels(self) -> int:
        """Noise levels at which each item of a validation set is scored."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int | tuple[int, int]) -> Batch: ...

    def fingerprint(self) -> list[str]:
        """What tells this dataset from another, for the checkpoint of a run."""


class Trainable(nn.Module, ABC):
    """A module that :func:`fit` can train: it says what to minimize.

    Attributes
    ----------
    config
        What it was constructed with, JSON values; a checkpoint belongs to it.
    progress
        Share of the training that is done, from 0 to 1, for what changes while it proceeds; 1 when it does not.
    """

    config: dict[str, Any]
    progress: float = 1.0

    @property
    def adversary(self) -> nn.Module | None:
        """The part of the model that is trained against the rest, if there is one."""
        return None

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Training losses of a batch: the total under ``"loss"``, every term by its name.

        With an :attr:`adversary`, in training, also ``"discriminator"``: what it minimizes. No gradient of it reaches
        the rest of the model, and none of ``"loss"`` the adversary.
        """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """:meth:`loss`, under the name that wrappers for several GPUs call."""
        return self.loss(batch)


def fit(
    model: Trainable,
    train: Dataset,
    validation: Dataset | None = None,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    ema_decay: float = 0.999,
    max_grad_norm: float | None = 1.0,
    evaluate_every: int = 100,
    patience: int | None = 5,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    precision: Literal["no", "bf16", "fp16"] | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> History:
    """Train a model in place; it ends with the moving average of its weights that validated best.

    Parameters
    ----------
    model
        The model. Its ``loss(batch)`` is minimized with AdamW at a constant learning rate. Where it has an
        ``adversary``, both take a step each time: the model on ``"loss"``, the adversary on ``"discriminator"``, and
        the validation and the average of weights are of the model only.
    train, validation
        Datasets. Without ``validation`` all ``steps`` are taken and the last weights are kept.
    steps
        Optimization steps, at most.
    batch_size
        Rows in a step, over all processes.
    ema_decay
        Decay of the exponential moving average of the weights; its warm-up is ``min(decay, (1 + n) / (10 + n))``, so
        that short runs do not average in their initialization.
    max_grad_norm
        Gradients are clipped to this norm; ``None`` does not clip.
    evaluate_every
        Steps between two validations, and between two checkpoints.
    patience
        Validations without improvement after which to stop; ``None`` never stops early.
    checkpoint
        Folder for the state of the run. If it holds one, the run continues from there.
    seed
        Random seed.
    device
        ``"cpu"``, ``"cuda"`` or ``"mps"``; by default a GPU if there is one. ``accelerate launch`` spreads a script
        over several GPUs.
    precision
        Mixed precision; by default bfloat16 on CUDA devices that have it, else none.
    num_workers
        Processes that prepare batches.
    progress
        Show a progress bar with the losses.

    Returns
    -------
    History: ``"step"`` and, at each of these steps, every loss averaged since the last and ``"validation"``.

    Raises
    ------
    ValueError
        If the device is unknown, ``checkpoint`` belongs to another run, or ``batch_size`` is below the number of
        processes.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models
    >>> from stgen.data import SpotData
    >>> rng = np.random.default_rng(0)
    >>> data = SpotData(rng.normal(size=(32, 3)), rng.normal(size=(32, 4)))
    >>> model = models.Stem(["A", "B", "C"], embedding_dim=4, transform="none", width=16, depth=1, heads=2)
    >>> history = model.fit(data, steps=2, batch_size=8, progress=False)
    >>> history["step"]
    [2]
    """
    check_options(
        {
            "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "ema_decay": ema_decay,
            "max_grad_norm": max_grad_norm, "evaluate_every": evaluate_every, "patience": patience, "checkpoint": checkpoint,
            "seed": seed, "device": device, "precision": precision, "num_workers": num_workers, "progress": progress,
        }
    )  # fmt: skip
    accelerator = _accelerator(device, precision)
    if batch_size < accelerator.num_processes:
        raise ValueError(
            f"batch_size={batch_size} cannot be spread over {accelerator.num_processes} processes; "
            f"pass batch_size={accelerator.num_processes} or more, or start fewer processes."
        )
    signature = {
        "model": type(model).__name__, "config": model.config, "rows": len(train), "batch_size": batch_size, "lr": lr,
        "weight_decay": weight_decay, "ema_decay": ema_decay, "max_grad_norm": max_grad_norm, "seed": seed,
        "evaluate_every": evaluate_every, "patience": patience, "validation_rows": len(validation or ()),
        "data": train.fingerprint(),
    }  # fmt: skip
    state = _State(model, accelerator, lr=lr, weight_decay=weight_decay, ema_decay=ema_decay, signature=signature)
    if checkpoint is not None:
        state.restore(Path(checkpoint))
    loader: Any = DataLoader(
        train,  # type: ignore[arg-type]  # which wants torch's own class, and uses no more than the protocol
        batch_sampler=_Shard(
            StepSampler(len(train), train.n_views, batch_size=batch_size, start=state.step, stop=steps, seed=seed),
            accelerator.process_index,
            accelerator.num_processes,
        ),
        num_workers=num_workers,
    )
    quiet: dict[str, Any] = {} if progress and accelerator.is_local_main_process else {"disable": True}
    bar = tqdm(total=steps, initial=state.step, desc=f"fit {type(model).__name__}", unit="step", **quiet)
    try:
        with torch.random.fork_rng(), bar:
            for batch in loader if not state.stopped else ():
                torch.manual_seed(_seed(seed, state.step, accelerator.process_index))
                model.progress = state.step / steps
                state.update(batch, max_grad_norm)
                bar.update()
                if state.step % evaluate_every == 0 or state.step == steps:
                    state.evaluate(validation, batch_size, seed, patience)
                    bar.set_postfix({k: f"{v[-1]:.3f}" for k, v in state.history.items() if k != "step"})
                    if checkpoint is not None and accelerator.is_main_process:
                        state.save(Path(checkpoint))
                    if state.stopped:
                        break
    except KeyboardInterrupt:
        if checkpoint is not None:
            logger.warning("interrupted; the same call continues from the last checkpoint in %s.", checkpoint)
        raise
    finally:
        state.release()
    state.finish()
    return state.history


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of :func:`fit` that do not exist or cannot work, before anything has begun.

    Raises
    ------
    TypeError
        If there is no such option.
    ValueError
        If one cannot work.
    """
    known = {name: p for name, p in signature(fit).parameters.items() if p.kind is Parameter.KEYWORD_ONLY}
    error = unknown_option("stgen.train.fit", options, known)
    if error is not None:
        raise error
    for name, value in options.items():
        if value is not None or "None" not in str(known[name].annotation):
            _CHECKS[name](name, value)


def _check_folder(name: str, value: object) -> None:
    if not isinstance(value, Path):
        check_text(name, value)


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "steps": check_whole,
    "batch_size": check_whole,
    "lr": check_not_negative,
    "weight_decay": check_not_negative,
    "ema_decay": check_share,
    "max_grad_norm": partial(check_positive, unit=""),
    "evaluate_every": check_whole,
    "patience": check_whole,
    "checkpoint": _check_folder,
    "seed": lambda name, value: check_seed(value),
    "device": lambda name, value: check_device(value),
    "precision": partial(check_choice, choices=("no", "bf16", "fp16")),
    "num_workers": partial(check_whole, least=0, most=MOST_WORKERS),
    "progress": check_flag,
}


class _State:
    """Everything that changes while a run proceeds, and how to write it down."""

    def __init__(
        self,
        model: Trainable,
        accelerator: Any,
        *,
        lr: float,
        weight_decay: float,
        ema_decay: float,
        signature: dict[str, Any],
    ) -> None:
        from diffusers.training_utils import EMAModel  # heavy, and needed only here

        self.model, self.accelerator, self.signature = model.train(), accelerator, signature
        self.opposed = [] if model.adversary is None else list(model.adversary.parameters())
        apart = {id(parameter) for parameter in self.opposed}
        self.parameters = [parameter for parameter in model.parameters() if id(parameter) not in apart]
        optimizer = torch.optim.AdamW([*self.parameters, *self.opposed], lr=lr, weight_decay=weight_decay)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = EMAModel(self.parameters, decay=ema_decay)
        self.step, self.stale, self.best_loss, self.stopped = 0, 0, float("inf"), False
        self.best: list[Tensor] | None = None
        self.history: History = {"step": []}
        self.recent: list[dict[str, float]] = []

    def update(self, batch: Batch, max_grad_norm: float | None) -> None:
        """One optimization step."""
        batch = with_each(batch, lambda value: value.to(self.accelerator.device))
        with self.accelerator.autocast():
            losses = self.wrapped(batch)
        self.accelerator.backward(losses["loss"] + losses.get("discriminator", 0))  # each reaches its own weights only
        if max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, max_grad_norm)  # first undoes a scale, of all gradients
            torch.nn.utils.clip_grad_norm_(self.opposed, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        self.step += 1
        self.recent.append({name: float(value.detach()) for name, value in losses.items()})

    def evaluate(self, validation: Dataset | None, batch_size: int, seed: int, patience: int | None) -> None:
        """Note the mean losses since the last evaluation, and the validation loss of the averaged weights."""
        self.history["step"].append(self.step)
        for name in self.recent[0]:
            self.history.setdefault(name, []).append(float(np.mean([losses[name] for losses in self.recent])))
        self.recent = []
        if validation is None or len(validation) == 0:
            return
        with self.averaged_weights():
            loss = self.validation_loss(validation, batch_size, seed)
        if self.accelerator.num_processes > 1:  # all stop together, at what the first has found
            from accelerate.utils import broadcast

            loss = float(broadcast(torch.tensor(loss, dtype=torch.float64, device=self.accelerator.device)))
        self.history.setdefault("validation", []).append(loss)
        if loss < self.best_loss:
            self.best_loss, self.stale = loss, 0
            self.best = [p.clone() for p in self.ema.shadow_params]
        else:
            self.stale += 1
            self.stopped = patience is not None and self.stale >= patience

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.model.eval()
        self.model.progress = 1.0
        try:
            yield
        finally:
            self.ema.restore(self.parameters)
            self.model.train()

    @torch.no_grad()
    def validation_loss(self, validation: Dataset, batch_size: int, seed: int) -> float:
        """Loss on the validation data at noise that is the same in every evaluation."""
        total = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(_seed(seed, 0, 2**20))
            for start in range(0, len(validation), batch_size):
                items = [validation[i] for i in range(start, min(start + batch_size, len(validation)))]
                batch = default_collate(items * validation.noise_levels)
                batch = with_each(batch, lambda value: value.to(self.accelerator.device))
                total += float(self.model.loss(batch)["loss"]) * len(items)
        return total / len(validation)

    def finish(self) -> None:
        """Give the model the weights to keep."""
        for parameter, value in zip(self.parameters, self.best or self.ema.shadow_params, strict=True):
            parameter.data.copy_(value)

    def release(self) -> None:
        """Leave a plain module in evaluation mode, however the run ends: no dropout, no mixed precision around it."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.model.__dict__.pop("forward", None)
        self.model.progress = 1.0
        self.model.eval()

    # ---- checkpoints: safetensors and JSON, replaced as a whole -------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the state beside the old one, then put it in its place."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self.ema.shadow_params)}
        tensors |= {f"best.{i}": v for i, v in enumerate(self.best or ())}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        scalars = {name: getattr(self, name) for name in ("step", "stale", "best_loss", "stopped", "history")}
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new / "state.safetensors")
        (new / "state.json").write_text(json.dumps({"signature": self.signature, **scalars}))
        if folder.exists():
            old = folder.with_name(folder.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(new, folder)
            shutil.rmtree(old)
        else:
            os.replace(new, folder)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint if there is one."""
        old = folder.with_name(folder.name + ".old")
        if not folder.exists() and old.exists():  # killed between the two renames of `save`
            os.replace(old, folder)
        if folder.exists():
            foreign = {path.name for path in folder.iterdir()} - {"state.json", "state.safetensors"}
            if foreign:  # `save` replaces the folder as a whole
                raise ValueError(
                    f"{folder} holds files that are no checkpoint ({', '.join(sorted(foreign)[:5])}) and would be "
                    "replaced. Name a folder of its own for `checkpoint`."
                )
        if not (folder / "state.json").exists():
            return
        scalars: dict[str, Any] = json.loads((folder / "state.json").read_text())
        before = scalars.pop("signature")
        differing = [k for k, v in json.loads(json.dumps(self.signature)).items() if before.get(k) != v]
        if differing:
            raise ValueError(
                f"the checkpoint in {folder} belongs to another run (different: {', '.join(differing)}). "
                "Name another folder, or delete it to start anew."
            )
        for name, value in scalars.items():
            setattr(self, name, value)
        tensors = load_file(folder / "state.safetensors", device=str(self.accelerator.device))
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "best": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, rest = name.split(".", 1)
            groups[group][rest] = value
        self.model.load_state_dict(groups["model"])
        self.ema.shadow_params = [groups["ema"][str(i)] for i in range(len(self.parameters))]
        self.ema.optimization_step = self.step
        self.best = [groups["best"][str(i)] for i in range(len(groups["best"]))] or None
        content = self.optimizer.state_dict()
        for name, value in groups["optimizer"].items():
            i, slot = name.split(".")
            content["state"].setdefault(int(i), {})[slot] = value
        self.optimizer.load_state_dict(content)
        logger.info("continuing from step %d in %s.", self.step, folder)


class _Shard:
    """One process's part of every batch."""

    def __init__(self, batches: StepSampler, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (batch[self.rank :: self.world] for batch in self.batches)


def _seed(seed: int, step: int, process: int) -> int:
    """A seed for one step of one process, unrelated to its neighbors'."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1)


def check_device(device: str | torch.device | None) -> torch.device:
    """The named device; by default a GPU if there is one, else the CPU.

    Raises
    ------
    ValueError
        If the name means nothing to torch, or the machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"`device` must be the name of a device or None, found {device!r}.")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"`device`: unknown or absent device {device!r}; this machine has {', '.join(here)}."
        ) from error
    return found


def _accelerator(device: str | None, precision: str | None) -> Any:
    """An Accelerator for that device. Its state is a process-wide singleton, which another choice must replace."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    found = check_device(device)
    if precision is None:
        precision = "bf16" if found.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    if PartialState().num_processes == 1:  # under `accelerate launch` the launcher decides
        AcceleratorState._reset_state(reset_partial_state=True)
        if found.type == "cuda" and found.index is not None:
            torch.cuda.set_device(found)
    return Accelerator(cpu=found.type == "cpu", mixed_precision=precision)
