import math

import pytest
import torch

from ess_rl.diagnostics import affinity, diagnose, share
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian


def test_by_hand():
    """One action dimension, equal widths of 1, means 1 apart: log rho = x - 1/2 at an action x, KL = 1/2.

    Two hundred actions with x - 1/2 = k log 2 / 100 for k = 1 .. 200.
    """
    log_ratio = torch.arange(1, 201).flip(0) * math.log(2.0) / 100.0
    action = (log_ratio + 0.5).view(20, 10, 1)
    b = Gaussian(torch.zeros_like(action), torch.zeros_like(action))
    found = diagnose(Gaussian(b.mean + 1.0, b.log_std), b, action, torch.ones(20, 10))
    assert float(found["ess_end"]) == pytest.approx(float(effective_sample_size(log_ratio)), rel=1e-5)
    assert found["ess_end_per_dim"] == found["ess_end"]
    assert float(found["behavior_kl_end"]) == pytest.approx(0.5)
    # Two of the 200 are 1 %, 100 are 50 %, 198 are 99 %.
    for name, k in (("log_ratio_q01", 2), ("log_ratio_q50", 100), ("log_ratio_q99", 198)):
        assert float(found[name]) == pytest.approx(k * math.log(2.0) / 100.0, abs=1e-5)
    # Equal advantages are 0 once centered: then all samples count equally.
    assert float(found["ess_end_advantage"]) == pytest.approx(float(found["ess_end"]), rel=1e-5)
    assert all(x.shape == () for x in found.values())


def test_dimensions_and_advantages_by_hand():
    """Two dimensions, ratios 1, 1, 4, 4 (e = 100 / (4 x 34) = 0.735) and advantages 5, 7, 6, 6: centered -1, 1, 0, 0.

    rho |A| = 1, 1, 0, 0: (1 + 1)^2 / (4 x 2) = 1/2.
    """
    action = torch.tensor([[0.5, 0.0], [0.5, 3.0], [0.5 + math.log(4.0), 0.0], [0.5 + math.log(4.0), -2.0]])
    b = Gaussian(torch.zeros(4, 2), torch.zeros(4, 2))
    pi = Gaussian(torch.tensor([1.0, 0.0]).expand(4, 2), b.log_std)
    found = diagnose(pi, b, action, torch.tensor([5.0, 7.0, 6.0, 6.0]))
    assert float(found["ess_end"]) == pytest.approx(100.0 / 136.0)
    assert float(found["ess_end_per_dim"]) == pytest.approx(math.sqrt(100.0 / 136.0))
    assert float(found["ess_end_advantage"]) == pytest.approx(0.5)
    # The band of 0.2 sqrt(2) contains the ratios of 1 with |A| = 1 each, without spread.
    assert [float(found[f"affinity{name}_end"]) for name in ("", "_eur", "_uc")] == pytest.approx([1, 1, 0], abs=1e-6)


def test_the_band_of_affinity_grows_with_the_dimensions():
    """Ratios exp(-0.75^2 / 2) = 0.755: outside 0.2, the band of one dimension, inside 0.2 sqrt(2) = 0.283."""
    for dimensions, inside in ((1, 0.0), (2, 1.0)):
        b = Gaussian(torch.zeros(4, dimensions), torch.zeros(4, dimensions))
        mean = torch.tensor([0.75, 0.0])[:dimensions].expand(4, dimensions)
        found = diagnose(Gaussian(mean, b.log_std), b, b.mean, torch.tensor([5.0, 7.0, 6.0, 6.0]))
        assert float(found["affinity_eur_end"]) == pytest.approx(inside)
        assert float(found["affinity_end"]) == pytest.approx(inside, abs=1e-3)


def test_affinity_by_hand():
    """Ratios 1, 1.1, 0.5, 1.5 and |A| 1, 3, 2, 2, epsilon 0.2: the first two lie in the band, EUR = 4 / 8.

    With L = log 1.1: mu = 3/4 L, UC^2 = (1 (3/4 L)^2 + 3 (1/4 L)^2) / 4 = 3/16 L^2.
    """
    log_ratio = torch.log(torch.tensor([1.0, 1.1, 0.5, 1.5]))
    advantage = torch.tensor([1.0, -3.0, 2.0, -2.0])
    found = affinity(log_ratio, advantage, 0.2)
    uc = math.sqrt(3.0 / 16.0) * math.log(1.1)
    assert float(found["affinity_eur"]) == pytest.approx(0.5)
    assert float(found["affinity_uc"]) == pytest.approx(uc, rel=1e-5)
    assert float(found["affinity"]) == pytest.approx(0.5 * math.exp(-uc / (0.5 * math.log(1.2))), rel=1e-5)
    scaled = affinity(log_ratio.view(2, 2), 1e3 * advantage.view(2, 2), torch.tensor(0.2))
    for name, x in found.items():
        torch.testing.assert_close(scaled[name], x)


def test_affinity_at_its_corners():
    ones, zeros = torch.ones(4), torch.zeros(4)
    assert float(affinity(zeros, ones, 0.2)["affinity"]) == 1.0  # fresh data
    assert float(affinity(zeros, zeros, 0.2)["affinity"]) == 0.0  # nothing to learn
    outside = affinity(torch.tensor([torch.inf, -torch.inf, 2.0, -2.0]), ones, 0.2)
    assert [float(x) for x in outside.values()] == [0.0, 0.0, 0.0]  # nothing in the band


def test_share_by_hand():
    mask = torch.tensor([True, False, True])
    assert float(share(torch.tensor([-1.0, 2.0, 1.0]), mask)) == 0.5
    assert float(share(torch.zeros(3), mask)) == 0.0
