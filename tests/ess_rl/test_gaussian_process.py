"""The Gaussian process: one point by hand, its behavior at and away from its data, and the density of y."""

import itertools
import math

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_map

from ess_rl import gaussian_process
from ess_rl.gaussian_process import fit, init, kernel, log_marginal_likelihood, predict


def wave(count: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    obs = torch.linspace(-2.0, 2.0, count)[:, None]
    spread = noise * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return obs, torch.cat([torch.sin(2.0 * obs), 3.0 + 0.5 * obs], 1) + spread


def test_one_point_by_hand():
    """K = 1, noise 0.5: mean k y / 1.25 and variance 1 - k^2 / 1.25, k = exp(-1/2) one length scale away."""
    process = init(1, 1, 1, torch.device("cpu"))
    half, weights = gaussian_process._solve(torch.zeros(1, 1).double(), torch.tensor([[2.0]]).double(), 3.0, 0.5)
    process |= {"half": half.float(), "weights": weights.float(), "length_scale": torch.tensor(3.0)}
    mean, variance = predict(process, torch.tensor([[0.0], [3.0], [9.9]]))
    k = [1.0, math.exp(-0.5), math.exp(-0.5 * (9.9 / 3.0) ** 2)]
    assert mean[:, 0].tolist() == pytest.approx([2.0 * x / 1.25 for x in k], rel=1e-4)
    assert variance[:, 0].tolist() == pytest.approx([1.0 - x * x / 1.25 for x in k], rel=1e-4)


def test_before_any_point_nothing_is_known():
    mean, variance = predict(init(4, 3, 2, torch.device("cpu")), torch.randn(5, 3))
    assert (mean == 0.0).all() and (variance == 1.0).all() and variance.shape == mean.shape == (5, 2)


def test_it_knows_its_data_and_nothing_far_away():
    obs, action = wave(40)
    process = fit(obs, action)
    mean, variance = predict(process, obs)
    torch.testing.assert_close(mean, action, rtol=0.0, atol=0.03)
    assert (variance < 0.01 * action.var(0)).all()
    mean, variance = predict(process, torch.tensor([[40.0]]))
    torch.testing.assert_close(mean[0], action.mean(0), rtol=1e-4, atol=1e-4)  # its prediction far from all data
    torch.testing.assert_close(variance[0], action.var(0, correction=0), rtol=1e-4, atol=1e-4)


def test_noise_is_not_learned_by_heart():
    obs, action = wave(200, noise=0.2)
    mean, _ = predict(fit(obs, action), obs)
    assert (mean - wave(200)[1]).square().mean().sqrt() < 0.07


def test_the_marginal_likelihood_is_the_density_of_all_actions():
    """Up to the constant, -M log(2 pi) / 2 for each action: the quantity that `fit` maximizes."""
    obs, action = wave(12, noise=0.1)
    x, y = obs.double(), action.double()
    for length_scale, noise in itertools.product((0.5, 2.0), (0.1, 0.3)):
        covariance = kernel(x, x, length_scale) + noise**2 * torch.eye(12, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance)
        expected = normal.log_prob(y.T).sum() + 12 * math.log(2.0 * math.pi)
        torch.testing.assert_close(log_marginal_likelihood(x, y, length_scale, noise), expected)


def test_members_have_processes_of_their_own():
    both = [fit(*wave(20)), fit(*wave(20, noise=0.3))]
    together = {"obs": torch.randn(2, 6, 1)}
    stacked = tree_map(lambda *x: torch.stack(x), *both)
    mean, variance = vmap(predict)(stacked, together["obs"])
    for k, one in enumerate(both):
        alone = predict(one, together["obs"][k])
        torch.testing.assert_close((mean[k], variance[k]), alone, rtol=1e-4, atol=1e-5)
