from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stgen.diffusion import Diffusion, NoiseField, centered_noise, weighted_mean

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
PREDICTIONS = ["epsilon", "x_0", "v"]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def levels(*values):
    return torch.tensor(values)


# ---- forward process ------------------------------------------------------------------------------------------------


def test_linear_schedule_is_that_of_the_paper():
    diffusion = Diffusion()
    torch.testing.assert_close(
        diffusion.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), atol=1e-8, rtol=1e-6
    )
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(diffusion.alpha_bars, expected, rtol=1e-5)


def test_scaled_linear_schedule_is_that_of_latent_diffusion():
    diffusion = Diffusion(schedule="scaled_linear", beta_min=0.00085, beta_max=0.012)
    expected = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(diffusion.betas, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_only_falls(schedule):
    alpha_bars = Diffusion(schedule=schedule).alpha_bars
    assert len(alpha_bars) == 1000
    assert (alpha_bars.diff() < 0).all()
    assert alpha_bars[0] > 0.99
    assert alpha_bars[-1] < 0.01


@pytest.mark.parametrize("t", [0, 300, 999])
def test_noised_values_have_the_closed_form_moments(t):
    diffusion = Diffusion()
    n = 40_000
    x_t = diffusion.add_noise(torch.full((n, 1), 3.0), random(n, 1, dtype=torch.float32), torch.full((n,), t))
    alpha_bar = float(diffusion.alpha_bars[t])
    spread = (1 - alpha_bar) ** 0.5
    assert float(x_t.mean()) == pytest.approx(3 * alpha_bar**0.5, abs=4 * spread / n**0.5 + 1e-5)
    assert float(x_t.std()) == pytest.approx(spread, rel=0.02)


def test_noise_added_step_by_step_is_noise_added_at_once():
    diffusion = Diffusion(timesteps=50)
    mean, variance = 1.0, 0.0
    for beta in diffusion.betas.tolist():
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
    ones = torch.ones(1, 1, dtype=torch.float64)
    assert float(diffusion.add_noise(ones, 0 * ones, levels(49))) == pytest.approx(mean)
    assert float(diffusion.add_noise(0 * ones, ones, levels(49))) ** 2 == pytest.approx(variance)


def test_profiles_and_maps_go_through_the_same_code():
    diffusion = Diffusion(prediction="v")
    x_0, eps, t = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1), levels(5, 500, 999)
    maps = diffusion.target(diffusion.add_noise(x_0, eps, t), eps, t)
    profiles = diffusion.target(diffusion.add_noise(x_0.flatten(1), eps.flatten(1), t), eps.flatten(1), t)
    torch.testing.assert_close(maps.flatten(1), profiles)


def test_clean_level():
    like = torch.zeros(2, 3, 4)
    assert Diffusion().alpha_bar(levels(-1, 0), like).flatten().tolist() == pytest.approx([1, 1 - 1e-4])
    assert Diffusion().alpha_bar(levels(-1, 0), like).shape == (2, 1, 1)


# ---- parameterizations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_target_and_to_x_0_are_inverse(prediction, schedule):
    diffusion = Diffusion(prediction=prediction, schedule=schedule)
    x_0, eps, t = random(6, 7), random(6, 7, seed=1), levels(0, 1, 200, 500, 900, 998)
    x_t = diffusion.add_noise(x_0, eps, t)
    torch.testing.assert_close(diffusion.to_x_0(diffusion.target(x_0, eps, t), x_t, t), x_0, rtol=1e-6, atol=1e-6)


def test_velocity_is_orthogonal_to_the_noised_value():
    """(x_t, v) is (x_0, eps) rotated, so the sum of their squares is the same."""
    diffusion = Diffusion(prediction="v")
    x_0, eps, t = random(3, 7), random(3, 7, seed=1), levels(0, 500, 999)
    x_t, v = diffusion.add_noise(x_0, eps, t), diffusion.target(x_0, eps, t)
    torch.testing.assert_close(x_t.square() + v.square(), x_0.square() + eps.square())


