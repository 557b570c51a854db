"""Anything that turns image patches into vectors, behind one call."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from stgen.pp._texture import TEXTURE_PX, TEXTURE_UM, texture_features

__all__ = ["Encoder", "get_encoders", "name_of"]

_PATCH_UM = 112.0  # 224 pixels at 0.5 µm, what most pathology models were trained on
_PATCH_PX = 224


@dataclass
class Encoder:
    """How patches are read, and what is done with them."""

    name: str
    sizes_um: tuple[float, ...]
    patch_px: int
    encode: Callable[[Tensor, float], Tensor]  # patches (n, c, s, s) in [0, 1] and µm per pixel -> (n, d)
    invariant: bool = False  # whether the eight dihedral views are one by construction
    rgb_only: bool = False
    running: Callable[[], AbstractContextManager[None]] = nullcontext  # surrounds all calls of encode


def get_encoders(
    model: str | Callable[[Tensor], Tensor] | Sequence[str | Callable[[Tensor], Tensor]],
    *,
    patch_um: float | Sequence[float] | None,
    patch_px: int | None,
    device: torch.device,
) -> list[Encoder]:
    """One encoder per model that is named, in their order."""
    parts = [part.strip() for part in model.split("+")] if isinstance(model, str) else model
    parts = list(parts) if isinstance(parts, Sequence) else [parts]
    if not parts or any(isinstance(part, str) and not part for part in parts):
        raise ValueError(
            f'`model` must name at least one model, found {model!r}; for example "texture" or "uni+conch".'
        )
    sizes = None if patch_um is None else tuple(float(size) for size in np.atleast_1d(patch_um))
    if sizes is not None and not (sizes and all(np.isfinite(size) and size > 0 for size in sizes)):
        raise ValueError(f"`patch_um` must be positive, found {patch_um!r}.")
    if patch_px is not None:
        if isinstance(patch_px, bool) or int(patch_px) != patch_px or patch_px < 8:
            raise ValueError(f"`patch_px` must be a whole number of at least 8 pixels, found {patch_px!r}.")
        patch_px = int(patch_px)
    encoders = []
    for part in parts:
        if part == "texture":
            encode = _on(device, texture_features)
            encoders.append(Encoder("texture", sizes or TEXTURE_UM, patch_px or TEXTURE_PX, encode, invariant=True))
            continue
        native: int | None = None
        running: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(part, str):
            name, encode, native = part, *_from_lazyslide(part, device)
        elif callable(part):
            name, encode = name_of(part), _from_callable(part, device)
            if isinstance(part, nn.Module):
                running = partial(_borrowed, part, device)
        else:
            raise TypeError(
                f'`model` must be "texture", the name of an encoder, or a callable on (n, 3, h, w) tensors; found '
                f"{type(part).__name__}."
            )
        side = patch_px or native or _PATCH_PX
        sizes_um = sizes or (_PATCH_UM,)
        encoders.append(Encoder(name, sizes_um, side, encode, rgb_only=isinstance(part, str), running=running))
    return encoders


def _on(device: torch.device, function: Callable[..., Tensor]) -> Callable[[Tensor, float], Tensor]:
    return lambda patches, mpp: function(patches.to(device), mpp=mpp)


def name_of(model: object) -> str:
    """The name under which a callable is recorded."""
    if isinstance(model, nn.Module):
        return type(model).__name__.lower()
    name = getattr(model, "__name__", type(model).__name__)
    return "custom" if name == "<lambda>" else name


def _from_callable(model: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor, float], Tensor]:
    return lambda patches, mpp: model(patches.to(device))


@contextmanager
def _borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The user's module on ``device`` and in evaluation mode, and afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    home = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), device)
    try:
        model.to(device).eval()
        yield
    finally:
        model.to(home)
        for module, training in modes:
            module.training = training


def _from_lazyslide(name: str, device: torch.device) -> tuple[Callable[[Tensor, float], Tensor], int | None]:
    """A registered encoder of lazyslide-models, with its own preprocessing, and the side in pixels that it wants."""
    try:
        from lazyslide_models import MODEL_REGISTRY, list_models
    except ImportError as error:
        raise ImportError(
            f"The encoder {name!r} comes with lazyslide-models, which could not be imported ({error}). Install it "
            "with: "
            'pip install "stgen[encoders]". model="texture" needs nothing.'
        ) from error
    known = sorted({key for task in ("vision", "multimodal") for key in list_models(task)})
    if name not in MODEL_REGISTRY or name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:8]
        raise ValueError(
            f"There is no image encoder {name!r}; similar ones are {', '.join(close)}. "
            "lazyslide_models.list_models('vision') lists all."
        )
    card = MODEL_REGISTRY[name]
    if not callable(getattr(card, "encode_image", None)) or inspect.isabstract(card):
        raise ValueError(f"{name!r} of lazyslide-models does not encode image patches (it has no encode_image).")
    encoder = card().to(device)
    transform = encoder.get_transform()

    def encode(patches: Tensor, mpp: float) -> Tensor:
        # to 8 bit, as the models were trained on; their transforms scale integers to [0, 1] themselves
        patches = patches.mul(255).round().clamp(0, 255).to(torch.uint8)
        if transform is not None:
            patches = torch.stack([transform(patch) for patch in patches])
        return torch.as_tensor(encoder.encode_image(patches.to(device)))

    size = getattr(encoder, "img_size", None) or getattr(encoder, "image_size", None)
    if size is None:  # the few that need more than 224 pixels and do not say so on the instance
        size = getattr(getattr(card, "input_constraint", None), "min", None)
    size = size[-1] if isinstance(size, tuple | list) else size
    return encode, int(size) if size else None
