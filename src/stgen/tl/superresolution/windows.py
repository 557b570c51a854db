"""Maps of whole sections, sampled window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from stgen._spatial.grid import Grid, ImageWindow
from stgen._spatial.labels import LabelsWindow
from stgen.data import low_resolution_input
from stgen.diffusion import NoiseField
from stgen.measurement import Consistency, Measurement
from stgen.models import Model
from stgen.tl.superresolution.result import MapResult
from stgen.transforms import inverse_transform

__all__ = ["Section", "Tiling", "Window", "sample_maps"]

MOST_VALUES = 3e7  # samples x genes x bins that are in work at a time
LARGEST_TILE = 320
MOST_COUNTS = 1e6  # in a bin: what a sampler overshoots beyond it is not meant
TO_SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "log1p_raw": lambda counts: torch.log1p(counts.clamp(min=-0.5)),
    "log2p1_raw": lambda counts: torch.log2(counts.clamp(min=-0.5) + 1),
    "none": lambda counts: counts,
}


@dataclass(frozen=True)
class Section:
    """What the maps of a section are made from, all on one grid."""

    model: Model
    grid: Grid
    image: ImageWindow | None
    measurement: Measurement | None
    tissue: np.ndarray  # (height, width), which bins get a result
    labels: LabelsWindow | None = None
    text: np.ndarray | None = None

    def batch(self, window: Window, device: str) -> dict[str, Tensor]:
        """The model's conditions in a window; the first dimension is 1."""
        batch = {}
        if self.image is not None:
            batch["h"] = torch.as_tensor(self.image(*window.outer))
        if self.labels is not None:
            batch["s"] = torch.as_tensor(self.labels(*window.outer))
        if self.text is not None:
            batch["text"] = torch.as_tensor(self.text)
        if self.measurement is not None:
            batch |= low_resolution_input(self.measurement, *window.outer, self.model.transform, self.model.kernel)
        return {name: value[None].to(device) for name, value in batch.items()}

    def tissue_in(self, window: Window) -> np.ndarray:
        """Which bins of a window get a result; none beyond the grid."""
        y, x, height, width = window.outer
        tissue = self.tissue[y : y + height, x : x + width]
        return np.pad(tissue, ((0, height - tissue.shape[0]), (0, width - tissue.shape[1])))


@dataclass(frozen=True)
class Window:
    """A square of the section that is sampled at once, as ``y, x, height, width`` in bins."""

    core: tuple[int, int, int, int]  # what is kept
    outer: tuple[int, int, int, int]  # what the model sees


