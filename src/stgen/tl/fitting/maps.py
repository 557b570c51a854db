"""From sections with maps to the tiles that map models train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from spatialdata import SpatialData

from stgen._checks import check_prompt
from stgen._spatial.grid import Grid, get_map, map_counts_checked
from stgen._spatial.labels import labels_window
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import provenance
from stgen._spatial.section import find_image
from stgen.data import MapData, MapSection
from stgen.measurement import Measurement
from stgen.models import MapModel

__all__ = ["MapKeys", "check_genes", "check_uses", "cut_tiles", "gather_maps", "split_maps", "text_vectors"]

IN_MEMORY = 4e9  # bytes of a map or an image up to which it is read once and kept
BLOCK = 1024  # bins read at a time


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
) -> tuple[list[MapSection], dict[str, Any]]:
    """All sections with what goes with them on the grids of their maps, and a record of what they are."""
    if not sections:
        raise ValueError("`data` is an empty mapping; give at least one section.")
    if keys.map_key is None:
        raise ValueError(
            f"{type(model).__name__} is fitted on maps: pass map_key=<fine map in sdata.images>. stgen.pp.rasterize(sdata, "
            "bin_um=...) makes one from molecules or cells."
        )
    check_uses(model, labels_key=keys.labels_key, prompt=keys.prompt, low_res=keys.low_res, layer=keys.layer)
    unnamed = [name for name in sections if keys.prompt_of(name) is None]
    if model.needs_text and isinstance(keys.prompt, Mapping) and unnamed:
        raise ValueError(f"`prompt` has no entry for {', '.join(map(repr, unnamed))}; each section needs one.")
    prompts = text_vectors(model, [keys.prompt_of(name) for name in sections])
    gathered = [_section(model, name, sdata, keys, prompts) for name, sdata in sections.items()]
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
    model: MapModel,
    *,
    labels_key: str | None,
    prompt: str | Mapping[str, str] | None,
    low_res: str | Mapping[str, str] | None,
    layer: str | None,
) -> None:
    """Refuse what the model has no use for, and the lack of what it needs."""
    name = type(model).__name__
    if labels_key is not None and not model.needs_labels:
        raise ValueError(f"this {name} does not look at labels; leave `labels_key` out.")
    if labels_key is None and model.needs_labels:
        raise ValueError(
            f"this {name} looks at the nuclei: pass labels_key=<their mask in sdata.labels>. stgen.pp.segment_nuclei(sdata) "
            f"makes one from the image; {name}(..., segmentation=False) does without."
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


def _section(
    model: MapModel, name: str, sdata: SpatialData, keys: MapKeys, prompts: Mapping[str, np.ndarray]
) -> MapSection:
    """One section, checked against what the model takes."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"maps are in SpatialData objects; section {name!r} is a {type(sdata).__name__}.")
    config, element = model.config, get_map(sdata, keys.map_key, model.genes)
    grid = Grid.of_map(sdata, keys.map_key)
    if abs(grid.bin_um / config["bin_um"] - 1) > 0.01:
        raise ValueError(
            f"the map {keys.map_key!r} of section {name!r} has bins of {grid.bin_um:.4g} µm and the model is for "
            f"{config['bin_um']:g} µm; construct it with bin_um={grid.bin_um:.4g}, or rasterize to its bins."
        )
    labels = None
    if model.needs_labels:
        labels = _kept(labels_window(sdata, keys.labels_key, grid, px_per_bin=config["px_per_bin"]), grid)
    counts = element.data
    if counts.nbytes <= IN_MEMORY:
        counts = map_counts_checked(np.asarray(counts), f"the map {keys.map_key!r} of section {name!r}")
    tissue = np.isfinite(np.asarray(counts[0]))
    image = _no_image
    if model.needs_image:
        image_key = find_image(sdata, keys.image_key)
        image = grid.image_window(sdata, image_key, px_per_bin=config["px_per_bin"])
        if image.n_channels != config["image_channels"]:
            raise ValueError(
                f"the image {image_key!r} of section {name!r} has {image.n_channels} channels "
                f"({', '.join(image.channels[:6])}) and the model takes {config['image_channels']}; construct it with "
                f"image_channels={image.n_channels}."
            )
        if grid.overlap(sdata, image_key) <= 0:
            raise ValueError(
                f"the image {image_key!r} and the map {keys.map_key!r} of section {name!r} do not overlap. Correct the "
                "transformation of one of them: spatialdata.transformations.set_transformation."
            )
        image.record()  # says what is in doubt about its values, and refuses an image of nothing
        image = _kept(image, grid)
    low_res, measurement = keys.low_res_of(name), None
    if low_res is None:
        measurement = pooled(counts, tissue, config["factor"])
    elif low_res:
        measurement = measurement_of(sdata, low_res, grid, model.genes, layer=keys.layer)
        if measurement.shape == "square" and round(measurement.diameter) != config["factor"]:
            raise ValueError(
                f"the bins of {low_res!r} of section {name!r} are {measurement.diameter:g} bins of the map wide and the "
                f"model's factor is {config['factor']}; construct it with factor={round(measurement.diameter)}."
            )
    elif model.needs_low_res:
        raise ValueError(
            f"`low_res` names no low-resolution data of section {name!r}, and this {type(model).__name__} cannot do without; "
            "name them, or construct a model that can (stgen.models.C3Diff or HaDMST with p_missing > 0)."
        )
    text = prompts[check_prompt(keys.prompt_of(name))] if model.needs_text else None
    return MapSection(counts, image, measurement, tissue, labels, text)


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