# ---- posterior ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), [(1, 0), (500, 499), (999, 998), (999, 0), (800, 300)])
def test_posterior_is_bayes_rule(t, s):
    """q(x_s | x_t, x_0) is the normalized product of q(x_s | x_0) and q(x_t | x_s), two Gaussians in x_s."""
    diffusion = Diffusion()
    x_0, x_t = random(1, 4), random(1, 4, seed=1)
    bar_t, bar_s = diffusion.alpha_bars[t], diffusion.alpha_bars[s]
    alpha = bar_t / bar_s
    precision = 1 / (1 - bar_s) + alpha / (1 - alpha)
    expected = (bar_s.sqrt() * x_0 / (1 - bar_s) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    mean, log_var = diffusion.posterior(x_0, x_t, levels(t), levels(s))
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(log_var.exp(), torch.full_like(mean, float(1 / precision)))


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_of_adjacent_levels_is_that_of_diffusers(t):
    from diffusers import DDPMScheduler

    diffusion = Diffusion()
    scheduler = DDPMScheduler(
        1000, 1e-4, 0.02, "linear", variance_type="fixed_small", prediction_type="sample", clip_sample=False
    )
    x_0, x_t = random(2, 5, dtype=torch.float32), random(2, 5, seed=1, dtype=torch.float32)
    mean, log_var = diffusion.posterior(x_0, x_t, levels(t, t), levels(t - 1, t - 1))
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
    expected = scheduler.step(x_0, t, x_t, generator=torch.Generator().manual_seed(2)).prev_sample
    torch.testing.assert_close(mean + (log_var / 2).exp() * noise, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("t", "s", "r"), [(999, 500, 100), (20, 10, 1), (2, 1, 0)])
def test_posterior_steps_compose(t, s, r):
    """Integrating q(x_r | x_s, x_0) over q(x_s | x_t, x_0) gives q(x_r | x_t, x_0)."""
    diffusion = Diffusion()
    x_0, x_t, zero, one = random(1, 4), random(1, 4, seed=1), torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    mean_s, log_var_s = diffusion.posterior(x_0, x_t, levels(t), levels(s))
    mean_r, log_var_r = diffusion.posterior(x_0, mean_s, levels(s), levels(r))
    slope, _ = diffusion.posterior(zero, one, levels(s), levels(r))
    mean, log_var = diffusion.posterior(x_0, x_t, levels(t), levels(r))
    torch.testing.assert_close(mean_r, mean)
    torch.testing.assert_close(log_var_r.exp() + slope.square() * log_var_s.exp(), log_var.exp())


def test_posterior_at_the_clean_level_is_the_estimate():
    mean, log_var = Diffusion().posterior(random(2, 3), random(2, 3, seed=1), levels(0, 700), levels(-1, -1))
    torch.testing.assert_close(mean, random(2, 3))
    assert (log_var.exp() < 1e-19).all()


@pytest.mark.parametrize("t", [1, 500, 999])
def test_learned_variance_runs_from_beta_tilde_to_beta(t):
    diffusion = Diffusion(learned_variance=True)
    x = random(1, 3)

    def variance(fraction):
        fraction = torch.full_like(x, fraction)
        return float(diffusion.posterior(x, x, levels(t), levels(t - 1), fraction)[1].exp()[0, 0])

    beta = float(diffusion.betas[t])
    beta_tilde = beta * float((1 - diffusion.alpha_bars[t - 1]) / (1 - diffusion.alpha_bars[t]))
    assert variance(1.0) == pytest.approx(beta)
    assert variance(0.0) == pytest.approx(beta_tilde)
    assert variance(0.5) == pytest.approx((beta * beta_tilde) ** 0.5)


def test_split():
    prediction, fraction = Diffusion(learned_variance=True).split(torch.tensor([[[5.0], [-1.0]], [[6.0], [1.0]]]))
    assert prediction.tolist() == [[5.0], [6.0]]
    assert fraction.tolist() == [[0.0], [1.0]]
    output = torch.ones(2, 3)
    assert Diffusion().split(output) == (output, None)


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_zero_for_a_network_that_knows_the_answer(prediction):
    diffusion = Diffusion(prediction=prediction)
    x_0 = random(16, 3, dtype=torch.float32)

    def denoise(x_t, t):
        alpha_bar = diffusion.alpha_bar(t, x_0)
        return diffusion.target(x_0, (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt(), t)

    assert float(diffusion.loss(denoise, x_0).losses["loss"]) < 1e-4


def test_losses_of_a_network_that_starts_at_zero():
    torch.manual_seed(0)
    diffusion = Diffusion(learned_variance=True)
    losses = diffusion.loss(lambda x_t, t: torch.zeros(len(x_t), 2, 50), random(2048, 50, dtype=torch.float32)).losses
    assert float(losses["mse"]) == pytest.approx(1, abs=0.02)
    assert 0 < float(losses["vlb"]) < 0.05
    assert float(losses["loss"]) == pytest.approx(float(losses["mse"] + losses["vlb"]))
    assert set(Diffusion().loss(lambda x_t, t: x_t, random(4, 2)).losses) == {"loss", "mse"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_variational_term_is_zero_when_the_steps_agree(prediction):
    diffusion = Diffusion(prediction=prediction, learned_variance=True)
    x_0, eps, t = random(5, 4), random(5, 4, seed=1), levels(0, 1, 2, 500, 999)
    x_t = diffusion.add_noise(x_0, eps, t)
    target = diffusion.target(x_0, eps, t)
    zero = diffusion.variational_term(target, torch.zeros_like(x_0), x_0, x_t, t)
    assert float(zero) == pytest.approx(0, abs=1e-8)
    assert float(diffusion.variational_term(target + 0.1, torch.zeros_like(x_0), x_0, x_t, t)) > 1e-6
    assert float(diffusion.variational_term(target, torch.ones_like(x_0), x_0, x_t, t)) > 1e-4


def test_variational_term_is_the_kl_divergence_of_two_gaussians_in_bits():
    from torch.distributions import Normal, kl_divergence

    diffusion = Diffusion(learned_variance=True)
    x_0, eps, t, fraction = random(2, 3), random(2, 3, seed=1), levels(40, 700), torch.full((2, 3), 0.7).double()
    x_t, prediction = diffusion.add_noise(x_0, eps, t), random(2, 3, seed=2)
    mean, log_var = diffusion.posterior(x_0, x_t, t, t - 1)
    other_mean, other_log_var = diffusion.posterior(diffusion.to_x_0(prediction, x_t, t), x_t, t, t - 1, fraction)
    expected = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(other_mean, (other_log_var / 2).exp()))
    found = diffusion.variational_term(prediction, fraction, x_0, x_t, t)
    assert float(found) == pytest.approx(float(expected.mean()) / math.log(2))


def test_variational_term_has_nothing_to_say_at_the_first_level():
    """The true step from there has no variance, and continuous data no likelihood."""
    diffusion = Diffusion(learned_variance=True)
    x, fraction = random(2, 3), torch.full((2, 3), 0.5).double().requires_grad_()
    term = diffusion.variational_term(x + 9, fraction, x, x, levels(0, 0))
    term.backward()
    assert float(term.detach()) == 0
    assert (fraction.grad == 0).all()


def test_variational_term_teaches_only_the_variance():
    x_0 = random(64, 3, dtype=torch.float32)
    gradients = {}
    for learned in (False, True):
        output = torch.full((64, 2, 3), 0.3, requires_grad=True)
        diffusion = Diffusion(learned_variance=learned)
        torch.manual_seed(0)
        losses = diffusion.loss(lambda x_t, t, o=output, both=learned: o if both else o[:, 0], x_0).losses
        losses["loss"].backward()
        gradients[learned] = output.grad
    assert torch.equal(gradients[True][:, 0], gradients[False][:, 0])
    assert (gradients[True][:, 1] != 0).any()
    assert torch.isfinite(gradients[True]).all()


# ---- samplers -------------------------------------------------------------------------------------------------------

MEAN, SPREAD = torch.tensor([0.0, 2.0, -1.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()


def exact_denoiser(diffusion):
    """What a perfect network gives for independent Gaussian data N(MEAN, SPREAD ** 2): E[x_0 | x_t] in closed form."""

    def denoise(x_t, t):
        alpha_bar = diffusion.alpha_bar(t, x_t)
        gain = alpha_bar.sqrt() * SPREAD**2 / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        x_0 = MEAN + gain * (x_t - alpha_bar.sqrt() * MEAN)
        return diffusion.target(x_0, (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt(), t)

    return denoise


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("solver", "steps", "tolerance"), [("dpm++", 25, 0.03), ("ddim", 250, 0.03)])
def test_deterministic_samplers_reach_a_gaussian(prediction, solver, steps, tolerance):
    """For Gaussian data these are affine maps of the noise: offset and slope are the mean and spread they produce."""
    diffusion = Diffusion(prediction=prediction)
    x_t = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    offset, one = diffusion.sample(exact_denoiser(diffusion), x_t, steps=steps, solver=solver)
    torch.testing.assert_close(offset, MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(one - offset, SPREAD, atol=0, rtol=tolerance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ancestral_sampler_reaches_a_gaussian(prediction):
    """Also affine, in the noise of every step: a unit impulse at each step gives the variance without sampling."""
    diffusion = Diffusion(prediction=prediction, timesteps=300, beta_max=0.06)
    size = diffusion.timesteps + 1  # the start, the noise of all steps but the last, and nothing
    impulses = iter(torch.eye(size).double()[:, :, None].expand(-1, -1, 3))
    x = diffusion.sample(
        exact_denoiser(diffusion), next(impulses), steps=300, solver="ddpm", noise=lambda: next(impulses)
    )
    response = x - x[-1]
    torch.testing.assert_close(x[-1], MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(response.square().sum(0).sqrt(), SPREAD, atol=0, rtol=0.03)


@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_samples_by_monte_carlo(learned):
    """``learned`` with the network's variance at its upper bound, which is exact for data of unit variance."""
    diffusion = Diffusion(prediction="x_0", timesteps=100, beta_max=0.15, learned_variance=learned)
    denoise = exact_denoiser(diffusion)
    torch.manual_seed(0)
    x = diffusion.sample(
        lambda x_t, t: torch.stack([denoise(x_t, t), torch.ones_like(x_t)], 1) if learned else denoise(x_t, t),
        torch.randn(4000, 3).double(),
        steps=100,
        solver="ddpm",
    )
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.15, rtol=0)
    assert float(x[:, 0].std()) == pytest.approx(1, rel=0.04)


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7, 15, 25, 61, 77, 600, 1000])
def test_samplers_visit_each_level_once_and_end_clean(solver, steps):
    """With numbers of steps that do and do not divide the number of levels."""
    seen = []

    def denoise(x_t, t):
        seen.append(int(t[0]))
        return torch.full_like(x_t, 3.0)

    x = Diffusion(prediction="x_0").sample(denoise, random(2, 3, dtype=torch.float32), steps=steps, solver=solver)
    torch.testing.assert_close(x, torch.full((2, 3), 3.0))
    assert len(seen) == steps
    assert seen == sorted(set(seen), reverse=True)
    assert seen[0] == 999
    assert seen[-1] >= 0


def test_ddim_is_the_update_of_the_paper():
    """x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) eps, both estimated at x_t (Song et al., 2021, Eq. 12)."""
    diffusion = Diffusion(prediction="x_0")
    denoise = exact_denoiser(diffusion)
    x_t = expected = random(4, 3)
    visited = [999, 749, 499, 249, -1]
    for t, s in zip(visited[:-1], visited[1:], strict=True):
        t, s = torch.full((4,), t), torch.full((4,), s)
        x_0, alpha_bar = denoise(expected, t), diffusion.alpha_bar(t, x_t)
        eps = (expected - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        expected = diffusion.add_noise(x_0, eps, s)
    torch.testing.assert_close(diffusion.sample(denoise, x_t, steps=4, solver="ddim"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm"])
def test_project_is_honored(solver):
    """Every estimate of the clean value is made to sum to 5, and so does the sample."""
    diffusion = Diffusion(prediction="v")
    x = diffusion.sample(
        exact_denoiser(diffusion),
        random(4, 3),
        steps=20,
        solver=solver,
        project=lambda x_0: x_0 + (5 - x_0.sum(1, keepdim=True)) / 3,
    )
    torch.testing.assert_close(x.sum(1), torch.full((4,), 5.0).double())
    assert (x.std(0) > 0.1).all()


@pytest.mark.parametrize("steps", [0, 1001, -1])
def test_impossible_number_of_steps(steps):
    with pytest.raises(ValueError, match=rf"1\.\.1000.*found {steps}"):
        Diffusion().sample(lambda x_t, t: x_t, torch.zeros(1, 1), steps=steps)


def test_unknown_solver():
    with pytest.raises(ValueError, match=r"one of 'dpm\+\+', 'ddim', 'ddpm', found 'euler'"):
        Diffusion().sample(lambda x_t, t: x_t, torch.zeros(1, 1), solver="euler")


# ---- noise ----------------------------------------------------------------------------------------------------------


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("n_samples", [1, 2, 20])
def test_centered_noise_is_standard_normal_on_its_own(n_samples):
    from scipy.stats import kstest

    z = centered_noise(n_samples, (50,), generators(*range(200)))
    for sample in (z[:, 0], z[:, -1]):
        assert kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
    if n_samples > 1:
        assert float(z.mean(1).abs().max()) < 1e-6


def test_centered_noise_of_an_item_does_not_depend_on_its_batch():
    together = centered_noise(3, (4, 2), generators(5, 6, 7))
    assert together.shape == (3, 3, 4, 2)
    assert torch.equal(together[1:2], centered_noise(3, (4, 2), generators(6)))
    assert not torch.equal(together[0], together[1])


def test_noise_field_is_one_field_whatever_window_reads_it():
    noise = NoiseField(seed=3, n_samples=3, n_channels=2, block=8)
    whole = noise.field(-20, -11, 50, 40)
    assert whole.shape == (3, 2, 50, 40)
    assert torch.isfinite(whole).all()
    for y, x, height, width in [(-20, -11, 1, 1), (-9, 3, 13, 26), (0, 0, 8, 8), (-1, -1, 2, 2), (29, 28, 1, 1)]:
        inside = whole[:, :, y + 20 : y + 20 + height, x + 11 : x + 11 + width]
        assert torch.equal(noise.field(y, x, height, width), inside)
    assert torch.equal(NoiseField(3, 3, 2, 8).field(-20, -11, 50, 40), whole)


@pytest.mark.parametrize("n_samples", [1, 2, 5])
def test_noise_field_is_standard_normal_and_centered_over_the_samples(n_samples):
    from scipy.stats import kstest

    z = NoiseField(seed=0, n_samples=n_samples, n_channels=2).field(-40, -40, 90, 80)
    for sample in (z[0], z[-1]):
        assert kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
    if n_samples > 1:
        assert float(z.mean(0).abs().max()) < 1e-6


def test_noise_field_has_no_seams_and_no_repeats():
    """Neighboring bins are independent inside a block and across its border, and so are blocks, steps and seeds."""
    from itertools import combinations

    block = 16
    noise = NoiseField(seed=0, n_samples=1, n_channels=50, block=block)
    z = noise.field(-block, -block, 2 * block, 2 * block)[0]

    def correlation(a, b):
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert abs(correlation(z[:, :, block - 1], z[:, :, block])) < 4 / (50 * 2 * block) ** 0.5
    assert abs(correlation(z[:, 3], z[:, 4])) < 4 / (50 * 2 * block) ** 0.5
    blocks = [b for half in z.split(block, 1) for b in half.split(block, 2)]
    blocks += [noise.field(0, 0, block, block, step=1)[0], NoiseField(1, 1, 50, block).field(0, 0, block, block)[0]]
    for a, b in combinations(blocks, 2):
        assert abs(correlation(a, b)) < 4 / a.numel() ** 0.5


def test_noise_field_of_some_samples_is_that_of_all():
    noise = NoiseField(seed=1, n_samples=5, n_channels=2, block=8)
    window = (-3, 2, 12, 10)
    parts = [noise.field(*window, step=7, samples=slice(start, start + 2)) for start in (0, 2, 4)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), noise.field(*window, step=7))


@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "v"])
def test_loss_says_what_the_network_was_given_and_made_of_it(prediction):
    diffusion, seen = Diffusion(prediction=prediction), []

    def denoise(x_t, t):
        seen.append((x_t, t, torch.sin(x_t)))
        return seen[-1][2]

    step = diffusion.loss(denoise, random(16, 3))
    assert len(seen) == 1
    assert all(map(torch.equal, (step.x_t, step.t, step.prediction), seen[0]))
    assert step.x_t.shape == (16, 3)
    assert len(step.t.unique()) > 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_mean_does_not_depend_on_the_size_of_the_weights(dtype):
    value, weight = torch.tensor([1.0, 5.0], dtype=dtype), torch.tensor([3.0, 1.0], dtype=dtype)
    for scale in (1.0, 0.25, 2.0**-6):
        assert float(weighted_mean(value, scale * weight)) == pytest.approx(2)
    assert float(weighted_mean(value, torch.zeros(2, dtype=dtype))) == 0
    value.requires_grad_()
    weighted_mean(value, torch.zeros(2, dtype=dtype)).backward()
    assert (value.grad == 0).all()