@dataclass(frozen=True)
class Tiling:
    """How the grid is cut: into squares of ``tile`` bins, each sampled with a margin of ``margin`` bins around it.

    The grid is first widened to a multiple of what the model and square footprints need. Windows end at its edge, where
    a single window over the whole section would end too.
    """

    tile: int
    margin: int
    height: int
    width: int
    footprints: Measurement | None = None  # that samples are made to agree with
    side: int | None = None  # of every window, for models that take one size only

    @classmethod
    def plan(cls, section: Section, tile: int | None, *, batch: int, consistency: bool) -> Tiling:
        """The given tile, checked, or the largest that keeps memory within bounds."""
        model, grid, measurement = section.model, section.grid, section.measurement
        square = measurement is not None and measurement.blocks is not None
        block = measurement.blocks if square else 1  # no square lies across a border of two cores
        reach = 0 if square or not consistency else math.ceil(measurement.diameter) + 1  # discs do, and are seen whole
        footprints = measurement if consistency else None
        if consistency and not square:
            footprints = _within(measurement, grid)
        height, width = (_up(n, block) for n in (grid.height, grid.width))
        if model.fixed_tile:
            side = model.align
            only = max(side - 2 * reach, 0) // block * block
            if only == 0 or tile not in (None, only):
                raise ValueError(
                    f"{type(model).__name__} takes windows of {side} bins and no others, of which {only} can be kept with "
                    f"these low-resolution data; found tile={tile!r}. "
                    + ("Leave it out." if only else "Use data of higher resolution, or another model.")
                )
            return cls(only, (side - only) // 2, height, width, footprints, side)
        unit = math.lcm(model.align, block)
        margin = max(model.halo, _up(reach, model.align))
        height, width = (_up(n, model.align) for n in (height, width))
        if tile is None:
            at_a_time = 1 if model.gene_wise else len(model.genes)
            largest = min(math.sqrt(MOST_VALUES / (batch * at_a_time)) - 2 * margin, LARGEST_TILE)
            tile = min(max(unit, int(largest) // unit * unit), _up(max(height, width), unit))
        elif isinstance(tile, bool) or tile != int(tile) or tile < unit or tile % unit:
            raise ValueError(
                f"`tile` must be a multiple of {unit} bins, what {type(model).__name__} and the low-resolution data need; "
                f"found {tile!r}. The next that fits is {max(unit, _up(tile, unit))}."
            )
        return cls(int(tile), margin, height, width, footprints)

    def windows(self, tissue: np.ndarray) -> list[Window]:
        """The windows with tissue in their core, row by row."""
        corners = [(y, x) for y in range(0, self.height, self.tile) for x in range(0, self.width, self.tile)]
        return [self._window(y, x) for y, x in corners if tissue[y : y + self.tile, x : x + self.tile].any()]

    def _window(self, y: int, x: int) -> Window:
        height, width = min(self.tile, self.height - y), min(self.tile, self.width - x)
        (top, rows), (left, columns) = self._seen(y, height, self.height), self._seen(x, width, self.width)
        return Window((y, x, height, width), (top, left, rows, columns))

    def _seen(self, start: int, length: int, total: int) -> tuple[int, int]:
        """Where a window begins along one axis, and its length."""
        begin, end = max(start - self.margin, 0), min(start + length + self.margin, total)
        if self.side is None:
            return begin, end - begin
        return max(min(begin, total - self.side), 0), self.side

    def kept(self, window: Window) -> np.ndarray:
        """Which bins of the window its result is kept for, shape of ``window.outer``.

        Those of its core; but a disc that lies across the border of two cores belongs, with all the bins that it
        touches, to the one with its center. So each footprint comes from one window, in which it was made to agree.
        """
        y, x, height, width = window.core
        top, left, *shape = window.outer
        kept = np.zeros(shape, bool)
        kept[y - top : y - top + height, x - left : x - left + width] = True
        if self.footprints is None or self.footprints.blocks is not None:
            return kept
        rows, covered = self.footprints.coverage(*window.outer)
        if len(rows) == 0:
            return kept
        home = self.footprints.centers[rows] // self.tile == np.array([y, x]) // self.tile
        most, most_own = (
            part.max(0).toarray().reshape(shape) if part.shape[0] else np.zeros(shape, np.float32)
            for part in (covered, covered[home.all(1)])
        )
        return np.where(most > 0, most_own >= most, kept)


def sample_maps(
    section: Section,
    tiling: Tiling,
    result: MapResult,
    *,
    n_samples: int,
    batch_size: int,
    steps: int,
    solver: str,
    seed: int,
    device: str,
    progress: bool,
) -> None:
    """Sample all windows and put counts into the result."""
    model = section.model
    noise = NoiseField(seed, n_samples, len(model.genes))
    home, name = model.device, f"superresolve with {type(model).__name__}"
    windows = tiling.windows(section.tissue)
    try:
        model.to(device).eval()
        for window in tqdm(windows, desc=name, unit="window", **({} if progress else {"disable": True})):
            kept = tiling.kept(window) & section.tissue_in(window)
            (y, x), kept = _bounds(kept)
            top, left, *_ = window.outer
            for part in gene_parts(section, window, len(result.genes), batch=min(batch_size, n_samples)):
                columns = [model.genes.index(gene) for gene in result.genes[part]]
                samples = draw(
                    section,
                    window,
                    noise,
                    tiling.footprints,
                    columns,
                    batch_size=batch_size,
                    steps=steps,
                    solver=solver,
                    device=device,
                )
                values = (sample[:, y, x].cpu().numpy() for sample in samples)
                result.put(values, kept, top + y.start, left + x.start, part)
    finally:
        model.to(home)


def gene_parts(section: Section, window: Window, n_genes: int, *, batch: int) -> list[slice]:
    """The genes of a result in parts that are sampled at a time: as many as memory takes, if the model lets them."""
    if not section.model.gene_wise:
        return [slice(0, n_genes)]
    most = max(1, int(MOST_VALUES // (batch * math.prod(window.outer[2:]))))
    return [slice(i, min(i + most, n_genes)) for i in range(0, n_genes, most)]


@torch.no_grad()
def draw(
    section: Section,
    window: Window,
    noise: NoiseField,
    footprints: Measurement | None,
    columns: list[int],
    *,
    batch_size: int,
    steps: int,
    solver: str,
    device: str,
) -> Iterator[Tensor]:
    """Samples of some genes in a window, counts ``(genes, height, width)`` one by one, and after them the expected map.

    On the way to a sample, estimates are scaled toward the measurement but may stay negative: noise around zero then
    cancels in the mean of the samples, which is taken on the model's scale. It is the expected map, unless the model knows
    that without drawing. Samples and expected map are each brought to counts that are not negative and agree with the
    measurement. ``columns`` are the numbers of the genes among the model's.
    """
    model, transform = section.model, section.model.transform
    batch = section.batch(window, device)
    channels, kept = (columns, slice(None)) if model.gene_wise else (None, columns)  # sampled, and kept of those
    if model.gene_wise:
        batch["gene"] = torch.as_tensor(columns, device=device)[None]
    agree = None
    if footprints is not None:
        if model.gene_wise:
            footprints = footprints.with_counts(footprints.counts[:, columns])
        agree = Consistency(footprints, *window.outer, tissue=section.tissue_in(window)).to(device)

    def scaled(x: Tensor) -> Tensor:
        return TO_SCALE[transform](agree.toward(inverse_transform(x, transform).clamp(max=MOST_COUNTS)))

    def counts_of(x: Tensor) -> Tensor:
        counts = inverse_transform(x, transform).clamp(0, MOST_COUNTS)
        return (counts if agree is None else agree(counts))[:, kept]

    def noise_of(samples: slice) -> Callable[[], Tensor]:
        step = count()
        return lambda: noise.field(*window.outer, next(step), samples, channels)[None].to(device)

    total = 0
    for start in range(0, noise.n_samples, batch_size):
        samples = slice(start, min(start + batch_size, noise.n_samples))
        drawn = model.sample(
            batch,
            samples.stop - samples.start,
            steps,
            solver=solver,
            noise=noise_of(samples),
            project=None if agree is None else scaled,
        )[0]
        for x in drawn:  # one by one: the sum does not depend on the batches
            total = total + x.double()
        yield from counts_of(drawn)
    expected = model.expect(batch)
    yield counts_of((total / noise.n_samples).float()[None] if expected is None else expected)[0]


def _within(measurement: Measurement, grid: Grid) -> Measurement:
    """The discs that lie wholly on the grid: of the others, part was measured beyond it."""
    radius, diameter = measurement.diameter / 2, measurement.diameter
    rows = measurement.near(radius, radius, grid.height - diameter, grid.width - diameter, 1e-6)
    counts, centers, area = measurement.counts[rows], measurement.centers[rows], measurement.area[rows]
    return replace(measurement, counts=counts, centers=centers, area=area)


def _bounds(mask: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
    """The smallest rectangle that holds all of a mask, and the mask in it."""
    box = []
    for axis in (1, 0):
        at = np.flatnonzero(mask.any(axis))
        box.append(slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0))
    return tuple(box), mask[tuple(box)]


def _up(n: float, unit: int) -> int:
    """The next multiple of a unit."""
    return math.ceil(n / unit) * unit