def check_genes(genes: list[str], sections: list[MapSection]) -> None:
    """Refuse genes without a count on the tissue of the sections, one by one so that a lazy map stays lazy."""
    empty = [
        gene for i, gene in enumerate(genes) if not any((np.asarray(s.counts[i])[s.tissue] > 0).any() for s in sections)
    ]
    if empty:
        raise ValueError(
            f"{len(empty)} gene(s) have no counts on the training tissue: {', '.join(empty[:5])}. Leave them out."
        )


def _no_image(y0: int, x0: int, height: int, width: int) -> np.ndarray:
    """What stands for the histology of a model that takes none."""
    return np.zeros((1, height, width), np.float32)


def _kept(image: Callable[..., np.ndarray], grid: Grid) -> Callable[..., np.ndarray]:
    """The same image, read once if it is small enough: tiles that overlap read it many times."""
    px, margin = image.px_per_bin, 64
    height, width = grid.height + 2 * margin, grid.width + 2 * margin
    if image.n_channels * height * width * px**2 * 4 > IN_MEMORY:
        return image
    whole = np.empty((image.n_channels, height * px, width * px), np.float32)
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            part = whole[:, y * px : (y + BLOCK) * px, x * px : (x + BLOCK) * px]
            part[:] = image(y - margin, x - margin, part.shape[1] // px, part.shape[2] // px)

    def window(y0: int, x0: int, height: int, width: int) -> np.ndarray:
        if max(y0 + height - grid.height, x0 + width - grid.width) > margin:  # a section smaller than a tile
            return image(y0, x0, height, width)
        y, x = (y0 + margin) * px, (x0 + margin) * px
        return whole[:, y : y + height * px, x : x + width * px]

    return window


def split_maps(
    sections: list[MapSection], share: float, side: int, rng: np.random.Generator
) -> tuple[list[MapSection], list[MapSection]]:
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


def cut_tiles(model: MapModel, sections: list[MapSection], tile: int, what: str, **options: Any) -> MapData:
    """The tiles of some sections; an error if there are none."""
    data = MapData(sections, tile=tile, transform=model.transform, kernel=model.kernel, **options)
    if len(data) == 0:
        sizes = ", ".join(f"{s.tissue.shape[0]} x {s.tissue.shape[1]} ({s.tissue.mean():.0%} tissue)" for s in sections)
        raise ValueError(
            f"no tile of {tile} x {tile} bins has enough {what} tissue; the maps are {sizes}. Pass a smaller tile=, a "
            f"multiple of {model.align}, or more tissue."
        )
    return data
