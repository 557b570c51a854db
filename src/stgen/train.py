"""The one training loop, on Accelerate: any device, mixed precision, several processes, exact resume.

All randomness of a step (which rows, which view, which noise, which dropout) is a function of the seed and the step's
number. A run that is killed and resumed therefore ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from stgen._checkpoint import SCALARS, TENSORS, damaged, read, repair, write
from stgen._training_options import check_device, check_options
from stgen.data import Batch, StepSampler, with_each

__all__ = ["Dataset", "Trainable", "check_device", "fit"]

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
        If an option cannot work, the device is unknown, ``checkpoint`` is damaged or belongs to another run, or
        ``batch_size`` is below the number of processes: the model is then as it was. If training diverges: the model
        then has the moving average that validated best, or else was noted last, and the checkpoint is the last good
        one.

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
        type(model).__name__,
        {
            "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "ema_decay": ema_decay,
            "max_grad_norm": max_grad_norm, "evaluate_every": evaluate_every, "patience": patience,
            "checkpoint": checkpoint, "seed": seed, "device": device, "precision": precision,
            "num_workers": num_workers, "progress": progress,
        },
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
        state.restore(Path(checkpoint), steps)
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
                    if checkpoint is not None:
                        if accelerator.is_main_process:
                            state.save(Path(checkpoint))
                        accelerator.wait_for_everyone()
                    if state.stopped:
                        break
    except _DivergedError as error:
        state.fall_back()
        kept = "" if checkpoint is None else f" The last good state is in {checkpoint}."
        raise ValueError(
            f"training of {type(model).__name__} diverged: {error}. Lower lr (now {lr:g}) or max_grad_norm (now "
            f"{max_grad_norm}), or look for extreme values in the data.{kept}"
        ) from None
    except KeyboardInterrupt:
        if checkpoint is not None:
            logger.warning("interrupted; the same call continues from the last checkpoint in %s.", checkpoint)
        raise
    finally:
        state.release()
    state.finish()
    return state.history


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
        self.good = {k: v.clone() for k, v in model.state_dict().items()}  # averaged, when last found to be finite
        self.history: History = {"step": []}
        self.recent: list[dict[str, float]] = []

    def update(self, batch: Batch, max_grad_norm: float | None) -> None:
        """One optimization step."""
        batch = with_each(batch, lambda value: value.to(self.accelerator.device))
        with self.accelerator.autocast():
            losses = self.wrapped(batch)
        value = float(losses["loss"].detach())
        if not math.isfinite(value):
            raise _DivergedError(f"the loss is {value} in step {self.step + 1}")
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
        if not all(bool(p.isfinite().all()) for p in (*self.model.state_dict().values(), *self.ema.shadow_params)):
            raise _DivergedError(
                f"weights are NaN or infinite after step {self.step}, loss {self.recent[-1]['loss']:.4g}"
            )
        self.history["step"].append(self.step)
        for name in self.recent[0]:
            self.history.setdefault(name, []).append(float(np.mean([losses[name] for losses in self.recent])))
        self.recent = []
        if validation is None or len(validation) == 0:
            self.note_good()
            return
        with self.averaged_weights():
            loss = self.validation_loss(validation, batch_size, seed)
        if self.accelerator.num_processes > 1:  # all stop together, at what the first has found
            from accelerate.utils import broadcast

            loss = float(broadcast(torch.tensor(loss, dtype=torch.float64, device=self.accelerator.device)))
        if not math.isfinite(loss):
            raise _DivergedError(f"the validation loss is {loss} after step {self.step}")
        self.note_good()
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

    def note_good(self) -> None:
        """Remember weights that are numbers: the averaged ones, with all else that the model holds."""
        with self.averaged_weights():
            self.good = {k: v.clone() for k, v in self.model.state_dict().items()}

    def fall_back(self) -> None:
        """Give the model the last weights that were good."""
        self.model.load_state_dict(self.good)
        if self.best is not None:
            self.finish()

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
        scalars = {"signature": self.signature, **{name: getattr(self, name) for name in SCALARS}}
        write(folder, scalars, {k: v.detach().cpu().contiguous() for k, v in tensors.items()})

    def restore(self, folder: Path, steps: int) -> None:
        """Continue from a checkpoint if there is one."""
        if self.accelerator.is_main_process:
            repair(folder)
        self.accelerator.wait_for_everyone()
        if not folder.exists() or not any(folder.iterdir()):
            return
        scalars, tensors = read(folder)
        before = scalars.pop("signature")
        differing = [k for k, v in json.loads(json.dumps(self.signature)).items() if before.get(k) != v]
        if differing:
            raise ValueError(
                f"the checkpoint in {folder} belongs to another run (different: {', '.join(differing)}). "
                "Name another folder, or delete it to start anew."
            )
        if scalars["step"] > steps:
            raise ValueError(
                f"the checkpoint in {folder} is at step {scalars['step']}, beyond steps={steps}. Pass as many steps or "
                "more, name another folder, or delete it to start anew."
            )
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "best": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, rest = name.split(".", 1)
            groups.setdefault(group, {})[rest] = value.to(self.accelerator.device)
        self._check_fit(folder, groups)
        for name in SCALARS:
            setattr(self, name, scalars[name])
        self.model.load_state_dict(groups["model"])
        self.ema.shadow_params = [groups["ema"][str(i)] for i in range(len(self.parameters))]
        self.ema.optimization_step = self.step
        self.best = [groups["best"][str(i)] for i in range(len(groups["best"]))] or None
        self.note_good()
        content = self.optimizer.state_dict()
        for name, value in groups["optimizer"].items():
            i, slot = name.split(".")
            content["state"].setdefault(int(i), {})[slot] = value
        self.optimizer.load_state_dict(content)
        logger.info("continuing from step %d in %s.", self.step, folder)

    def _check_fit(self, folder: Path, groups: dict[str, dict[str, Tensor]]) -> None:
        """Refuse tensors that are not those of this run, before any of them is taken."""
        averaged = {str(i): p.shape for i, p in enumerate(self.parameters)}
        of_steps = {str(i): p.shape for i, p in enumerate([*self.parameters, *self.opposed])}
        wanted = {"model": {k: v.shape for k, v in self.model.state_dict().items()}, "ema": averaged}
        wanted["best"] = averaged if groups["best"] else {}
        for group, shapes in wanted.items():
            if {k: v.shape for k, v in groups[group].items()} != shapes:
                raise damaged(folder / TENSORS, f"the tensors {group}.* are not those of this model")
        for name, value in groups["optimizer"].items():
            number, _, _ = name.partition(".")
            if number not in of_steps or value.shape not in (of_steps[number], torch.Size([])):
                raise damaged(folder / TENSORS, f"the tensor optimizer.{name} is not of this model")


class _DivergedError(Exception):
    """Losses or weights are no numbers any more."""


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
