"""Gaussian diffusion: forward process, parameterizations, training loss and samplers.

Nothing here knows what is diffused. All functions broadcast over trailing dimensions, so that gene maps
``(B, G, H, W)`` and expression profiles ``(B, G)`` go through the same code. Noise levels follow the discrete
convention of DDPM (Ho et al., 2020): ``t`` runs from ``0`` (almost clean) to ``timesteps - 1`` (almost pure noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = ["Diffusion", "DiffusionLoss", "NoiseField", "centered_noise", "weighted_mean"]

Prediction = Literal["epsilon", "x_0", "v"]
Solver = Literal["dpm++", "ddim", "ddpm"]
Generators = torch.Generator | Sequence[torch.Generator] | None


class DiffusionLoss(NamedTuple):
    """Losses of a batch, and what the network was given and said; see :meth:`Diffusion.loss`."""

    losses: dict[str, Tensor]
    """The total under ``"loss"``, every term by its name."""
    x_t: Tensor
    """Noised values, shape ``(B, ...)``."""
    t: Tensor
    """Their noise levels, shape ``(B,)``."""
    prediction: Tensor
    """What the network made of them, of the shape of ``x_t``; :meth:`Diffusion.to_x_0` gives the estimate that it
    implies."""


@dataclass(frozen=True)
class Diffusion:
    """A discrete-time Gaussian diffusion: its noise schedule and what the network predicts.

    Parameters
    ----------
    timesteps
        Number of noise levels ``T``.
    schedule
        Name of the noise schedule, as diffusers calls it: ``"linear"`` (DDPM, Stem), ``"scaled_linear"`` (latent
        diffusion, C3-Diff) or ``"squaredcos_cap_v2"`` (cosine).
    beta_min, beta_max
        First and last variance of the linear schedules.
    prediction
        What the network's output means: the noise ``"epsilon"``, the clean value ``"x_0"`` or the velocity ``"v"``.
    learned_variance
        The network also outputs, along a new dimension 1, where the reverse variance lies between its two bounds
        (Nichol & Dhariwal, 2021). Only ancestral sampling uses it.

    Examples
    --------
    >>> import torch
    >>> from stgen.diffusion import Diffusion
    >>> diffusion = Diffusion(prediction="x_0")
    >>> x = diffusion.sample(lambda x_t, t: torch.full_like(x_t, 3.0), torch.randn(2, 5), steps=10)
    >>> bool(torch.allclose(x, torch.full((2, 5), 3.0)))
    True
    """

    timesteps: int = 1000
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_min: float = 1e-4
    beta_max: float = 0.02
    prediction: Prediction = "epsilon"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"`prediction` must be one of {', '.join(map(repr, get_args(Prediction)))}, found {self.prediction!r}."
            )

    # ---- forward process ---------------------------------------------------------------------------------------

    @cached_property
    def betas(self) -> Tensor:
        """Variances ``beta_t`` of the single noising steps, shape ``(T,)``; linear in Stem, Section 4."""
        from diffusers import DDPMScheduler  # heavy, and needed only once a model is used

        betas: Tensor = vars(DDPMScheduler(self.timesteps, self.beta_min, self.beta_max, self.schedule))["betas"]
        return betas.double()

    @cached_property
    def alpha_bars(self) -> Tensor:
        """Signal left at each level, ``alpha_bar_t = prod_{s<=t} (1 - beta_s)``, shape ``(T,)``."""
        return torch.cumprod(1 - self.betas, 0)

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """``alpha_bar_t`` shaped to broadcast against ``like``; level ``-1`` is the clean value, ``alpha_bar = 1``."""
        alpha_bars = torch.cat([self.alpha_bars, torch.ones(1, dtype=torch.float64)])
        return alpha_bars[t.cpu()].to(like).reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noised value ``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps``. DDPM, Eq. 4; Diff-ST, Eq. 1."""
        alpha_bar = self.alpha_bar(t, x_0)
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps

    # ---- what the network predicts -----------------------------------------------------------------------------

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output; ``v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0`` (Salimans & Ho)."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "x_0":
            return x_0
        alpha_bar = self.alpha_bar(t, x_0)
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0

    def to_x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Clean value implied by a prediction at ``x_t``; inverse of :meth:`target` given :meth:`add_noise`."""
        alpha_bar = self.alpha_bar(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
        if self.prediction == "x_0":
            return prediction
        return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * prediction

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction and, with a learned variance, its interpolation ``(v + 1) / 2`` between the two bounds."""
        return (output[:, 0], (output[:, 1] + 1) / 2) if self.learned_variance else (output, None)

    # ---- training ----------------------------------------------------------------------------------------------

    def loss(
        self, denoise: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, weight: Tensor | None = None
    ) -> DiffusionLoss:
        """Training loss at uniformly drawn noise levels.

        Parameters
        ----------
        denoise
            The network, ``(x_t, t) -> output``, with the condition bound.
        x_0
            Clean values, shape ``(B, ...)``.
        weight
            How much each value counts, of a shape that broadcasts to ``x_0``'s; all the same by default.

        Returns
        -------
        The losses, and the noised values, noise levels and predictions that they are of. Losses are ``"mse"``, the mean
        squared error of the prediction (DDPM, Eq. 14; Stem, Section 4), with a learned variance also ``"vlb"`` (in
        bits), and their sum ``"loss"``.

        Examples
        --------
        >>> import torch
        >>> from stgen.diffusion import Diffusion
        >>> diffusion = Diffusion(prediction="x_0")
        >>> step = diffusion.loss(lambda x_t, t: torch.ones_like(x_t), torch.ones(4, 5))
        >>> step.losses["mse"], torch.equal(diffusion.to_x_0(step.prediction, step.x_t, step.t), torch.ones(4, 5))
        (tensor(0.), True)
        """
        t = torch.randint(self.timesteps, (len(x_0),), device=x_0.device)
        eps = torch.randn_like(x_0)
        x_t = self.add_noise(x_0, eps, t)
        prediction, fraction = self.split(denoise(x_t, t))
        mse = weighted_mean((prediction - self.target(x_0, eps, t)).square(), weight)
        losses = {"loss": mse, "mse": mse.detach()}
        if fraction is not None:
            vlb = self.variational_term(prediction.detach(), fraction, x_0, x_t, t, weight)
            losses = {"loss": mse + vlb, "mse": mse.detach(), "vlb": vlb.detach()}
        return DiffusionLoss(losses, x_t, t, prediction)

    def variational_term(
        self, prediction: Tensor, fraction: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """KL divergence of the model's reverse step from the true one, mean in bits. Nichol & Dhariwal (2021), Eq. 4.

        At ``t = 0`` the true step has no variance and continuous data have no likelihood to put in its place: the
        term is zero there.
        """
        true_mean, true_log_var = self.posterior(x_0, x_t, t, t - 1)
        mean, log_var = self.posterior(self.to_x_0(prediction, x_t, t), x_t, t, t - 1, fraction)
        kl = log_var - true_log_var - 1 + (true_log_var - log_var).exp() + (true_mean - mean).square() / log_var.exp()
        kl = torch.where((t > 0).reshape(-1, *[1] * (x_0.ndim - 1)), kl / 2, 0)
        return weighted_mean(kl, weight) / math.log(2)

    # ---- sampling ----------------------------------------------------------------------------------------------

    def posterior(
        self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, fraction: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of ``q(x_s | x_t, x_0)`` for any earlier level ``s < t``. DDPM, Eq. 6 and 7.

        The variance is the fixed ``beta_tilde`` of Stem, Section 4. A ``fraction`` (of a learned variance)
        interpolates its logarithm towards that of ``beta``: Nichol & Dhariwal (2021), Eq. 15.
        """
        bar_t, bar_s = self.alpha_bar(t, x_t), self.alpha_bar(s, x_t)
        alpha = bar_t / bar_s
        beta = 1 - alpha
        mean = bar_s.sqrt() * beta / (1 - bar_t) * x_0 + alpha.sqrt() * (1 - bar_s) / (1 - bar_t) * x_t
        log_var = ((1 - bar_s) / (1 - bar_t) * beta).clamp(min=1e-20).log()
        if fraction is not None:
            log_var = fraction * beta.log() + (1 - fraction) * log_var
        return mean, log_var.expand_as(mean)

    def check_sampling(self, steps: int, solver: Solver) -> None:
        """Refuse an impossible number of steps or an unknown solver."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"`steps` must lie in 1..{self.timesteps} (the levels of the diffusion), found {steps}.")
        if solver not in get_args(Solver):
            raise ValueError(f"`solver` must be one of {', '.join(map(repr, get_args(Solver)))}, found {solver!r}.")

    @torch.no_grad()
    def sample(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x_t: Tensor,
        *,
        steps: int = 25,
        solver: Solver = "dpm++",
        noise: Callable[[], Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Solve the reverse process from pure noise to a clean value.

        Parameters
        ----------
        denoise
            The network, ``(x_t, t) -> output``, with the condition bound.
        x_t
            Standard normal noise, shape ``(B, ...)``.
        steps
            Number of network evaluations.
        solver
            ``"dpm++"`` (DPM-Solver++, second order) and ``"ddim"`` are deterministic given ``x_t``; ``"ddpm"`` is
            ancestral sampling, the published sampler of all four systems, where ``steps`` equals ``timesteps``.
        noise
            Draws what ``"ddpm"`` adds at each step; standard normal by default.
        project
            Applied to the estimate of the clean value at every step, for example to make it agree with a measurement.

        Returns
        -------
        The clean value, shape ``(B, ...)``.
        """
        self.check_sampling(steps, solver)

        def estimate(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            prediction, fraction = self.split(denoise(x_t, t))
            x_0 = self.to_x_0(prediction, x_t, t)
            return (x_0 if project is None else project(x_0)), fraction

        if solver == "ddpm":
            return self._ancestral(estimate, x_t, steps, noise or (lambda: torch.randn_like(x_t)))
        scheduler = self._scheduler(solver)
        levels = self.timesteps - torch.arange(steps, dtype=torch.float64) * self.timesteps / steps
        scheduler.set_timesteps(timesteps=(levels.round().long() - 1).tolist())  # diffusers' own miscount some `steps`
        for t in scheduler.timesteps:
            x_0, _ = estimate(x_t, t.expand(len(x_t)).to(x_t.device))
            x_t = scheduler.step(x_0, t, x_t).prev_sample
        return x_t

    def _ancestral(
        self,
        estimate: Callable[..., tuple[Tensor, Tensor | None]],
        x_t: Tensor,
        steps: int,
        noise: Callable[[], Tensor],
    ) -> Tensor:
        """Draw every ``x_s`` from its posterior given the estimated clean value. DDPM, Algorithm 2."""
        levels = torch.linspace(self.timesteps - 1, 0, steps).round().long()
        for t, s in zip(levels, [*levels[1:], torch.tensor(-1)], strict=True):
            t, s = t.expand(len(x_t)), s.expand(len(x_t))
            x_0, fraction = estimate(x_t, t.to(x_t.device))
            mean, log_var = self.posterior(x_0, x_t, t, s, fraction)
            x_t = mean if s[0] < 0 else mean + (log_var / 2).exp() * noise()
        return x_t

    def _scheduler(self, solver: str) -> Any:
        """The diffusers solver of that name, told that it is given clean values."""
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.timesteps,
            trained_betas=self.betas.float().numpy(),
            prediction_type="sample",
            algorithm_type="dpmsolver++",
            solver_order=1 if solver == "ddim" else 2,  # DDIM is DPM-Solver++ of first order (Lu et al., 2022)
        )


def weighted_mean(value: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of ``value``, weighted if need be; a weight broadcasts. Where all weights are zero, so is the mean.

    Examples
    --------
    >>> import torch
    >>> from stgen.diffusion import weighted_mean
    >>> weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]))
    tensor(2.)
    """
    if weight is None:
        return value.mean()
    weight = weight.expand_as(value)
    total = (value * weight).sum()
    return total / weight.sum().clamp(min=torch.finfo(total.dtype).tiny)


def centered_noise(n_samples: int, shape: Sequence[int], generator: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise for several samples of each item, whose mean over the samples is exactly zero.

    Each sample on its own is exactly standard normal: independent draws are centered and rescaled by
    ``sqrt(n / (n - 1))``. Whatever is linear in the noise then cancels exactly in the mean of the samples, so that a
    few samples give the mean that would otherwise take many; spread is the population standard deviation over the
    samples. The price: an ensemble is centered better than independent samples would be, which makes coverage look
    higher than theirs (by .016 at a nominal .9, for 20 samples of a perfect Gaussian model).
    Every item has its own generator, which makes the noise of an item independent of the batch in which it is drawn.

    Parameters
    ----------
    n_samples
        Number of samples of each item.
    shape
        Shape of one sample.
    generator
        One random generator for each of the ``B`` items.

    Returns
    -------
    Noise on the CPU, shape ``(B, n_samples, *shape)``.

    Examples
    --------
    >>> import torch
    >>> from stgen.diffusion import centered_noise
    >>> z = centered_noise(4, (3,), [torch.Generator().manual_seed(i) for i in range(2)])
    >>> z.shape, bool(z.mean(1).abs().max() < 1e-6)
    (torch.Size([2, 4, 3]), True)
    """
    z = torch.stack([torch.randn((n_samples, *shape), generator=g) for g in generator])
    if n_samples == 1:
        return z
    return (z - z.mean(1, keepdim=True)) * math.sqrt(n_samples / (n_samples - 1))


@dataclass(frozen=True)
class NoiseField:
    """Standard normal noise over the whole plane, for maps that are sampled window by window.

    The plane is made of square blocks, each drawn from a generator of its own that is seeded with its place. Whatever
    window reads a bin, at whatever time, finds the same noise there; nothing is kept. As in :func:`centered_noise`, the
    mean over the samples is exactly zero.

    Parameters
    ----------
    seed
        Random seed, not negative.
    n_samples
        Number of samples.
    n_channels
        Number of channels (genes).
    block
        Side of a block, in bins.

    Examples
    --------
    >>> import torch
    >>> from stgen.diffusion import NoiseField
    >>> noise = NoiseField(seed=0, n_samples=4, n_channels=2)
    >>> window = noise.field(-10, 0, 50, 40)
    >>> window.shape, torch.equal(window[:, :, 5:, 30:], noise.field(-5, 30, 45, 10))
    (torch.Size([4, 2, 50, 40]), True)
    """

    seed: int
    n_samples: int
    n_channels: int
    block: int = 32

    def field(
        self,
        y0: int,
        x0: int,
        height: int,
        width: int,
        step: int = 0,
        samples: slice = slice(None),
        channels: Sequence[int] | None = None,
    ) -> Tensor:
        """The noise in a window.

        Parameters
        ----------
        y0, x0, height, width
            The window, in bins; it may begin at negative rows and columns.
        step
            Which of many independent fields, for samplers that draw noise at every step.
        samples
            Which samples; all by default.
        channels
            Which channels, by number; all by default. Others are not drawn, but for their nearest neighbors.

        Returns
        -------
        Noise on the CPU, shape ``(selected samples, selected channels, height, width)``.
        """
        wanted = np.arange(self.n_channels) if channels is None else np.asarray(channels)
        out = torch.empty(len(range(self.n_samples)[samples]), len(wanted), height, width)
        for row in range(y0 // self.block, -(-(y0 + height) // self.block)):
            top = row * self.block
            for column in range(x0 // self.block, -(-(x0 + width) // self.block)):
                left = column * self.block
                y, x = max(top, y0), max(left, x0)
                y1, x1 = min(top + self.block, y0 + height), min(left + self.block, x0 + width)
                for group in np.unique(wanted // CHANNELS):
                    block = self._block(row, column, step, int(group))[samples]
                    at = np.flatnonzero(wanted // CHANNELS == group)
                    drawn = block[:, wanted[at] % CHANNELS, y - top : y1 - top, x - left : x1 - left]
                    out[:, at, y - y0 : y1 - y0, x - x0 : x1 - x0] = drawn
        return out

    def _block(self, row: int, column: int, step: int, group: int) -> Tensor:
        """All samples of one block of some channels, shape ``(n_samples, channels, block, block)``."""
        place = [2 * i if i >= 0 else -2 * i - 1 for i in (row, column)]  # seeds cannot be negative
        seed = np.random.SeedSequence([self.seed, step, *place, group]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        generator = torch.Generator().manual_seed(int(seed))
        n_channels = min(CHANNELS, self.n_channels - group * CHANNELS)
        return centered_noise(self.n_samples, (n_channels, self.block, self.block), [generator])[0]


CHANNELS = 64  # of a noise field that are drawn together
