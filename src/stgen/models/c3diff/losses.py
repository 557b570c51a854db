"""The equations of C3-Diff: augmentation, contrastive losses, imputation, guidance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONTRASTIVE",
    "augment",
    "content_loss",
    "contrastive_loss",
    "guided",
    "impute",
    "inter_sphere_loss",
    "modal_loss",
]


def augment(z: Tensor, sigma: float, dim: int) -> Tensor:
    """``Norm(z + mu)`` with ``mu ~ N(0, sigma^2)``: noise, then back onto the unit hypersphere. C3-Diff, Eq. 1."""
    return F.normalize(z + sigma * torch.randn_like(z), dim=dim)


def contrastive_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """``-log(e^p / (e^p + sum_k e^n_k))``, the mean over anchors and their positives. C3-Diff, ``L_cl``.

    Parameters
    ----------
    positive
        Similarities ``z . z+ / tau`` of each anchor to its positives, shape ``(n, P)``; minus infinity where a pair is
        not one.
    negatives
        Similarities ``z . z- / tau``, shape ``(n, K)``; minus infinity where a pair is none.

    Returns
    -------
    A scalar; zero where no anchor has a positive and a negative.
    """
    against = negatives.logsumexp(1, keepdim=True).expand_as(positive)
    counted = positive.isfinite() & against.isfinite()
    terms = F.softplus(torch.where(counted, against - positive, 0.0))
    return (terms * counted).sum() / counted.sum().clamp(min=1)


def modal_loss(z: dict[str, Tensor], present: Tensor, tau: Tensor) -> Tensor:
    """Cross-modal loss: a modality's features belong together, whatever the sample. C3-Diff, ``L_modal``.

    Anchor ``M_h^j``, positives ``M_h^k`` of other samples, negatives all ``M_y^k``; and with ``h`` and ``y`` exchanged.

    Parameters
    ----------
    z
        Embeddings ``"m_h", "c_h", "m_y", "c_y"`` of a batch, each ``(B, d)`` on the unit hypersphere; ``y``'s
        augmented.
    present
        Which samples have a low-resolution map, shape ``(B,)``: others take no part on its side.
    tau
        Temperature.
    """
    m_h, m_y = z["m_h"], z["m_y"][present]
    across = m_h @ m_y.T / tau
    return contrastive_loss(_others(m_h @ m_h.T / tau), across) + contrastive_loss(_others(m_y @ m_y.T / tau), across.T)


def content_loss(z: dict[str, Tensor], present: Tensor, tau: Tensor) -> Tensor:
    """Cross-content loss: the two modalities of a sample belong together. C3-Diff, ``L_content``.

    Anchor ``C_h^j``, positive ``C_y^j``, negatives ``C_h^k`` and ``C_y^k`` of other samples; and with ``h`` and ``y``
    exchanged. Parameters as in :func:`modal_loss`; samples without a low-resolution map are negatives only.
    """
    c_h, c_y = z["c_h"], z["c_y"][present]
    own = torch.eye(len(c_h), dtype=torch.bool, device=c_h.device)[:, present]  # (B, P)
    across = c_h @ c_y.T / tau
    positive = across.masked_fill(~own, -torch.inf)
    to_h = torch.cat([_others(c_h @ c_h.T / tau), across.masked_fill(own, -torch.inf)], 1)
    to_y = torch.cat([_others(c_y @ c_y.T / tau), across.T.masked_fill(own.T, -torch.inf)], 1)
    return contrastive_loss(positive, to_h) + contrastive_loss(positive.T, to_y)


def inter_sphere_loss(z: dict[str, Tensor], present: Tensor, tau: Tensor) -> Tensor:
    """Inter-sphere loss: both features of a histology image belong together. C3-Diff, ``L_inter-sphere``.

    Anchor ``M_h^j``, positive ``C_h^j``, negatives ``C_h^k`` of other samples. Parameters as in :func:`modal_loss`.
    """
    similarity = z["m_h"] @ z["c_h"].T / tau
    return contrastive_loss(similarity.diagonal()[:, None], _others(similarity))


CONTRASTIVE = {"modal": modal_loss, "content": content_loss, "inter_sphere": inter_sphere_loss}


def _others(similarity: Tensor) -> Tensor:
    """Similarities with minus infinity on the diagonal."""
    return similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=similarity.device), -torch.inf)


def impute(z_missing: Tensor, z_present: Tensor, f_y: Tensor, tau: Tensor | float) -> Tensor:
    """``sum_k w_kl f_y^k`` with ``w_kl`` the softmax over ``k`` of ``z_l . z_k / tau``. C3-Diff, dynamic imputation.

    Parameters
    ----------
    z_missing, z_present
        Embeddings of the histology of samples without and with a low-resolution map, shapes ``(L, d)`` and ``(K, d)``.
    f_y
        Features of the low-resolution maps, shape ``(K, ...)``.
    tau
        Temperature; infinity gives the arithmetic mean.

    Returns
    -------
    Shape ``(L, ...)``.
    """
    weight = (z_missing @ z_present.T / tau).softmax(1)
    return torch.tensordot(weight.to(f_y), f_y, 1)


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """``omega eps(x_t, c) + (1 - omega) eps(x_t)``: classifier-free guidance. C3-Diff, Preliminaries."""
    return weight * conditional + (1 - weight) * unconditional
