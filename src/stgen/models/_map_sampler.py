"""How a network makes the maps of a section, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stgen.data import Batch, MapInputs, Rectangle, with_each
from stgen.diffusion import NoiseField
from stgen.measurement import Consistency, Measurement
from stgen.sampling import SamplingOptions, WindowMaps
from stgen.transforms import inverse_transform
from stgen.windows import Tiling, round_up

if TYPE_CHECKING:
    from stgen.models._maps import MapModel

__all__ = ["NetworkSampler"]

MOST_VALUES = 3e7  # samples x genes x bins that are in work at a time
LARGEST_TILE = 320
MOST_COUNTS = 1e6  # in a bin: what a sampler overshoots beyond it is not meant
TO_SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "log1p_raw": lambda counts: torch.log1p(counts.clamp(min=-0.5)),
    "log2p1_raw": lambda counts: torch.log2(counts.clamp(min=-0.5) + 1),
    "none": lambda counts: counts,
}


class NetworkSampler:
    """Maps of a model that is a network: conditions of a window in, samples out.

    All windows draw on one noise field and overlap by as much as the model needs to see.

    Parameters
    ----------
    model
        A fitted model of maps.
    inputs
        What is known of the section.
    genes
        Which of the model's genes to make maps of.
    options
        How to sample.

    Raises
    ------
    ValueError
        If the tile does not fit the model and the measurement.
    """

    has_total = False

    def __init__(self, model: MapModel, inputs: MapInputs, genes: Sequence[str], options: SamplingOptions) -> None:
        self.model, self.inputs, self.genes, self.options = model, inputs, list(genes), options
        self.n_samples = options.n_samples if model.stochastic else 1
        self.batch_size = min(options.batch_size, self.n_samples)
        self.measurement = inputs.measurement if options.consistency else None
        if self.measurement is not None and self.measurement.footprints.blocks is None:
            self.measurement = self.measurement[self.measurement.footprints.within(inputs.height, inputs.width)]
        self.tiling = self._plan()
        self.parts = self._parts()
        self._noise = NoiseField(options.seed, self.n_samples, len(model.genes))
        self._columns = [model.genes.index(gene) for gene in self.genes]

    def _plan(self) -> Tiling:
        """The given tile, checked, or the largest that keeps memory within bounds."""
        model, tile = self.model, self.options.tile
        low_res = None if self.inputs.measurement is None else self.inputs.measurement.footprints
        block = 1 if low_res is None else low_res.blocks or 1  # no square lies across a border of two cores
        footprints = None if self.measurement is None else self.measurement.footprints
        reach = 0
        if footprints is not None and footprints.blocks is None:  # discs do, and are seen whole
            reach = math.ceil(footprints.diameter) + 1
        height, width = (round_up(n, block) for n in (self.inputs.height, self.inputs.width))
        if model.fixed_tile:
            side = model.align
            only = max(side - 2 * reach, 0) // block * block
            if only == 0 or tile not in (None, only):
                raise ValueError(
                    f"{type(model).__name__} takes windows of {side} bins and no others, of which {only} can be kept "
                    f"with these low-resolution data; found tile={tile!r}. "
                    + ("Leave it out." if only else "Use data of higher resolution, or another model.")
                )
            return Tiling(only, (side - only) // 2, height, width, footprints, side)
        unit = math.lcm(model.align, block)
        margin = max(model.halo, round_up(reach, model.align))
        height, width = (round_up(n, model.align) for n in (height, width))
        if tile is None:
            at_a_time = 1 if model.gene_wise else len(model.genes)
            largest = min(math.sqrt(MOST_VALUES / (self.batch_size * at_a_time)) - 2 * margin, LARGEST_TILE)
            tile = min(max(unit, int(largest) // unit * unit), round_up(max(height, width), unit))
        elif isinstance(tile, bool) or tile != int(tile) or tile < unit or tile % unit:
            raise ValueError(
                f"`tile` must be a multiple of {unit} bins, what {type(model).__name__} and the low-resolution data "
                f"need; found {tile!r}. The next that fits is {max(unit, round_up(tile, unit))}."
            )
        return Tiling(int(tile), margin, height, width, footprints)

    def _parts(self) -> list[slice]:
        """All genes at once; or as many as memory takes, of a model that samples each by itself."""
        if not self.model.gene_wise:
            return [slice(0, len(self.genes))]
        tiling = self.tiling
        height, width = (min(tiling.tile + 2 * tiling.margin, n) for n in (tiling.height, tiling.width))
        most = max(1, int(MOST_VALUES // (self.batch_size * height * width)))
        return [slice(i, min(i + most, len(self.genes))) for i in range(0, len(self.genes), most)]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put the model on the device, and take it home."""
        home = self.model.device
        try:
            self.model.to(self.options.device).eval()
            yield
        finally:
            self.model.to(home)

    def maps(self, window: Rectangle, part: slice) -> WindowMaps:
        """Samples and expected map of some genes in a window."""
        return WindowMaps(values.cpu().numpy() for values in self._draw(window, self._columns[part]))

    def record(self) -> dict[str, Any]:
        """Sampler of a stochastic model, and what else the model says."""
        sampled = self.model.stochastic
        return {
            "steps": self.options.steps if sampled else None,
            "solver": self.options.solver if sampled else None,
            **self.model.sampling_options,
        }

    def report(self) -> None:
        """Nothing is known of spots."""

    def _conditions(self, window: Rectangle, columns: list[int]) -> Batch:
        """A batch of one: the window."""
        conditions = self.inputs.conditions(window, self.model.transform, self.model.kernel)
        if self.model.gene_wise:
            conditions["gene"] = torch.as_tensor(columns)
        return with_each(conditions, lambda value: value[None].to(self.options.device))

    def _agreement(self, window: Rectangle, columns: list[int]) -> Consistency | None:
        """What makes maps of a window agree with the measurement, if they are to."""
        measurement: Measurement | None = self.measurement
        if measurement is None:
            return None
        if self.model.gene_wise:
            measurement = measurement.of_genes(columns)
        return Consistency(measurement, *window, tissue=self.inputs.tissue_in(window)).to(self.options.device)

    @torch.no_grad()
    def _draw(self, window: Rectangle, columns: list[int]) -> Iterator[Tensor]:
        """Samples of some of the model's genes, counts ``(genes, height, width)`` one by one, and last the expected map.

        On the way to a sample, estimates are scaled toward the measurement but may stay negative: noise around zero
        then cancels in the mean of the samples, which is taken on the model's scale. It is the expected map, unless the
        model knows that without drawing. Samples and expected map are each brought to counts that are not negative and
        agree with the measurement.
        """
        model, transform, options = self.model, self.model.transform, self.options
        batch, agree = self._conditions(window, columns), self._agreement(window, columns)
        sampled, kept = (columns, slice(None)) if model.gene_wise else (None, columns)

        def scaled(x: Tensor) -> Tensor:
            counts = inverse_transform(x, transform).clamp(max=MOST_COUNTS)
            return TO_SCALE[transform](counts if agree is None else agree.toward(counts))

        def counts_of(x: Tensor) -> Tensor:
            counts = inverse_transform(x, transform).clamp(0, MOST_COUNTS)
            return (counts if agree is None else agree(counts))[:, kept]

        def noise_of(samples: slice) -> Callable[[], Tensor]:
            step = count()
            return lambda: self._noise.field(*window, next(step), samples, sampled)[None].to(options.device)

        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, self.n_samples, options.batch_size):
            samples = slice(start, min(start + options.batch_size, self.n_samples))
            drawn = model.sample(
                batch,
                samples.stop - samples.start,
                options.steps,
                solver=options.solver,
                noise=noise_of(samples),
                project=None if agree is None else scaled,
            )[0]
            for x in drawn:  # one by one: the sum does not depend on the batches
                total = total + x.double()
            yield from counts_of(drawn)
        expected = model.expect(batch)
        yield counts_of((total / self.n_samples).float()[None] if expected is None else expected)[0]
