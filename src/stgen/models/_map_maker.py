"""What models have in common that make maps of sections, whatever they were fitted on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import numpy as np

from stgen.data import MapInputs
from stgen.models._base import Model
from stgen.sampling import MapSampler, SamplingOptions

__all__ = ["MapMaker"]

D = TypeVar("D")


class MapMaker(Model[D]):
    """A model that makes maps of sections: it says what it looks at, and offers a sampler of windows.

    Its ``config`` has ``"bin_um"``, ``"px_per_bin"`` and ``"image_channels"``.

    Attributes
    ----------
    needs_image, needs_low_res
        What the model cannot do without.
    uses_low_res
        Whether the model looks at the low-resolution data where there are any, and was fitted for one factor.
    needs_all_genes
        Whether it takes what was measured of all genes, not only of its own.
    needs_labels, needs_text
        Whether the model looks at a mask of nuclei (``s`` in a batch), and takes a prompt (``text``), of which
        ``embed_prompt(prompt)`` makes a vector.
    consistent
        Whether maps are made to agree with the measurement unless that is declined.
    tissue_reach
        How far from what was measured tissue in the image gets a result, in pitches; 0 to leave it at what is near.
    """

    needs_low_res: bool = True
    uses_low_res: bool = True
    needs_labels: bool = False
    needs_text: bool = False
    needs_all_genes: ClassVar[bool] = False
    consistent: ClassVar[bool] = True
    tissue_reach: ClassVar[float] = 0.0

    @property
    def needs_image(self) -> bool:
        """Whether the model looks at the image."""
        return True

    @abstractmethod
    def sampler(self, inputs: MapInputs, genes: Sequence[str], options: SamplingOptions) -> MapSampler:
        """What makes the maps of a section, window by window.

        Raises
        ------
        ValueError
            If the options do not fit the model and the section.
        """

    def embed_prompt(self, prompt: str) -> np.ndarray:
        """What the model is told by a prompt, for one that takes it."""
        raise ValueError(f"this {type(self).__name__} takes no text.")
