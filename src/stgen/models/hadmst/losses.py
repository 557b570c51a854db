"""Losses of HaDM-ST: semantic distillation (HSD), cross-modal alignment (CMSA), the adversarial ones (GDAL)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stgen.diffusion import weighted_mean
from stgen.models.hadmst.discriminator import DiscriminatorOutput

__all__ = [
    "adversarial_loss",
    "alignment_loss",
    "cosine_loss",
    "distillation_loss",
    "euclidean_loss",
    "hinge_loss",
    "info_nce_loss",
    "low_noise_mask",
    "region_pairs",
]

TAU = 0.07
PAIRS = 0.3  # share of the pairs of regions that are positives, and negatives


def distillation_loss(predicted: Tensor, x: Tensor, known: Tensor, token: int) -> Tensor:
    """Mean absolute error of what semantic features predict, against expression averaged over each token. HaDM-ST, HSD.

    Parameters
    ----------
    predicted
        Shape ``(B, G, H / token, W / token)``.
    x
        Expression on the network's scale, shape ``(B, G, H, W)``.
    known
        Which bins are known, shape ``(B, 1, H, W)``; a token counts by how much of it is.
    """
    share = F.avg_pool2d(known, token)
    target = F.avg_pool2d(x * known, token) / share.clamp(min=1e-6)
    return weighted_mean((predicted - target).abs(), share)


def alignment_loss(
    z_h: Tensor, z_y: Tensor, seen: Tensor, near: Tensor, euclidean_weight: float, info_nce_weight: float
) -> Tensor:
    """``L_contrast = L_cosine + lambda_1 L_euclidean + lambda_2 L_InfoNCE``. HaDM-ST, CMSA.

    Parameters
    ----------
    z_h, z_y
        Embeddings of the regions of both modalities, unit length, shape ``(B, rows, columns, d)``.
    seen
        Where something was measured, shape ``(B, rows, columns)``; other regions take no part.
    near
        Which two regions may be a positive pair, shape ``(R, R)``.
    euclidean_weight, info_nce_weight
        ``lambda_1`` and ``lambda_2``.

    Returns
    -------
    A scalar; zero if nothing was measured.
    """
    z_h, z_y, seen = z_h.flatten(1, 2), z_y.flatten(1, 2), seen.flatten(1)
    with torch.autocast(z_h.device.type, enabled=False):  # a distance of half precision has no gradient near zero
        z_h, z_y = (z if z.dtype == torch.float64 else z.float() for z in (z_h, z_y))
        similarity = z_h @ z_y.transpose(1, 2)
        positive, negative = region_pairs(similarity.detach(), seen, near)
        return (
            cosine_loss(similarity, positive, negative)
            + euclidean_weight * euclidean_loss(z_h, z_y, positive, negative)
            + info_nce_weight * info_nce_loss(similarity, seen)
        )


def region_pairs(similarity: Tensor, seen: Tensor, near: Tensor, share: float = PAIRS) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs of regions of each sample: the top and the bottom 30 % by similarity. HaDM-ST, CMSA.

    On the unit hypersphere cosine similarity and Euclidean distance rank pairs alike. Positives are sought among
    regions that lie together, negatives among all; a positive is never a negative.

    Parameters
    ----------
    similarity
        Of each region in the image to each in the low-resolution map, shape ``(B, R, R)``.
    seen
        Where something was measured, shape ``(B, R)``.
    near
        Which two regions lie together, shape ``(R, R)``.
    share
        The 30 %.

    Returns
    -------
    Boolean, each of shape ``(B, R, R)``.
    """
    both = seen[:, :, None] & seen[:, None, :]
    positive = _top(similarity, both & near, share)
    return positive, _top(-similarity, both & ~positive, share, both)


def _top(value: Tensor, candidates: Tensor, share: float, of: Tensor | None = None) -> Tensor:
    """The candidates with the largest values in each sample, as many as are ``share`` of ``of`` (of the candidates)."""
    count = ((candidates if of is None else of).flatten(1).sum(1) * share).ceil()
    order = value.masked_fill(~candidates, -torch.inf).flatten(1).argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]).unflatten(1, value.shape[1:]) & candidates


def cosine_loss(similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """``1 - s`` of positive and ``max(0, s)`` of negative pairs, the mean of each. HaDM-ST, ``L_cosine``."""
    return weighted_mean(1 - similarity, positive.to(similarity)) + weighted_mean(
        similarity.clamp(min=0), negative.to(similarity)
    )


def euclidean_loss(z_h: Tensor, z_y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """``d^2`` of positive and ``max(0, 1 - d)^2`` of negative pairs, the mean of each. HaDM-ST, ``L_euclidean``."""
    squared = (2 - 2 * z_h @ z_y.transpose(1, 2)).clamp(min=1e-12)  # of unit vectors
    far = (1 - squared.sqrt()).clamp(min=0).square()
    return weighted_mean(squared, positive.to(squared)) + weighted_mean(far, negative.to(squared))


def info_nce_loss(similarity: Tensor, seen: Tensor, tau: float = TAU) -> Tensor:
    """``-log softmax_k(s_jk / tau)`` at ``k = j``, the mean with both modalities exchanged. HaDM-ST, ``L_InfoNCE``.

    A region's positive is the same region in the other modality, its negatives are the sample's other regions.
    """
    both = seen[:, :, None] & seen[:, None, :]
    own = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
    logits = (similarity / tau).masked_fill(~(both | own), -torch.inf)  # never a row without any
    terms = [-logits.log_softmax(dim).diagonal(dim1=1, dim2=2) for dim in (1, 2)]
    return weighted_mean((terms[0] + terms[1]) / 2, seen.to(similarity))


def adversarial_loss(fake: DiscriminatorOutput) -> Tensor:
    """What the generator minimizes: ``-D(fake)``, the mean over genes and overall. HaDM-ST, GDAL; hinge version."""
    return -(fake.genes.mean() + fake.overall.mean()) / 2


def hinge_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> Tensor:
    """What the discriminator minimizes: ``max(0, 1 - D(real)) + max(0, 1 + D(fake))``. HaDM-ST, GDAL; hinge version."""
    genes, overall = (F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True))
    return (genes + overall) / 2


def low_noise_mask(t: Tensor, timesteps: int) -> Tensor:
    """Which items are judged: those at the lower half of the noise levels, or at least the least noised one.

    At the others an estimate is a mean over what might be, and ought to be blurred.

    Parameters
    ----------
    t
        Noise levels, shape ``(B,)``.
    timesteps
        How many there are.

    Returns
    -------
    Boolean, shape ``(B,)``.
    """
    return t < torch.clamp(t.min() + 1, min=timesteps // 2)
