import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from ess_rl.gaussian import Gaussian, kl


def some(seed: int, *shape: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return Gaussian(mean, 0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64))


def oracle(g: Gaussian) -> Independent:
    return Independent(Normal(g.mean, g.log_std.exp().expand_as(g.mean)), 1)


def test_log_prob_and_entropy_equal_torch():
    g = some(0, 5, 4, 3)
    action = some(1, 5, 4, 3).mean
    assert g.log_prob(action).shape == (5, 4)
    torch.testing.assert_close(g.log_prob(action), oracle(g).log_prob(action))
    torch.testing.assert_close(g.entropy(), oracle(g).entropy())


def test_log_std_broadcasts():
    g = Gaussian(some(0, 5, 3).mean, torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(g.entropy(), oracle(g).entropy())
    torch.testing.assert_close(g.log_prob(torch.zeros(5, 3)), oracle(g).log_prob(torch.zeros(5, 3).double()))


def test_sample_by_hand():
    g = Gaussian(torch.tensor([1.0, -2.0]), torch.log(torch.tensor([0.5, 3.0])))
    # 1 + 0.5 * 2 = 2, -2 + 3 * (-1) = -5
    torch.testing.assert_close(g.sample(torch.tensor([2.0, -1.0])), torch.tensor([2.0, -5.0]))


def test_kl_by_hand():
    # sigma_p = 1, sigma_q = 2, shift 3: log 2 + (1 + 9) / 8 - 1/2
    p = Gaussian(torch.tensor([3.0]), torch.tensor([0.0]))
    q = Gaussian(torch.tensor([0.0]), torch.tensor([math.log(2.0)]))
    assert float(kl(p, q)) == pytest.approx(math.log(2.0) + 10.0 / 8.0 - 0.5)


def test_kl_equals_torch():
    p, q = some(2, 100, 6), some(3, 100, 6)
    torch.testing.assert_close(kl(p, q), kl_divergence(oracle(p), oracle(q)))


def test_kl_equals_monte_carlo():
    p, q = some(4, 2), some(5, 2)
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    action = p.sample(noise)
    log_ratio = p.log_prob(action) - q.log_prob(action)
    assert abs(log_ratio.mean() - kl(p, q)) < 5.0 * log_ratio.std() / math.sqrt(200_000)


def test_kl_of_equals_is_exactly_zero_and_so_is_its_gradient():
    g = some(6, 1000, 17)
    mean, log_std = (10.0 * g.mean).float().requires_grad_(), (3.0 * g.log_std).float().requires_grad_()
    value = kl(Gaussian(mean, log_std), Gaussian(mean.detach(), log_std.detach()))
    assert torch.equal(value, torch.zeros(1000))
    gradient = torch.autograd.grad(value.sum(), (mean, log_std))
    assert all(torch.equal(g, torch.zeros(1000, 17)) for g in gradient)


def test_a_small_kl_keeps_its_digits_in_float32():
    # Only the width differs, by d: KL = (e^(2 d) - 1) / 2 - d = d^2 + 2 d^3 / 3 + ... e^(2 d) - 1, computed literally,
    # would leave errors as large as the result.
    d = torch.linspace(2e-4, 2e-3, 100)
    nothing = torch.zeros(100, 1)
    value = kl(Gaussian(nothing, d[:, None]), Gaussian(nothing, nothing))
    torch.testing.assert_close(value, d.square() * (1.0 + 2.0 * d / 3.0), rtol=1e-2, atol=0.0)


def test_kl_is_not_negative_in_float32():
    g = some(7, 10_000, 3)
    p = Gaussian(g.mean.float(), g.log_std.float())
    q = Gaussian(p.mean + 1e-4, p.log_std + 1e-4)
    assert (kl(p, q) >= 0.0).all()
