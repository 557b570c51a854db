"""Maps of one section from its own spots and image, with nothing else to learn from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stgen._spatial.records import provenance, shallow_copy
from stgen.kriging import Places
from stgen.measurement import Consistency, Measurement
from stgen.tl.superresolution.result import MapResult
from stgen.tl.superresolution.section_input import MeasuredSection
from stgen.tl.superresolution.section_model import Composition, Deviations, SectionModel
from stgen.tl.superresolution.windows import Tiling, Window

__all__ = ["superresolve_section"]

logger = logging.getLogger("stgen")

MOST_VALUES = 4e7  # in the largest arrays
MOST_BYTES = 8e9  # of a result in memory
MOST_GENES = 2000  # at a time
KERNELS = 7  # of which weights are kept, at most


def superresolve_section(
    sdata: SpatialData,
    image_key: str | None,
    genes: Sequence[str] | None,
    *,
    low_res: str | None,
    layer: str | None,
    bin_um: float | None,
    factor: int | None,
    like: str | None,
    n_samples: int,
    consistency: bool,
    key_added: str,
    keep_samples: bool,
    tile: int | None,
    seed: int,
    store: Path | None,
    mpp: float | None,
    copy: bool,
    progress: bool,
) -> SpatialData | None:
    """What :func:`stgen.tl.superresolve` does with ``model=None``; its checks of names and paths have been made."""
    section = MeasuredSection.of(
        sdata, image_key, low_res, genes, layer=layer, bin_um=bin_um, factor=factor, like=like, mpp=mpp
    )
    grid, spots, kept, genes = section.grid, section.spots, section.kept, section.genes
    if store is None:
        _check_memory(section, 1 + (n_samples > 1) + keep_samples * n_samples)
    if tile is not None and (isinstance(tile, bool) or tile != int(tile) or tile < 1):
        raise ValueError(f"`tile` must be a whole number of bins, found {tile!r}.")
    tissue = section.tissue()

    features = section.features(progress=progress)
    model = SectionModel(
        section.places(features), section.total[kept], section.most_variable(), spots.area[kept], seed=seed
    )
    deviations = model.deviations(n_samples, seed) if n_samples > 1 or keep_samples else None
    parts, tiling = _plan(section, n_samples, tile, consistency=consistency)
    windows, of_all_genes = tiling.windows(tissue), spots.with_counts(section.total[:, None])
    target = shallow_copy(sdata) if copy else sdata
    out_of_fold = []
    with (
        MapResult(
            grid, genes, n_samples if deviations else 0, key_added, keep_samples=keep_samples, store=store, tile=tiling.tile, total=True
        ) as result,
        tqdm(total=len(parts) * len(windows), desc="superresolve one section", unit="window", disable=not progress) as bar,
    ):  # fmt: skip
        for part in parts:
            measured = section.measured(genes[part])
            some = model.genes(measured.counts[kept])
            out_of_fold.append(some.out_of_fold(genes[part]))
            for window in windows:
                y, x, height, width = window.outer
                inside = tissue[y : y + height, x : x + width]
                own = inside & tiling.kept(window)
                maps, depth = _maps(model, some, deviations, features, spots, window)
                if consistency:
                    maps = _agreeing(maps, measured, window, inside)
                result.put(maps, own, y, x, part)
                if part.start == 0:
                    depth = next(_agreeing([depth], of_all_genes, window, inside)) if consistency else depth
                    result.put_total(depth, own, y, x)
                bar.update()
        predicted, scores = zip(*out_of_fold, strict=True)
        table = section.table(np.hstack(predicted), pd.concat(scores))
        n_trusted = int(table.var["trusted"].sum())
        entry = provenance(
            "tl.superresolve", model="Kriging", image=image_key, low_res=section.low_res, layer=layer, like=like, genes=genes, unit="counts per bin",
            bin_um=grid.bin_um, n_samples=n_samples, consistency=consistency, tile=tiling.tile, seed=seed, n_spots=len(kept),
            n_spots_left_out=len(spots) - len(kept), n_trusted=n_trusted, **model.summary(spots.pitch * grid.bin_um),
            **section.image_record(),
        )  # fmt: skip
        keys = result.hand_over(target, entry, table)
    logger.info(
        "superresolved %d genes in %d x %d bins of %.4g µm from %d spots into %s; %s. %d genes are predictable out of fold: "
        'see sdata.tables["%s"].var.',
        len(genes), grid.width, grid.height, grid.bin_um, len(kept), " and ".join(f'sdata.images["{key}"]' for key in keys),
        "sdata.write(path) saves it" if store is None else f"it is stored in {store}, which spatialdata.read_zarr reads",
        n_trusted, f"{key_added}_out_of_fold",
    )  # fmt: skip
    return target if copy else None


def _check_memory(section: MeasuredSection, n_maps: int) -> None:
    """Refuse a result in memory that is too large, with ``n_maps`` maps of each gene."""
    grid, n_genes = section.grid, len(section.genes)
    n_bytes = 4.0 * n_genes * grid.height * grid.width * n_maps
    if n_bytes > MOST_BYTES:
        raise ValueError(
            f"the maps of {n_genes} genes in {grid.height} x {grid.width} bins take {n_bytes / 1e9:.0f} GB. Stream them to "
            "disk with store=<path of a new store>, name fewer genes, or pass a larger bin_um."
        )


def _plan(
    section: MeasuredSection, n_samples: int, tile: int | None, *, consistency: bool
) -> tuple[list[slice], Tiling]:
    """Genes in parts, and the section in squares, such that arrays stay within bounds."""
    n_genes, n_spots = len(section.genes), len(section.kept)
    at_a_time = min(int(max(MOST_VALUES // (KERNELS * n_spots), 1)), MOST_GENES, n_genes)
    parts = [slice(i, min(i + at_a_time, n_genes)) for i in range(0, n_genes, at_a_time)]
    side = int(np.clip(np.sqrt(MOST_VALUES / max(4 * n_spots, (n_samples + 3) * at_a_time)), 16, 256))
    reach = int(np.ceil(section.spots.diameter)) + 1 if consistency else 0
    footprints = section.spots if consistency else None
    return parts, Tiling(int(tile or side), reach, section.grid.height, section.grid.width, footprints)


def _agreeing(
    maps: Iterable[np.ndarray], measured: Measurement, window: Window, tissue: np.ndarray
) -> Iterator[np.ndarray]:
    """Maps of a window, made to sum to what was measured."""
    agree = Consistency(measured, *window.outer, tissue=tissue)
    return (agree(torch.as_tensor(values, dtype=torch.float32)[None])[0].numpy() for values in maps)


def _maps(
    model: SectionModel,
    genes: Composition,
    deviations: Deviations | None,
    features: np.ndarray | None,
    spots: Measurement,
    window: Window,
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Samples of some genes in a window, counts per bin ``(G, h, w)`` one by one, and last the expected map; and the total."""
    top, left, height, width = window.outer
    y, x = np.mgrid[top : top + height, left : left + width] + 0.5
    xy = np.column_stack([x.ravel(), y.ravel()]).astype(np.float32) / np.float32(spots.pitch)
    if features is not None:
        features = features[:, top : top + height, left : left + width].reshape(len(features), -1).T
    places = Places(xy, features)
    composition, density = genes.at(places)

    def shaped(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values.reshape(height, width, -1), -1, 0)

    def maps() -> Iterator[np.ndarray]:
        if deviations is not None:
            draw, drawn = deviations
            for change in np.moveaxis(draw(places), 1, 0):
                changed = composition + change[:, :-1] @ genes.loadings[drawn[:-1]]
                yield shaped(genes.counts_of(changed, density + change[:, -1]))
        yield shaped(genes.counts_of(composition, density))

    return maps(), shaped(np.exp(np.minimum(density, model.most)))
