"""From sections with maps to the tiles that map models train on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from spatialdata import SpatialData

from stgen._checks import check_prompt
from stgen._spatial.grid import Grid, get_map, map_counts_checked
from stgen._spatial.map_inputs import MapElements
from stgen._spatial.records import provenance
from stgen._spatial.section import find_image
from stgen.data import ImageReader, MapData, MapInputs
from stgen.measurement import Footprints, Measurement
from stgen.models import MapMaker, MapModel

__all__ = [
    "MapKeys",
    "check_genes",
    "check_uses",
    "cut_tiles",
    "gather_maps",
    "in_section",
    "split_maps",
    "text_vectors",
]

IN_MEMORY = 4e9  # bytes of a map or an image up to which it is read once and kept
BLOCK = 1024  # bins read at a time
MARGIN = 64  # bins around a section that are held too


class MapKeys(NamedTuple):
    """Where a section's map, histology and low-resolution data are."""

    map_key: str | None
    image_key: str | None
    low_res: str | Mapping[str, str] | None  # a mapping for sections of which some have none
    labels_key: str | None = None
    prompt: str | Mapping[str, str] | None = None  # a mapping for sections that differ
    layer: str | None = None  # of the tables that low_res names

    def low_res_of(self, section: str) -> str | None:
        """The key of a section's low-resolution data; ``None`` to pool its fine map, an empty one for none at all."""
        return self.low_res.get(section, "") if isinstance(self.low_res, Mapping) else self.low_res

    def prompt_of(self, section: str) -> str | None:
        """What a section's image shows."""
        return self.prompt.get(section) if isinstance(self.prompt, Mapping) else self.prompt


def gather_maps(
    model: MapModel, sections: Mapping[str, SpatialData], keys: MapKeys
) -> tuple[list[MapInputs], dict[str, Any]]:
    """All sections with what goes with them on the grids of their maps, and a record of what they are."""
    if not sections:
        raise ValueError("`data` is an empty mapping; give at least one section.")
    if keys.map_key is None:
        raise ValueError(
            f"{type(model).__name__} is fitted on maps: pass map_key=<fine map in sdata.images>. "
            "stgen.pp.rasterize(sdata, bin_um=...) makes one from molecules or cells."
        )
    check_uses(model, labels_key=keys.labels_key, prompt=keys.prompt, low_res=keys.low_res, layer=keys.layer)
    unnamed = [name for name in sections if keys.prompt_of(name) is None]
    if model.needs_text and isinstance(keys.prompt, Mapping) and unnamed:
        raise ValueError(f"`prompt` has no entry for {', '.join(map(repr, unnamed))}; each section needs one.")
    prompts = text_vectors(model, [keys.prompt_of(name) for name in sections])
    gathered = []
    for name, sdata in sections.items():
        with in_section(name, sections):
            gathered.append(_section(model, name, sdata, keys.map_key, keys, prompts))
    known = sum(section.tissue.sum() for section in gathered)
    record = {
        "sections": list(sections),
        "n_bins": int(known),
        "map_key": keys.map_key,
        "image_key": keys.image_key,
        "low_res": dict(keys.low_res) if isinstance(keys.low_res, Mapping) else keys.low_res,
        **({"layer": keys.layer} if keys.layer is not None else {}),
        **({"labels_key": keys.labels_key} if model.needs_labels else {}),
        **({"prompts": {prompt: vector.tolist() for prompt, vector in prompts.items()}} if model.needs_text else {}),
        **{k: v for k, v in provenance("tl.fit").items() if k == "version"},
    }
    return gathered, record


def check_uses(
    model: MapMaker[Any] | None,
    *,
    labels_key: str | None,
    prompt: str | Mapping[str, str] | None,
    low_res: str | Mapping[str, str] | None,
    layer: str | None,
) -> None:
    """Refuse what the model has no use for, and the lack of what it needs; without a model, what only models take."""
    if model is None:
        for argument, value in (("labels_key", labels_key), ("prompt", prompt)):
            if value is not None:
                raise ValueError(
                    f"`{argument}` is for models that take it, and there is none: leave it out, or pass model=."
                )
        return
    name = type(model).__name__
    if labels_key is not None and not model.needs_labels:
        raise ValueError(f"this {name} does not look at labels; leave `labels_key` out.")
    if labels_key is None and model.needs_labels:
        raise ValueError(
            f"this {name} looks at the nuclei: pass labels_key=<their mask in sdata.labels>. "
            f"stgen.pp.segment_nuclei(sdata) makes one from the image; {name}(..., segmentation=False) does without."
        )
    if prompt is not None and not model.needs_text:
        raise ValueError(
            f"this {name} takes no text; leave `prompt` out, or construct a model that takes one: HaDMST(..., "
            'text_encoder="hashed").'
        )
    if layer is not None and not low_res:
        raise ValueError(
            f"layer={layer!r} is that of a table of spots, and none was named: pass low_res=<table in sdata.tables>."
        )


