"""One histology embedding per location."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from anndata import AnnData
from spatialdata import SpatialData
from torch import Tensor
from tqdm.auto import tqdm

from stgen._checks import check_types
from stgen._spatial.records import check_new_key, copied_table, made_by, provenance, record, shallow_copy
from stgen._spatial.section import Section, get_section, get_table
from stgen.data import dihedral
from stgen.pp._alignment import check_section, known_scales
from stgen.pp._encoders import Encoder, get_encoders, name_of
from stgen.train import check_device

__all__ = ["embed"]

logger = logging.getLogger("stgen")


@check_types
def embed(
    data: SpatialData | AnnData,
    *,
    image_key: str | None = None,
    model: str | Callable[[Tensor], Tensor] | Sequence[str | Callable[[Tensor], Tensor]] = "texture",
    patch_um: float | Sequence[float] | None = None,
    patch_px: int | None = None,
    mpp: float | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    coordinate_system: str | None = None,
    key_added: str | None = None,
    views: int = 1,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    copy: bool = False,
    progress: bool = True,
) -> SpatialData | AnnData | None:
    """Embed the histology around every location of a table.

    Square patches centered on the locations (spots, cells or grid tiles) are read lazily from the image, at
    ``patch_um / patch_px`` µm per pixel, and turned into vectors.

    Parameters
    ----------
    data
        SpatialData, or AnnData that follows the scanpy/squidpy Visium convention.
    image_key
        Image to read; None if there is one (SpatialData) or for ``"hires"`` (AnnData).
    model
        - ``"texture"``: color-deconvolved stain statistics, texture at several scales and nuclear features in discs
          of 128, 256, 512 and 1,024 µm. Needs no download and no GPU. The same for all rotations and reflections.
        - the name of a pathology encoder of lazyslide-models, such as ``"uni2"``, ``"virchow2"`` or ``"h-optimus-1"``
          (``pip install "stgen[encoders]"``).
        - any callable or ``torch.nn.Module`` that takes float tensors ``(n, c, h, w)`` in [0, 1], c = 3 for H&E, and
          returns ``(n, d)``. A module runs on ``device`` in evaluation mode, and is left as it was.
        - several of these, as a sequence or joined by ``"+"``: their embeddings are concatenated in that order. Stem
          uses UNI and CONCH: ``"uni+conch-madeleine"``, the second being CONCH before its text projection.
    patch_um
        Side of a patch in µm; default 112, and 128, 256, 512 and 1,024 for ``"texture"``. Several sides are
        concatenated.
    patch_px
        Side of a patch in pixels as the model gets it; default 128 for ``"texture"``, else what the encoder was
        trained on, 224 if it does not say.
    mpp
        µm per pixel, if the data do not say: of the image's finest level (SpatialData) or of the full-resolution image
        that ``obsm["spatial"]`` refers to (AnnData).
    table_key, shapes_key
        Which table, by name or by the element that it annotates; None where there is one candidate. All its rows must
        lie in one region.
    coordinate_system
        Where image and locations meet; None picks a micrometer one, then "global".
    key_added
        Key of the result; default ``f"X_{model}"``.
    views
        8 to embed all rotations and reflections of each patch too, for augmentation.
    batch_size
        Patches per step.
    device
        Where the model runs; default a GPU if there is one.
    overwrite
        Whether an existing key may be replaced.
    copy
        Whether to return a changed copy and leave ``data`` alone.
    progress
        Whether to show a progress bar.

    Returns
    -------
    None, or the copy. Writes to the table:

    - ``obsm[key_added]``: float32 embedding ``(n_obs, d)``, without a unit.
    - ``obsm[f"{key_added}_views"]``, with ``views=8``: float32 ``(n_obs, 8, d)`` in the order of
      :func:`stgen.data.dihedral`; view 0 equals ``obsm[key_added]``.
    - ``uns["stgen"][key_added]``: ``"model"`` and, in ``"by_name"``, whether its name is enough to embed again;
      ``"patch_um"`` and ``"patch_px"``, of all encoders one after the other, ``"default_patches"`` where neither was
      given, ``"patch_um_given"`` and ``"patch_px_given"`` where they were; ``"image_mpp"`` (µm per pixel of the image),
      ``"image_key"``, ``"n_features"``, ``"views"``, ``"function"``, ``"version"``; ``"image_full_scale"``, the value
      that was read as 1, where the type of the image does not say it, and ``"image_alpha"`` where it has opacity.

    Raises
    ------
    KeyError, ValueError, TypeError
        Missing image or coordinates, locations that do not fit the image, unknown model, existing key; before any work.
    ImportError
        An encoder is named and lazyslide-models is not installed.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.embed(sdata, table_key="spot_counts")
    >>> sdata["spot_counts"].obsm["X_texture"].shape[0] == sdata["spot_counts"].n_obs
    True
    """
    if views not in (1, 8):
        raise ValueError(f"`views` must be 1 or 8, found {views!r}.")
    if isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, found {batch_size!r}.")
    where = {"table_key": table_key, "shapes_key": shapes_key}
    home = check_device(device)
    encoders = get_encoders(model, patch_um=patch_um, patch_px=patch_px, device=home)
    section = get_section(
        data, image_key=image_key, mpp=mpp, coordinate_system=coordinate_system, need_image=True, **where
    )
    image = section.histology
    parts = list(model or []) if model is None or isinstance(model, list | tuple) else [model]
    if key_added is None:
        key_added = "X_" + "_".join(_label(part) for part in parts)
    ours = made_by(section.table, key_added, "pp.embed")
    for name in (key_added, f"{key_added}_views"):
        check_new_key(section.table.obsm, name, overwrite=overwrite, what="obsm", ours=ours)
    check_section(section, scales=known_scales(data))

    if image.n_channels != 3 and any(encoder.rgb_only for encoder in encoders):
        raise ValueError(
            f"The image {section.image_key!r} has {image.n_channels} channels "
            f"({', '.join(image.channels[:6])}); encoders of pathology models need the three of H&E. Pass another "
            'image_key=, or model="texture".'
        )
    finest = min(size / encoder.patch_px for encoder in encoders for size in encoder.sizes_um)
    if image.mpp > 2 * finest:
        logger.warning(
            "The image %r has %.3g µm per pixel, patches are read at %.3g: they are enlarged and carry less detail "
            "than the model expects. Use the full-resolution image, or larger patches (patch_um=).",
            section.image_key,
            image.mpp,
            finest,
        )

    features = _run(section, encoders, views=views, batch_size=batch_size, progress=progress)

    result = data
    if copy:
        result = shallow_copy(data) if isinstance(data, SpatialData) else copied_table(data)
    table = get_table(result, **where)
    table.obsm[key_added] = np.ascontiguousarray(features[:, 0])
    if views == 8:
        table.obsm[f"{key_added}_views"] = features
    elif f"{key_added}_views" in table.obsm:
        del table.obsm[f"{key_added}_views"]
    entry = provenance(
        "pp.embed",
        model="+".join(encoder.name for encoder in encoders),
        patch_um=_values([encoder.sizes_um for encoder in encoders]),
        patch_px=_values([(encoder.patch_px,) for encoder in encoders]),
        default_patches=patch_um is None and patch_px is None,
        patch_um_given=None if patch_um is None else _joined(np.atleast_1d(patch_um)),
        patch_px_given=None if patch_px is None else int(patch_px),
        image_key=section.image_key,
        image_mpp=image.mpp,
        **image.values.record(),  # its doubts are those of the check
        n_features=features.shape[2],
        views=views,
        by_name=all(isinstance(part, str) for part in parts),
    )
    record(table, key_added, entry)
    logger.info(
        "Embedded %d locations: obsm[%r]%s, %d features, float32.",
        len(features),
        key_added,
        f" and obsm[{key_added + '_views'!r}]" if views == 8 else "",
        features.shape[2],
    )
    return result if copy else None


def _label(model: object) -> str:
    if isinstance(model, str):
        return "_".join(part.strip() for part in model.split("+"))
    return name_of(model)


def _values(groups: Sequence[tuple[float, ...]]) -> float | str:
    values = [value for group in groups for value in group]
    return values[0] if len(values) == 1 else _joined(values)


def _joined(values: Iterable[float]) -> str:
    """The numbers as text that gives exactly them again."""
    return ", ".join(repr(float(value)).removesuffix(".0") for value in values)


@torch.no_grad()
def _run(section: Section, encoders: Sequence[Encoder], *, views: int, batch_size: int, progress: bool) -> np.ndarray:
    """Features (n, views, d) of all encoders and patch sizes, concatenated."""
    total = len(section.xy_px) * sum(len(encoder.sizes_um) for encoder in encoders)
    parts = []
    with tqdm(total=total, desc="embed", unit="patch", leave=False, **({} if progress else {"disable": True})) as bar:
        for encoder in encoders:
            with encoder.running():
                parts += [_one(section, encoder, size, views, batch_size, bar) for size in encoder.sizes_um]
    return np.concatenate(parts, axis=2)


def _one(section: Section, encoder: Encoder, size_um: float, views: int, batch_size: int, bar: tqdm) -> np.ndarray:
    """Features (n, views, d) of one encoder and patch size."""
    features = np.empty((len(section.xy_px), views, 0), dtype=np.float32)
    patches = section.histology.patches(section.xy_px, size_um=size_um, out_px=encoder.patch_px, batch_size=batch_size)
    for rows, values in patches:
        seen = _views(encoder, torch.from_numpy(values), size_um / encoder.patch_px, views)
        if not features.shape[2]:
            features = np.empty((len(section.xy_px), views, seen.shape[2]), dtype=np.float32)
        features[rows] = seen
        bar.update(len(rows))
    return features


def _views(encoder: Encoder, patches: Tensor, mpp: float, views: int) -> np.ndarray:
    if encoder.invariant:
        return np.repeat(_encode(encoder, patches, mpp)[:, None], views, axis=1)
    return np.stack([_encode(encoder, dihedral(patches, view), mpp) for view in range(views)], axis=1)


def _encode(encoder: Encoder, patches: Tensor, mpp: float) -> np.ndarray:
    out = encoder.encode(patches.contiguous(), mpp)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(patches):
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"The model {encoder.name!r} must return a tensor (n, d) for n = {len(patches)} patches; found {found}."
        )
    values = out.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"The model {encoder.name!r} returned NaN or infinite values.")
    return values
