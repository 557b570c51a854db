"""What the tests of models of maps share: small sections, batches of conditions, weights at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from stgen.data import MapData, MapInputs
from stgen.measurement import Measurement

QUICK = {"batch_size": 2, "progress": False, "device": "cpu", "seed": 5}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomized(module, seed=0, std=0.3):
    """The module with weights at random instead of at their start, where some are zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.eval()


def inputs(model, *, batch_size=2, side=None, seed=0, names=("h", "y", "valid")):
    """A batch of conditions."""
    generator = torch.Generator().manual_seed(seed)
    config, side = model.config, side or 2 * model.align
    pixels = side * config["px_per_bin"]
    draws = {
        "h": lambda: torch.randn(batch_size, config["image_channels"], pixels, pixels, generator=generator),
        "s": lambda: torch.rand(batch_size, 1, pixels, pixels, generator=generator),
        "text": lambda: torch.randn(batch_size, config["text_dim"], generator=generator),
        "y": lambda: torch.rand(batch_size, len(model.genes), side, side, generator=generator) + 0.1,
        "valid": lambda: torch.ones(batch_size, 1, side, side),
    }
    return {name: draws[name]() for name in names}


def as_double(model, batch):
    return model.double(), {name: value.double() for name, value in batch.items()}


def batch_of(data, *rows):
    return default_collate([data[i] for i in rows])


def shapes_of(module):
    """Parameters by name."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def reached(module, deep=()):
    """Parts of a model to which a gradient came; of some, parts of the parts."""
    parts = set()
    for name, p in module.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            assert p.grad.isfinite().all()
            parts.add(".".join(name.split(".")[: 2 if name.startswith(deep) else 1]))
    return parts


def map_data(
    seed=0, *, side, tile, n_genes=3, measured=(True,), nuclei=False, text_dim=None, hole=(2, 3), border=32, **options
):
    """Tiles of sections, with low-resolution maps or without, whose counts follow from their images at 2 pixels a bin."""
    rng, sections = np.random.default_rng(seed), []
    weight = rng.normal(size=(n_genes, 3)) / 2
    for known in measured:
        mean = rng.normal(size=(3, side // 4, side // 4)).repeat(4, 1).repeat(4, 2) * 1.5
        counts = rng.poisson(np.exp(0.5 + np.einsum("gc,chw->ghw", weight, mean))).astype(np.float32)
        around = ((0, 0), (border, border), (border, border))
        pixels = np.pad(mean.repeat(2, 1).repeat(2, 2), around, mode="edge").astype(np.float32)
        low = counts.reshape(n_genes, side // 4, 4, side // 4, 4).sum((2, 4))
        tissue = np.ones((side, side), bool)
        tissue[: hole[0], : hole[1]] = False

        def window(y, x, height, width, pixels=pixels):
            return pixels[:, 2 * y + border : 2 * (y + height) + border, 2 * x + border : 2 * (x + width) + border]

        labels = text = None
        if nuclei:
            mask = (rng.random((1, *pixels.shape[1:])) < 0.3).astype(np.float32)

            def labels(*at, mask=mask, window=window):
                return window(*at, pixels=mask)

        if text_dim is not None:
            text = rng.normal(size=text_dim).astype(np.float32)
        low = Measurement.from_map(low, 4) if known else None
        sections.append(MapInputs(tissue, image=window, measurement=low, labels=labels, text=text, truth=counts))
    return MapData(sections, tile=tile, **{"stride": 4, **options})