def text_vectors(model: MapModel, prompts: list[str | None]) -> dict[str, np.ndarray]:
    """What the model makes of prompts, each embedded once; nothing for a model that takes none."""
    if not model.needs_text:
        return {}
    return {prompt: model.embed_prompt(prompt) for prompt in dict.fromkeys(map(check_prompt, prompts))}


@contextmanager
def in_section(name: str, sections: Mapping[str, Any]) -> Iterator[None]:
    """Errors say which of several sections they are about."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if len(sections) == 1:
            raise
        raise type(error)(f"section {name!r}: {error.args[0]}") from error


def _section(
    model: MapModel, name: str, sdata: SpatialData, map_key: str, keys: MapKeys, prompts: Mapping[str, np.ndarray]
) -> MapInputs:
    """One section, checked against what the model takes."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"maps are in SpatialData objects; section {name!r} is a {type(sdata).__name__}.")
    config, element = model.config, get_map(sdata, map_key, model.genes)
    grid = Grid.of_map(sdata, map_key)
    if abs(grid.bin_um / config["bin_um"] - 1) > 0.01:
        raise ValueError(
            f"the map {keys.map_key!r} has bins of {grid.bin_um:.4g} µm and the model is for "
            f"{config['bin_um']:g} µm; construct it with bin_um={grid.bin_um:.4g}, or rasterize to its bins."
        )
    low_res = keys.low_res_of(name)
    if low_res == "" and model.needs_low_res:
        raise ValueError(
            f"`low_res` names no low-resolution data of section {name!r}, and this {type(model).__name__} cannot do "
            "without; name them, or construct a model that can (stgen.models.C3Diff or HaDMST with p_missing > 0)."
        )
    counts = element.data
    if counts.nbytes <= IN_MEMORY:
        counts = map_counts_checked(np.asarray(counts), f"the map {keys.map_key!r}")
    elements = MapElements.find(
        sdata,
        image_key=find_image(sdata, keys.image_key) if model.needs_image else None,
        low_res=low_res or None,
        layer=keys.layer if low_res else None,
        labels_key=keys.labels_key,
        map_key=keys.map_key,
    )
    text = prompts[check_prompt(keys.prompt_of(name))] if model.needs_text else None
    inputs = elements.inputs(grid, model, text=text, truth=counts)
    if low_res is None:
        inputs = replace(inputs, measurement=pooled(counts, inputs.tissue, config["factor"]))
    elif low_res:
        _check_factor(inputs.measured.footprints, low_res, config["factor"])
    image, labels = (
        None if read is None else HeldImage.of(read, inputs.height, inputs.width)
        for read in (inputs.image, inputs.labels)
    )
    return replace(inputs, image=image, labels=labels)


def _check_factor(footprints: Footprints, low_res: str, factor: int) -> None:
    """Refuse a map that is coarser or finer than those the model is to sharpen."""
    found = round(footprints.diameter)
    if footprints.shape == "square" and found != factor:
        raise ValueError(
            f"the bins of {low_res!r} are {footprints.diameter:g} bins of the map wide and the model's factor is "
            f"{factor}; construct it with factor={found}."
        )


