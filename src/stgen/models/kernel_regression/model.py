"""Kernel regression: expression from neighbors and looks, in closed form."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from stgen._checks import check_positive, check_seed, check_whole
from stgen.data import Batch, MapInputs
from stgen.diffusion import Generators, Solver
from stgen.kernels import Places
from stgen.measurement import Footprints
from stgen.models._map_maker import MapMaker
from stgen.models.kernel_regression.applied import AppliedRegression, OtherSections, OwnSpots, blocks
from stgen.models.kernel_regression.inputs import (
    MeasuredSection,
    check_image,
    check_pixels,
    features_of,
    most_variable,
    pixel_um,
)
from stgen.models.kernel_regression.regression import GeneFields, Regression, Spots, composition
from stgen.models.kernel_regression.sampler import KernelSampler
from stgen.sampling import SamplingOptions
from stgen.train import History
from stgen.transforms import TransformName, transform_counts

__all__ = ["KernelRegression"]

FINEST_PX_UM = 2.0
BLOCKS = 16  # of one section that predict each other
DTYPES = {
    "features": torch.float64, "xy": torch.float64, "section": torch.int64, "counts": torch.float32, "guide": torch.float32,
    "total": torch.float64, "area": torch.float64, "guide_genes": torch.uint8, "pixel": torch.float64,
}  # fmt: skip


class KernelRegression(MapMaker[Sequence[MapInputs]]):
    """Expression as a Gaussian process of what places look like and, within a section, of where they are: in closed form.

    Fitted on the spots of one section, it makes maps of that section: two places are alike if they are near each other
    or look alike, in a proportion that the spots decide by predicting each of them from the others. Fitted on several,
    or applied to another section, it goes by looks: kernels of image features, whose noise is what predicts whole
    sections (or, of one, blocks of it) best from the others, for principal components that the genes share. Where the
    section to predict has spots of its own, what is left of those is kriged with space and looks on top.

    Nothing is trained: to fit is to remember the spots and what they look like.

    Parameters
    ----------
    genes
        Names of the genes.
    bin_um
        Side of a bin, in µm.
    image_channels
        Channels of the histology image; None to do without an image, which only gives maps of the section fitted on.
    px_per_bin
        Pixels along a bin at which the image is read; by default such that they are 2 µm.
    transform
        Scale on which locations are predicted, see :func:`stgen.transforms.transform_counts`. Maps are counts per bin.
    n_components
        Principal components through which genes are predicted in other sections.
    max_spots
        Spots that are learned from, of several sections, at most: more are drawn at random, as many from each.
    seed
        Random seed, for that and for the spots on which kernels are chosen.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen import models
    >>> from stgen.data import MapInputs
    >>> from stgen.measurement import Footprints, Measurement
    >>> y, x = np.divmod(np.arange(36), 6)
    >>> spots = Footprints(np.column_stack([y, x]) * 4 + 2.0, 4.0, "square", np.full(36, 16.0))
    >>> counts = np.column_stack([10 + 3 * x, 30 - 2 * x])
    >>> section = MapInputs(np.ones((24, 24), bool), measurement=Measurement(spots, counts, ("A", "B")))
    >>> model = models.KernelRegression(["A"], image_channels=None, transform="log1p_raw")
    >>> _ = model.fit([section])
    >>> model.predict_locations(section, spots)[0].shape
    (36, 1)
    """

    takes: ClassVar[Literal["locations", "maps", "sections"]] = "sections"
    stochastic: ClassVar[bool] = True
    needs_low_res = False
    uses_low_res = False
    needs_all_genes: ClassVar[bool] = True
    consistent: ClassVar[bool] = False
    tissue_reach: ClassVar[float] = 3.0

    features: Tensor
    xy: Tensor
    section: Tensor
    counts: Tensor
    guide: Tensor
    total: Tensor
    area: Tensor
    guide_genes: Tensor
    pixel: Tensor

    def __init__(
        self,
        genes: Sequence[str],
        *,
        bin_um: float = 10.0,
        image_channels: int | None = 3,
        px_per_bin: int | None = None,
        transform: TransformName = "log1p_norm",
        n_components: int = 20,
        max_spots: int = 4000,
        seed: int = 0,
    ) -> None:
        check_positive("bin_um", bin_um)
        if image_channels is not None:
            check_whole("image_channels", image_channels)
        px_per_bin = (
            max(1, round(bin_um / FINEST_PX_UM)) if px_per_bin is None else check_whole("px_per_bin", px_per_bin)
        )
        check_whole("n_components", n_components)
        check_whole("max_spots", max_spots, least=100)
        check_seed(seed)
        super().__init__(
            genes=list(genes), bin_um=float(bin_um), image_channels=image_channels, px_per_bin=px_per_bin, transform=transform,
            n_components=n_components, max_spots=max_spots, seed=seed,
        )  # fmt: skip
        shapes = {"features": (0, 0), "xy": (0, 2), "counts": (0, len(self.genes)), "guide": (0, 0)}
        for name, dtype in DTYPES.items():
            self.register_buffer(name, torch.zeros(shapes.get(name, (0,)), dtype=dtype))
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from spots."""
        self._others: dict[int | None, OtherSections] = {}
        self._seen: tuple[weakref.ref[MapInputs], np.ndarray | None] | None = None

    @property
    def needs_image(self) -> bool:
        """Whether the model looks at the image."""
        return self.config["image_channels"] is not None

    @property
    def footprint_um(self) -> float:
        """Diameter in µm of a disc as large as the spots that were fitted on, on average."""
        return float(2 * (self.area.mean() / np.pi).sqrt()) * float(self.config["bin_um"])

    # ---- fit ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Sequence[MapInputs],
        validation: Sequence[MapInputs] | None = None,
        *,
        progress: bool = False,
        **options: Any,
    ) -> History:
        """Remember the spots of some sections (of validation, too), and what they look like.

        Parameters
        ----------
        train, validation
            Sections with a measurement of all genes and, unless the model does without, an image.
        progress
            Show a progress bar.

        Raises
        ------
        KeyError
            If a gene of the model was not measured.
        ValueError
            If there is no section, or one has too few spots, two of them in one place, or an image that does not fit.
        """
        self.check_options(**options)
        sections = [*train, *(validation or ())]
        if not sections:
            raise ValueError("a kernel regression needs at least one section to learn from.")
        measured = [self._measured(inputs) for inputs in sections]
        pixels = [pixel_um(inputs) for inputs in sections]
        if self.needs_image:
            for pixel in pixels:
                check_pixels(pixel, pixels[0], self.config["bin_um"])
        measured = self._some(measured)
        guide_genes = most_variable(measured)
        found: dict[str, list[np.ndarray]] = {name: [] for name in DTYPES}
        for number, section in enumerate(measured):
            spots = section.spots(self._features(section.inputs, progress=progress))
            features = np.zeros((len(spots), 0)) if spots.places.features is None else spots.places.features
            values = {
                "features": features, "xy": spots.places.xy, "section": np.full(len(spots), number), "total": spots.total,
                "area": spots.area, "counts": section.counts(self.genes), "guide": section.counts(guide_genes),
            }  # fmt: skip
            for name, value in values.items():
                found[name].append(value)
        found["guide_genes"].append(np.frombuffer("\n".join(guide_genes).encode(), np.uint8))
        found["pixel"].append(np.array(pixels))
        seen = self._seen
        for name, parts in found.items():
            setattr(self, name, torch.as_tensor(np.concatenate(parts)).to(self.device, DTYPES[name], copy=True))
        self._forget()
        self._seen = seen
        self.record = {"n_sections": len(sections), "n_spots": len(self.total)}
        return {}

    def _measured(self, inputs: MapInputs) -> MeasuredSection:
        """A section with spots, checked."""
        self._check_image(inputs)
        return MeasuredSection.of(inputs, self.genes, self.config["bin_um"])

    def _check_image(self, inputs: MapInputs) -> None:
        if self.needs_image:
            config = self.config
            check_image(inputs.image, channels=config["image_channels"], px_per_bin=config["px_per_bin"])

    def _some(self, sections: list[MeasuredSection]) -> list[MeasuredSection]:
        """With the spots to remember: all, or of several sections as many of each as there is room for."""
        most = self.config["max_spots"]
        if len(sections) == 1 or sum(len(section.rows) for section in sections) <= most:
            return sections
        rng = np.random.default_rng(self.config["seed"])
        return [section.some(most // len(sections), rng) for section in sections]

    def _features(self, inputs: MapInputs, *, progress: bool = False) -> np.ndarray | None:
        """Features of every bin of a section; those of the last one are kept as long as it is."""
        if not self.needs_image:
            return None
        if self._seen is None or self._seen[0]() is not inputs:
            self._seen = weakref.ref(inputs), features_of(inputs, progress=progress)
        return self._seen[1]

    # ---- apply -------------------------------------------------------------------------------------------------------

    def applied_to(self, inputs: MapInputs, *, progress: bool = False) -> AppliedRegression:
        """The regression that predicts a section.

        Raises
        ------
        KeyError
            If the section has spots, in which a gene of the model was not measured.
        ValueError
            If the model is not fitted, or image and spots do not fit it; or it does without an image and this is
            another section.
        """
        if len(self.total) == 0:
            raise ValueError("this KernelRegression has not been fitted; call stgen.tl.fit(model, data) first.")
        self._check_image(inputs)
        section = None if inputs.measurement is None else self._measured(inputs)
        known = None if section is None else self._recognized(section)
        alone = known is not None and int(self.section.max()) == 0
        if not self.needs_image and not alone:
            raise ValueError(
                "this KernelRegression does without an image: it makes maps of the one section that it was fitted on, "
                "and no other."
            )
        if self.needs_image and known is None:
            check_pixels(pixel_um(inputs), float(self.pixel.max()), self.config["bin_um"])
        features = self._features(inputs, progress=progress)
        if section is None:
            return AppliedRegression(inputs, features, self.other_sections())
        others = None if alone else self.other_sections(known)
        own = OwnSpots.of(section, features, self._guide_genes(), others, seed=self.config["seed"])
        return AppliedRegression(inputs, features, own)

    def _recognized(self, section: MeasuredSection) -> int | None:
        """Number of the section, if it is one of those that were fitted on: the same counts in the same places."""
        xy, total = section.xy, section.total
        for number in range(int(self.section.max()) + 1):
            at = self.section == number
            known_xy, known_total = self.xy[at].cpu().numpy(), self.total[at].cpu().numpy()
            same = len(xy) == len(known_xy) and np.array_equal(total, known_total)
            if same and np.allclose(xy - xy[0], known_xy - known_xy[0], atol=1e-3):
                return number
        return None

    def other_sections(self, without: int | None = None) -> OtherSections:
        """The regression on looks from all sections that were fitted on, but one."""
        if without not in self._others:
            values = {name: getattr(self, name).cpu().numpy() for name in DTYPES}
            rows = np.flatnonzero(values["section"] != (-1 if without is None else without))
            xy, features, section, total, area = (
                values[name][rows] for name in ("xy", "features", "section", "total", "area")
            )
            several = len(np.unique(section)) > 1
            spots = Spots(Places(xy, features, section if several else None), total, area)
            guide = values["guide"][rows].astype(float)
            regression = Regression(
                spots, composition(guide, total), groups=section if several else blocks(xy, BLOCKS),
                n_components=self.config["n_components"], seed=self.config["seed"],
            )  # fmt: skip
            self._others[without] = OtherSections(regression, self.genes, values["counts"][rows].astype(float), guide)
        return self._others[without]

    def _guide_genes(self) -> list[str]:
        return bytes(self.guide_genes.cpu().numpy()).decode().split("\n")

    def sampler(self, inputs: MapInputs, genes: Sequence[str], options: SamplingOptions) -> KernelSampler:
        """What makes the maps of a section, window by window."""
        return KernelSampler(self.applied_to(inputs, progress=options.progress), genes, options)

    # ---- locations ---------------------------------------------------------------------------------------------------

    def predict_locations(
        self, inputs: MapInputs, footprints: Footprints, *, n_samples: int = 1, seed: int = 0, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Predict the expression of locations.

        Parameters
        ----------
        inputs
            The section; with its measurement, if what was measured there is to be used.
        footprints
            The locations, on the section's bins.
        n_samples
            Draws from which a spread is taken; 1 for none.
        seed
            Random seed of the draws.
        progress
            Show a progress bar.

        Returns
        -------
        The expected expression on the scale ``transform``, float32 ``(n, G)``; and the standard deviation of what the
        regression leaves open, which is not all that may be wrong, or None.
        """
        applied = self.applied_to(inputs, progress=progress)
        places, genes = applied.places_of(footprints), applied.genes(self.genes)
        found, depth = genes.at(places)
        expected = self._on_scale(genes, found, depth, footprints.area)
        if n_samples < 2:
            return expected, None
        draws = genes.draws(places, found, depth, applied.regression.deviations(n_samples, seed))
        return expected, np.std([self._on_scale(genes, *drawn, footprints.area) for drawn in draws], 0)

    def _on_scale(self, genes: GeneFields, found: np.ndarray, depth: np.ndarray, area: np.ndarray) -> np.ndarray:
        """Composition and depth of places with some area (in bins) on the scale of the model."""
        counts = genes.counts_of(found, depth) * area[:, None]
        return transform_counts(counts, genes.density(depth) * area, self.transform)

    @torch.no_grad()
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
        """Draw samples given features ``h`` ``(B, D)`` of places anywhere, as large as those fitted on, by looks alone.

        Returns
        -------
        Shape ``(B, n_samples, G)``, on the scale ``transform``. With one sample, it is what is expected.
        """
        others = self.other_sections()
        features = batch["h"].cpu().double().numpy()
        places, area = Places(np.zeros((len(features), 2)), features), np.full(len(features), float(self.area.mean()))
        genes = others.genes(self.genes)
        found, depth = genes.at(places)
        if n_samples == 1:
            return torch.as_tensor(self._on_scale(genes, found, depth, area))[:, None]
        own = generator[0] if isinstance(generator, Sequence) else generator
        drawn_from = int(torch.randint(2**31, (1,), generator=own))
        draws = genes.draws(places, found, depth, others.regression.deviations(n_samples, drawn_from))
        return torch.as_tensor(np.stack([self._on_scale(genes, *drawn, area) for drawn in draws], 1))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in DTYPES:  # their length is that of the training data
            if prefix + name in state_dict:
                buffer = getattr(self, name)
                setattr(self, name, buffer.new_empty(state_dict[prefix + name].shape))
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args)