def pooled(counts: Any, tissue: np.ndarray, factor: int) -> Measurement:
    """The low-resolution data that a map gives when its own bins are summed over ``factor x factor`` blocks."""
    n_genes, height, width = counts.shape
    rows, columns = -(-height // factor), -(-width // factor)
    beyond = (0, rows * factor - height), (0, columns * factor - width)

    def sums(x: np.ndarray) -> np.ndarray:
        return np.pad(x, beyond).reshape(rows, factor, columns, factor).sum((1, 3))

    area = sums(tissue.astype(np.float32))
    low = np.stack([sums(np.nan_to_num(np.asarray(counts[g]))) for g in range(n_genes)])
    return Measurement.from_map(low, factor, area)


def check_genes(genes: list[str], sections: list[MapInputs]) -> None:
    """Refuse genes without a count on the tissue of the sections, one by one so that a lazy map stays lazy."""
    empty = [
        gene for i, gene in enumerate(genes) if not any((np.asarray(s.truth[i])[s.tissue] > 0).any() for s in sections)
    ]
    if empty:
        raise ValueError(
            f"{len(empty)} gene(s) have no counts on the training tissue: {', '.join(empty[:5])}. Leave them out."
        )


class HeldImage:
    """The same image, read once: tiles that overlap read it many times.

    Parameters
    ----------
    read
        The image.
    height, width
        Size of the grid in bins.
    """

    def __init__(self, read: ImageReader, height: int, width: int) -> None:
        self._read, self._height, self._width = read, height, width
        self.px_per_bin, self.n_channels = read.px_per_bin, read.n_channels
        px, height, width = read.px_per_bin, height + 2 * MARGIN, width + 2 * MARGIN
        self._whole = np.empty((read.n_channels, height * px, width * px), np.float32)
        for y in range(0, height, BLOCK):
            for x in range(0, width, BLOCK):
                part = self._whole[:, y * px : (y + BLOCK) * px, x * px : (x + BLOCK) * px]
                part[:] = read(y - MARGIN, x - MARGIN, part.shape[1] // px, part.shape[2] // px)

    @classmethod
    def of(cls, read: ImageReader, height: int, width: int) -> ImageReader:
        """Held, if it is small enough."""
        n_bins = (height + 2 * MARGIN) * (width + 2 * MARGIN)
        return read if read.n_channels * n_bins * read.px_per_bin**2 * 4 > IN_MEMORY else cls(read, height, width)

    def __call__(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """The image in some bins."""
        if max(y + height - self._height, x + width - self._width) > MARGIN:  # a section smaller than a tile
            return self._read(y, x, height, width)
        px = self.px_per_bin
        top, left = (y + MARGIN) * px, (x + MARGIN) * px
        return self._whole[:, top : top + height * px, left : left + width * px]


def split_maps(
    sections: list[MapInputs], share: float, side: int, rng: np.random.Generator
) -> tuple[list[MapInputs], list[MapInputs]]:
    """Hold out about ``share`` of each section's tissue, in whole blocks of at most ``side`` bins.

    A section has at least four blocks of equal size. Where one would be more than twice the share, none is held out.
    """
    if not 0 <= share < 0.9:
        raise ValueError(f"`validation` must be a share in [0, 0.9), found {share}.")
    train, held_out = [], []
    for section in sections:
        rows, columns = (max(2, -(-n // side)) for n in section.tissue.shape)
        y, x = (np.arange(n) * k // n for n, k in zip(section.tissue.shape, (rows, columns), strict=True))
        block = y[:, None] * columns + x
        known = np.bincount(block.ravel(), section.tissue.ravel(), rows * columns)
        chosen, so_far = [], 0.0
        for candidate in rng.permutation(np.flatnonzero(known)):
            if so_far < share * known.sum() and so_far + known[candidate] <= 2 * share * known.sum():
                chosen.append(candidate)
                so_far += known[candidate]
        apart = np.isin(block, chosen)
        train.append(replace(section, tissue=section.tissue & ~apart))
        held_out.append(replace(section, tissue=section.tissue & apart))
    return train, held_out


def cut_tiles(model: MapModel, sections: list[MapInputs], tile: int, what: str, **options: Any) -> MapData:
    """The tiles of some sections; an error if there are none."""
    data = MapData(sections, tile=tile, transform=model.transform, kernel=model.kernel, **options)
    if len(data) == 0:
        sizes = ", ".join(f"{s.tissue.shape[0]} x {s.tissue.shape[1]} ({s.tissue.mean():.0%} tissue)" for s in sections)
        raise ValueError(
            f"no tile of {tile} x {tile} bins has enough {what} tissue; the maps are {sizes}. Pass a smaller tile=, a "
            f"multiple of {model.align}, or more tissue."
        )
    return data
