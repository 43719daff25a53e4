import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.objectives import (
    bpo,
    divergence_slope,
    expert_mass,
    imitation,
    k3,
    p3o,
    p4o,
    ppo_band,
    ppo_clip,
    ppo_decoupled,
    ppo_generalized,
    ppo_kl,
    ppo_variance,
    subtrajectory_balance,
    vargrad_trajectory_balance,
    width_correction,
)
from ess_rl.returns import path_residuals, path_weights


def three_samples() -> dict[str, Any]:
    """Ratios 0.5, 1, 1.5: e = 3^2 / (3 * 3.5) = 6/7, so the weights min(rho, e) are 1/2, 6/7, 6/7."""
    behavior_log_prob = torch.tensor([-1.0, -2.0, -3.0])
    return {
        "log_prob": (behavior_log_prob + torch.log(torch.tensor([0.5, 1.0, 1.5]))).requires_grad_(),
        "behavior_log_prob": behavior_log_prob,
        "advantage": torch.tensor([1.0, 2.0, -1.0]),
        "behavior_kl": torch.tensor([0.1, 0.2, 0.3], requires_grad=True),
    }


def test_p3o_by_hand():
    samples = three_samples()
    loss, metrics, weight = p3o(**samples)
    # -(1/2 * 1 * (-1 + log 0.5) + 6/7 * 2 * (-2) + 6/7 * (-1) * (-3 + log 1.5)) / 3 + 1/7 * 0.2
    policy = 0.5 * (-1.0 + math.log(0.5)) - 24.0 / 7.0 - 6.0 / 7.0 * (-3.0 + math.log(1.5))
    assert float(loss.detach()) == pytest.approx(-policy / 3.0 + 0.2 / 7.0, rel=1e-5)
    # Through log_prob: -weight * advantage / 3. Through the KL: (1 - e) / 3.
    loss.backward()
    assert samples["log_prob"].grad is not None
    assert samples["log_prob"].grad.tolist() == pytest.approx([-0.5 / 3.0, -4.0 / 7.0, 2.0 / 7.0])
    assert samples["behavior_kl"].grad is not None
    assert samples["behavior_kl"].grad.tolist() == pytest.approx([1.0 / 21.0] * 3, rel=1e-5)
    assert float(metrics["ess"]) == pytest.approx(6.0 / 7.0)
    assert float(metrics["behavior_kl"]) == pytest.approx(0.2)
    assert float(metrics["capped_fraction"]) == pytest.approx(2.0 / 3.0)
    assert float(metrics["log_ratio_max"]) == pytest.approx(math.log(1.5))
    assert weight.tolist() == pytest.approx([0.5, 6.0 / 7.0, 6.0 / 7.0])
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())


def test_an_e_that_is_given_replaces_that_of_the_batch():
    samples = three_samples()
    loss, metrics, _ = p3o(**samples, ess=torch.tensor(0.75))
    loss.backward()
    assert samples["log_prob"].grad is not None and samples["behavior_kl"].grad is not None
    # Weights min(rho, 3/4) = 1/2, 3/4, 3/4; the KL has weight 1/4, a third of it each.
    assert samples["log_prob"].grad.tolist() == pytest.approx([-0.5 / 3.0, -1.5 / 3.0, 0.75 / 3.0])
    assert samples["behavior_kl"].grad.tolist() == pytest.approx([1.0 / 12.0] * 3)
    assert float(metrics["ess"]) == pytest.approx(6.0 / 7.0)


@pytest.mark.parametrize(
    ("cap", "limit"),
    [
        (0.7, 0.7),
        (torch.tensor(0.7), 0.7),
        (100.0, 100.0),
        ("ess_per_dim", (6.0 / 7.0) ** (1.0 / 3.0)),
    ],
)
def test_another_cap_replaces_e_in_the_cap_alone(cap, limit: float):
    samples = three_samples()
    loss, *_ = p3o(**samples, cap=cap, act_dim=3)
    loss.backward()
    weight = [min(ratio, limit) for ratio in (0.5, 1.0, 1.5)]
    expected = [-w * a / 3.0 for w, a in zip(weight, (1.0, 2.0, -1.0), strict=True)]
    assert samples["log_prob"].grad is not None
    assert samples["log_prob"].grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert samples["behavior_kl"].grad is not None
    assert samples["behavior_kl"].grad.tolist() == pytest.approx([1.0 / 21.0] * 3, rel=1e-5)


@pytest.mark.parametrize("cap", ["unknown", "ess_per_dim"])
def test_an_unusable_cap_is_refused(cap):
    with pytest.raises(ValueError, match=f"cap='{cap}'.*use 'ess', a number, or 'ess_per_dim' with act_dim"):
        p3o(**three_samples(), cap=cap)


@pytest.mark.parametrize("pull", [0.0, 2.5, torch.tensor(2.5)])
def test_another_pull_replaces_1_minus_e_in_the_weight_of_the_kl_alone(pull: Any):
    samples, plain = three_samples(), three_samples()
    p3o(**samples, pull=pull)[0].backward()
    p3o(**plain)[0].backward()
    torch.testing.assert_close(samples["log_prob"].grad, plain["log_prob"].grad)
    assert samples["behavior_kl"].grad.tolist() == pytest.approx([float(pull) / 3.0] * 3)


def test_an_unknown_pull_is_refused():
    with pytest.raises(ValueError, match="pull='none': use 'ess' or a number"):
        p3o(**three_samples(), pull=cast(Any, "none"))


def policy_and_batch(shift: float) -> tuple[Tensor, Gaussian, Tensor, Tensor]:
    """Parameters (mean and log_std) `shift` away from the behavior policy, which chose the actions; float64."""
    generator = torch.Generator().manual_seed(0)
    behavior = Gaussian(torch.zeros(64, 2).double(), torch.full((64, 2), -0.5).double())
    action = behavior.sample(torch.randn(64, 2, generator=generator, dtype=torch.float64))
    advantage = torch.randn(64, generator=generator, dtype=torch.float64)
    theta = torch.tensor([shift, -shift, -0.5 + shift, -0.5 - shift], dtype=torch.float64, requires_grad=True)
    return theta, behavior, action, advantage


def policy_at(theta: Tensor) -> Gaussian:
    return Gaussian(theta[:2].expand(64, 2), theta[2:].expand(64, 2))


def p3o_at(theta: Tensor, behavior: Gaussian, action: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    pi = policy_at(theta)
    return p3o(pi.log_prob(action), behavior.log_prob(action), advantage, kl(pi, behavior))[:2]


def test_on_fresh_data_p3o_is_the_policy_gradient():
    theta, behavior, action, advantage = policy_and_batch(shift=0.0)
    loss, metrics = p3o_at(theta, behavior, action, advantage)
    plain = -(advantage * policy_at(theta).log_prob(action)).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, theta), torch.autograd.grad(plain, theta))
    assert metrics["ess"] == 1.0
    assert metrics["capped_fraction"] == 0.0


def test_no_gradient_passes_through_ess_weight_and_advantage():
    theta, behavior, action, advantage = policy_and_batch(shift=0.2)
    advantage.requires_grad_()
    loss, _ = p3o_at(theta, behavior, action, advantage)
    gradient = torch.autograd.grad(loss, (theta, advantage), allow_unused=True)
    assert gradient[1] is None

    # Finite differences of the objective with e and the weights frozen where they are.
    log_ratio = policy_at(theta).log_prob(action) - behavior.log_prob(action)
    ess = effective_sample_size(log_ratio)
    weight = torch.minimum(log_ratio.exp(), ess).detach()
    assert ess < 0.95

    def frozen(theta: Tensor) -> Tensor:
        pi = policy_at(theta)
        return -(weight * advantage * pi.log_prob(action)).mean() + (1.0 - ess) * kl(pi, behavior).mean()

    with torch.no_grad():
        steps = 1e-6 * torch.eye(4, dtype=torch.float64)
        differences = torch.stack([(frozen(theta + h) - frozen(theta - h)) / 2e-6 for h in steps])
    torch.testing.assert_close(gradient[0], differences, rtol=1e-6, atol=1e-8)


def test_a_broken_ratio_reaches_the_loss():
    samples = three_samples()
    samples["behavior_log_prob"] = torch.tensor([-1.0, -torch.inf, -3.0])
    assert p3o(**samples)[0].isnan()


def two_anchors() -> dict[str, Any]:
    """`three_samples` (e_b = 6/7), and p with pi / p = 1, 1, 2: e_p = 4^2 / (3 * 6) = 8/9."""
    samples = three_samples()
    proximal = samples["log_prob"].detach() - torch.log(torch.tensor([1.0, 1.0, 2.0]))
    return samples | {
        "proximal_log_prob": proximal,
        "proximal_kl": torch.tensor([0.3, 0.1, 0.5], requires_grad=True),
    }


def test_p4o_by_hand():
    # 1 - e_b = 1/7 = 9/63, 1 - e_p = 1/9 = 7/63: w_b = 9/16, w_p = 7/16. e = 6/7: weights as in P3O.
    samples = two_anchors()
    loss, metrics, weight = p4o(**samples, mixture_kl="convex")
    policy = 0.5 * (-1.0 + math.log(0.5)) - 24.0 / 7.0 - 6.0 / 7.0 * (-3.0 + math.log(1.5))
    to_mixture = 9.0 / 16.0 * 0.2 + 7.0 / 16.0 * 0.3  # of the means
    assert float(loss.detach()) == pytest.approx(-policy / 3.0 + to_mixture / 7.0, rel=1e-5)
    loss.backward()
    assert samples["behavior_kl"].grad.tolist() == pytest.approx([9.0 / 16.0 / 21.0] * 3, rel=1e-5)
    assert samples["proximal_kl"].grad.tolist() == pytest.approx([7.0 / 16.0 / 21.0] * 3, rel=1e-5)
    assert weight.tolist() == pytest.approx([0.5, 6.0 / 7.0, 6.0 / 7.0])
    expected = {
        "ess": 6.0 / 7.0, "ess_proximal": 8.0 / 9.0, "behavior_share": 9.0 / 16.0, "behavior_kl": 0.2,
        "proximal_kl": 0.3, "mixture_kl": to_mixture, "capped_fraction": 2.0 / 3.0, "log_ratio_max": math.log(1.5),
    }  # fmt: skip
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())

    samples = two_anchors()
    loss, metrics, weight = p4o(**samples)
    near = [(9.0 * math.exp(-b) + 7.0 * math.exp(-p)) / 16.0 for b, p in ((0.1, 0.3), (0.2, 0.1), (0.3, 0.5))]
    assert float(metrics["mixture_kl"]) == pytest.approx(-sum(map(math.log, near)) / 3.0, rel=1e-5)
    loss.backward()
    pulls = [9.0 / 16.0 * math.exp(-b) / m / 21.0 for b, m in zip((0.1, 0.2, 0.3), near, strict=True)]
    assert samples["behavior_kl"].grad.tolist() == pytest.approx(pulls, rel=1e-5)

    # k3: the mixture over pi is (9 b + 7 p) / (16 pi) = (9 / rho_b + 7 / rho_p) / 16.
    inverse = [(9.0 / b + 7.0 / p) / 16.0 for b, p in ((0.5, 1.0), (1.0, 1.0), (1.5, 2.0))]
    expected = sum(-math.log(x) + x - 1.0 for x in inverse) / 3.0
    assert float(p4o(**two_anchors(), mixture_kl="k3")[1]["mixture_kl"]) == pytest.approx(expected, rel=1e-5)


MIXTURES: list[Any] = ["variational", "convex", "k3"]


@pytest.mark.parametrize("mixture_kl", MIXTURES)
@pytest.mark.parametrize("anchor", ["behavior", "current"])
def test_p4o_with_one_anchor_is_p3o(mixture_kl: Any, anchor: str):
    """p = b: both anchors coincide. p = pi, as at the start of an epoch: no sample is lost to p, and only b pulls."""
    samples, plain = three_samples(), three_samples()
    if mixture_kl == "k3":
        plain["behavior_kl"] = k3(plain["log_prob"], plain["behavior_log_prob"])
    of_p = {
        "behavior": (samples["behavior_log_prob"], samples["behavior_kl"]),
        "current": (samples["log_prob"].detach(), torch.zeros(3)),
    }
    log_prob, proximal_kl = of_p[anchor]
    loss, *_ = p4o(**samples, proximal_log_prob=log_prob, proximal_kl=proximal_kl, mixture_kl=mixture_kl)
    expected, *_ = p3o(**plain)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(samples["log_prob"].grad, plain["log_prob"].grad)
    if mixture_kl != "k3":
        torch.testing.assert_close(samples["behavior_kl"].grad, plain["behavior_kl"].grad)


@pytest.mark.parametrize("mixture_kl", MIXTURES)
def test_on_fresh_data_nothing_pulls_in_p4o(mixture_kl: Any):
    samples = three_samples()
    log_prob = samples["log_prob"].detach()
    anchors: Any = {"behavior_log_prob": log_prob, "proximal_log_prob": log_prob, "proximal_kl": torch.ones(3)}
    loss, metrics, _ = p4o(**samples | anchors, mixture_kl=mixture_kl)
    loss.backward()
    assert metrics["ess"] == metrics["ess_proximal"] == 1.0
    assert samples["log_prob"].grad.tolist() == pytest.approx([-x / 3.0 for x in (1.0, 2.0, -1.0)])
    assert samples["behavior_kl"].grad is None or samples["behavior_kl"].grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("pi", [(0.3, 1.0), (-1.0, 0.6), (2.0, 1.5)])
def test_the_stand_ins_bound_the_kl_to_the_mixture(pi: tuple[float, float]):
    """One dimension, b = N(0, 1) and p = N(0.5, 0.8^2), weights from the given ESS; the KL by summation."""
    x = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)[:, None]

    def gaussian(mean: float, std: float) -> Gaussian:
        return Gaussian(torch.full_like(x, mean), torch.full_like(x, math.log(std)))

    policy, b, p = gaussian(*pi), gaussian(0.0, 1.0), gaussian(0.5, 0.8)
    log_prob, log_b, log_p = (each.log_prob(x) for each in (policy, b, p))
    numbers, of_p = (log_prob, log_b, torch.ones_like(log_b), kl(policy, b)), (log_p, kl(policy, p))
    given: dict[str, Any] = dict(zip(("proximal_log_prob", "proximal_kl"), of_p, strict=True))
    bounds = {name: p4o(*numbers, **given, mixture_kl=name)[1] for name in ("variational", "convex")}
    w = bounds["convex"]["behavior_share"]
    assert 0.0 < w < 1.0
    mixture = torch.log(w * log_b.exp() + (1.0 - w) * log_p.exp())
    exact = (log_prob.exp() * (log_prob - mixture)).sum() * (x[1, 0] - x[0, 0])
    assert exact < bounds["variational"]["mixture_kl"] < bounds["convex"]["mixture_kl"]


def test_an_unknown_kl_to_the_mixture_is_refused():
    with pytest.raises(ValueError, match="mixture_kl='exact': choose one of variational, convex, k3"):
        p4o(**two_anchors(), mixture_kl=cast(Any, "exact"))


@pytest.mark.parametrize(
    ("divergence", "f"),
    [
        ("kl", lambda rho: rho * rho.log()),
        ("reverse_kl", lambda rho: -rho.log()),
        ("hellinger", lambda rho: (rho.sqrt() - 1.0).square()),
    ],
)
def test_the_slope_of_a_divergence_makes_its_gradient(divergence: Any, f: Any):
    """grad E_b[f(rho)] = E_b[rho slope grad log pi], for a Gaussian's mean and log_std; expectations by summation."""
    x = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)[:, None]
    b = Gaussian(torch.zeros_like(x), torch.zeros_like(x))
    density = b.log_prob(x).exp()
    density = density / density.sum()
    theta = torch.tensor([0.1, -0.02], dtype=torch.float64, requires_grad=True)  # so near that no exponent is clamped
    log_prob = Gaussian(theta[:1].expand_as(x), theta[1:].expand_as(x)).log_prob(x)
    log_ratio = log_prob - b.log_prob(x)
    expected = torch.autograd.grad((density * f(log_ratio.exp())).sum(), theta, retain_graph=True)
    ratio, slope = log_ratio.exp().detach(), divergence_slope(log_ratio, divergence).detach()
    found = torch.autograd.grad((density * ratio * slope * log_prob).sum(), theta)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert divergence_slope(torch.zeros(2), divergence).tolist() == [0.0, 0.0]


def test_slopes_by_hand():
    log_ratio = torch.log(torch.tensor([4.0, 0.25, 1e-9]))
    assert divergence_slope(log_ratio[:2], "kl").tolist() == pytest.approx([math.log(4.0), -math.log(4.0)])
    # 1 - 1 / rho and 1 - 1 / sqrt(rho); the last is cut: 1 - e^3.
    assert divergence_slope(log_ratio, "reverse_kl").tolist() == pytest.approx([0.75, -3.0, 1.0 - math.exp(3.0)])
    assert divergence_slope(log_ratio, "hellinger").tolist() == pytest.approx([0.5, -1.0, 1.0 - math.exp(3.0)])
    with pytest.raises(ValueError, match="divergence='tv': choose one of kl, reverse_kl, hellinger"):
        divergence_slope(log_ratio, cast(Any, "tv"))


def test_ppo_clip_by_hand():
    # ratio, advantage:      1.5, 1        1.5, -1       0.5, 1       0.5, -1
    # min(rho A, clip A):    1.2           -1.5          0.5          -0.8          (clip 0.2)
    # d loss / d log_prob:   0             1.5 / 4       -0.5 / 4     0
    log_prob = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], requires_grad=True)
    loss, metrics, weight = ppo_clip(log_prob, torch.zeros(4), advantage, clip=0.2)
    assert float(loss.detach()) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4.0)
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0.0, 0.375, -0.125, 0.0])
    assert advantage.grad is None
    assert metrics["clipped_fraction"] == 1.0
    assert float(metrics["ess"]) == pytest.approx(4.0**2 / (4.0 * 5.0))
    assert float(metrics["log_ratio_max"]) == pytest.approx(math.log(1.5))
    assert weight.tolist() == pytest.approx([0.0, 1.5, 0.5, 0.0])
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())


def test_ppo_clip_within_the_range_is_the_ratio_estimator():
    log_prob = torch.log(torch.tensor([0.9, 1.1, 1.05])).requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 3.0])
    loss, metrics, _ = ppo_clip(log_prob, torch.zeros(3), advantage, clip=torch.tensor(0.2))
    assert float(loss.detach()) == pytest.approx(-(0.9 - 2.2 + 3.15) / 3.0)
    assert metrics["clipped_fraction"] == 0.0


def test_k3_by_hand():
    # ratio 2: log 2 + 1/2 - 1, slope 1 - 1/2. ratio 1/2: -log 2 + 2 - 1, slope 1 - 2. ratio 1: 0 and 0.
    log_ratio = torch.log(torch.tensor([2.0, 0.5, 1.0])).requires_grad_()
    value = k3(log_ratio, torch.zeros(3))
    assert value.tolist() == pytest.approx([math.log(2.0) - 0.5, 1.0 - math.log(2.0), 0.0], abs=1e-6)
    value.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([0.5, -1.0, 0.0], abs=1e-6)


def test_k3_pairs_no_sample_with_another():
    with pytest.raises(ValueError, match=r"shapes differ: log_prob \[4\], behavior_log_prob \[4, 1\]"):
        k3(torch.zeros(4), torch.zeros(4, 1))


def test_k3_is_clamped_as_released():
    log_ratio = torch.tensor([-20.0, 20.0], requires_grad=True)
    value = k3(log_ratio, torch.zeros(2))
    assert value.tolist() == pytest.approx([-20.0 + math.exp(10.0) - 1.0, 20.0 + math.exp(-10.0) - 1.0])
    value.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == [1.0, 1.0]  # only log rho of the pull back remains


def test_k3_is_not_the_kl():
    # pi = N(0.3, 1), b = N(0, 1): E_b[k3] = chi^2(b || pi) - KL(b || pi) = exp(0.09) - 1 - 0.045; KL(pi || b) = 0.045.
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = k3(0.3 * z - 0.045, torch.zeros_like(z))
    standard_error = values.std() / math.sqrt(z.numel())
    assert abs(values.mean() - (math.exp(0.09) - 1.045)) < 5.0 * standard_error
    assert values.mean() - 0.045 > 5.0 * standard_error


def test_ppo_decoupled_by_hand():
    # p / b = 1/2, 2; r = pi / p = 1.5, 1.5; A = 1, -1; clip 0.2
    # min(r A, clip A):      1.2           -1.5
    # times p / b:           0.6           -3.0          d loss / d log_prob: 0, 3 / 2
    proximal = torch.log(torch.tensor([0.5, 2.0])).requires_grad_()
    log_prob = torch.log(torch.tensor([0.75, 3.0])).requires_grad_()
    loss, metrics, _ = ppo_decoupled(
        log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), proximal_log_prob=proximal.detach(), clip=0.2
    )
    assert float(loss.detach()) == pytest.approx(-(0.6 - 3.0) / 2.0)
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0.0, 1.5])
    assert metrics["clipped_fraction"] == 1.0
    # Of pi / b: 0.75 and 3, so e = 3.75^2 / (2 (0.5625 + 9)).
    assert float(metrics["ess"]) == pytest.approx(3.75**2 / (2.0 * 9.5625))
    assert float(metrics["log_ratio_max"]) == pytest.approx(math.log(3.0))


@pytest.mark.parametrize("objective", [ppo_decoupled, ppo_generalized])
def test_about_the_behavior_it_is_ppo_clip(objective: Any):
    theta, behavior, action, advantage = policy_and_batch(shift=0.2)
    log_prob, behavior_log_prob = policy_at(theta).log_prob(action), behavior.log_prob(action)
    proximal: Any = {"proximal_log_prob": behavior_log_prob}
    one, metrics, weight = objective(log_prob, behavior_log_prob, advantage, **proximal, clip=0.1)
    other, expected, expected_weight = ppo_clip(log_prob, behavior_log_prob, advantage, clip=0.1)
    torch.testing.assert_close(torch.autograd.grad(one, theta, retain_graph=True), torch.autograd.grad(other, theta))
    torch.testing.assert_close((metrics, weight), (expected, expected_weight))


def test_ppo_generalized_by_hand():
    # ratios 2.1, 2.3, 0.1 about centers 2, 2, 0.5, clip 0.2: within, above with A > 0 (cut at 2.2), below with A > 0
    log_prob = torch.log(torch.tensor([2.1, 2.3, 0.1])).requires_grad_()
    proximal = torch.log(torch.tensor([2.0, 2.0, 0.5]))
    advantage = torch.tensor([1.0, 1.0, 3.0])
    loss, metrics, _ = ppo_generalized(log_prob, torch.zeros(3), advantage, proximal_log_prob=proximal, clip=0.2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(2.1 + 2.2 + 0.3) / 3.0)
    assert log_prob.grad is not None and log_prob.grad.tolist() == pytest.approx([-0.7, 0.0, -0.1])
    assert float(metrics["clipped_fraction"]) == pytest.approx(2.0 / 3.0)


def test_ppo_variance_by_hand():
    # -(1.5 * 1 + 0.5 * 2) / 2 + 3 * (0.25 + 0.25) / 2; d loss / d log_prob = (-rho A + 3 * 2 (rho - 1) rho) / 2
    log_prob = torch.log(torch.tensor([1.5, 0.5])).requires_grad_()
    loss, metrics, _ = ppo_variance(log_prob, torch.zeros(2), torch.tensor([1.0, 2.0]), coefficient=3.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-1.25 + 0.75)
    assert log_prob.grad is not None and log_prob.grad.tolist() == pytest.approx([1.5, -1.25])
    assert float(metrics["ratio_variance"]) == pytest.approx(0.25) and metrics["coefficient"] == 3.0
    # mean rho is 1: ESS = 1 / (1 + Var rho)
    assert float(metrics["ess"]) == pytest.approx(1.0 / 1.25)


def test_bpo_by_hand():
    # Ends 1.3, 1.3, 0.7, 0.7 and, at the median itself, 1. d loss / d log_prob = sign(rho - rho*) rho |A| / 5
    ratio = torch.tensor([1.1, 1.5, 0.9, 0.6, 1.2])
    log_prob = torch.log(ratio).requires_grad_()
    advantage = torch.tensor([2.0, 1.0, -1.0, -2.0, 1.0])
    median_advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    loss, metrics, _ = bpo(log_prob, torch.zeros(5), advantage, median_advantage, clip=0.3, temperature=1e-3)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.2 * 2.0 + 0.2 + 0.2 + 0.1 * 2.0 + 0.2) / 5.0, rel=1e-5)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([-0.44, 0.3, 0.18, -0.24, 0.24])
    assert float(metrics["overshot_fraction"]) == pytest.approx(2.0 / 5.0)  # the second and the fourth


def test_bpo_within_its_range_is_ppo():
    theta, behavior, action, advantage = policy_and_batch(shift=0.05)
    log_prob, behavior_log_prob = policy_at(theta).log_prob(action), behavior.log_prob(action)
    assert ((log_prob - behavior_log_prob).exp() - 1.0).abs().max() < 0.6
    one, metrics, weight = bpo(log_prob, behavior_log_prob, advantage, advantage, clip=0.6, temperature=1e-6)
    other, expected, expected_weight = ppo_clip(log_prob, behavior_log_prob, advantage, clip=0.6)
    torch.testing.assert_close(torch.autograd.grad(one, theta, retain_graph=True), torch.autograd.grad(other, theta))
    torch.testing.assert_close(weight, expected_weight)
    assert metrics["overshot_fraction"] == expected["clipped_fraction"] == 0.0


def test_ppo_band_by_hand():
    # ratios 1.5, 1, 0.5, weights 1.2, 1, 0.8 with clip 0.2; d loss / d log_prob = -weight A / 3, outside the band too
    log_prob = torch.log(torch.tensor([1.5, 1.0, 0.5])).requires_grad_()
    loss, metrics, _ = ppo_band(log_prob, torch.zeros(3), torch.tensor([1.0, 2.0, -1.0]), clip=0.2)
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([-0.4, -2.0 / 3.0, 0.8 / 3.0])
    assert float(loss.detach()) == pytest.approx(-(1.2 * math.log(1.5) - 0.8 * math.log(0.5)) / 3.0)
    assert float(metrics["clipped_fraction"]) == pytest.approx(2.0 / 3.0)


def test_ppo_kl_by_hand():
    # -(1.5 * 1 + 0.5 * 2) / 2 + 3 * 0.2; d loss / d log_prob = -rho A / 2
    log_prob = torch.log(torch.tensor([1.5, 0.5])).requires_grad_()
    forward_kl = torch.tensor([0.1, 0.3], requires_grad=True)
    loss, metrics, _ = ppo_kl(log_prob, torch.zeros(2), torch.tensor([1.0, 2.0]), forward_kl, kl_coef=3.0)
    assert float(loss.detach()) == pytest.approx(-1.25 + 0.6)
    loss.backward()
    assert log_prob.grad is not None and forward_kl.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([-0.75, -0.5])
    assert forward_kl.grad.tolist() == pytest.approx([1.5, 1.5])
    assert metrics["kl_coef"] == 3.0


OBJECTIVES: dict[str, Any] = {
    "p3o": lambda x, b, p, a: p3o(x, b, a, torch.zeros(len(a))),
    "ppo_clip": lambda x, b, p, a: ppo_clip(x, b, a, clip=0.2),
    "ppo_decoupled": lambda x, b, p, a: ppo_decoupled(x, b, a, proximal_log_prob=p, clip=0.2),
    "ppo_generalized": lambda x, b, p, a: ppo_generalized(x, b, a, proximal_log_prob=p, clip=0.2),
    "ppo_variance": lambda x, b, p, a: ppo_variance(x, b, a, coefficient=0.0),
    "bpo": lambda x, b, p, a: bpo(x, b, a, a - 0.3, clip=0.2, temperature=1e-3),
    "ppo_band": lambda x, b, p, a: ppo_band(x, b, a, clip=0.2),
    "ppo_kl": lambda x, b, p, a: ppo_kl(x, b, a, torch.zeros(len(a)), kl_coef=1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_weight_is_what_the_gradient_says(name: str):
    generator = torch.Generator().manual_seed(6)
    b, p, x, advantage = torch.randn(4, 200, generator=generator) * torch.tensor([1.0, 0.3, 0.4, 1.0])[:, None]
    x, p = (x + b).requires_grad_(), p + b
    loss, metrics, weight = OBJECTIVES[name](x, b, p, advantage)
    loss.backward()
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert x.grad is not None and not weight.requires_grad
    torch.testing.assert_close(weight * advantage, -200.0 * x.grad)
    silent = (weight == 0.0).float().mean()
    assert (0.1 < silent < 0.9) if name in ("ppo_clip", "ppo_decoupled", "ppo_generalized") else silent == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_that_is_no_float_any_more_leaves_a_gradient(name: str, sign: float):
    """e^222: an action far from a narrow behavior. The other samples still learn, whatever sign its advantage has."""
    b, advantage = torch.zeros(4), sign * torch.tensor([1.0, -1.0, 2.0, -2.0])
    x = torch.tensor([222.0, 0.0, 0.0, 0.05], requires_grad=True)
    loss, metrics, weight = OBJECTIVES[name](x, b, torch.zeros(4), advantage)
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[1:].any()
    assert loss.isfinite() and all(value.isfinite().all() for value in metrics.values())
    if name not in ("p3o", "p4o", "ppo_band"):  # their weight is capped, and their score stays
        assert weight[0] == 0.0 == x.grad[0]


def test_expert_mass_by_hand():
    """Two dimensions: m^2 is exponential, u = exp(-m^2 / 2). One: the two tails of a normal, erfc(|z| / sqrt(2))."""
    pi = Gaussian(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.log(torch.tensor([0.5, 2.0])))
    action = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # two sigmas away, one sigma away
    assert expert_mass(pi, action).tolist() == pytest.approx([math.exp(-2.0), math.exp(-0.5)])
    one = Gaussian(torch.zeros(3, 1), torch.zeros(1))
    found = expert_mass(one, torch.tensor([[0.0], [-1.0], [1e6]]))
    assert found.tolist() == pytest.approx([1.0, math.erfc(math.sqrt(0.5)), 0.0])


@pytest.mark.parametrize("act_dim", [1, 3, 17])
def test_expert_mass_of_a_policys_own_actions_is_uniform(act_dim: int):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, act_dim, generator=generator)
    u = expert_mass(Gaussian(torch.zeros(act_dim), torch.zeros(act_dim)), noise)
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (u * (1.0 - u)).mean().item() == pytest.approx(1.0 / 6.0, abs=0.003)
    kappa = (u * (1.0 - u) * noise.square().sum(-1)).mean() / (act_dim * (u * (1.0 - u)).mean())
    assert width_correction(act_dim) == pytest.approx(kappa.item(), abs=0.01)


def test_width_correction_in_a_few_dimensions():
    found = [width_correction(act_dim) for act_dim in (1, 2, 3, 6, 17)]
    assert found == pytest.approx([0.705, 0.833, 0.885, 0.940, 0.979], abs=6e-4)


def test_the_weight_of_imitation_narrows_to_055_if_nothing_is_corrected():
    """Actions are quantiles of a standard normal. Below its fixed point sigma would grow, above it shrink."""
    count = 20_000
    action = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    slopes = []
    for sigma in (0.545, 0.56):
        log_std = torch.full((1,), math.log(sigma), dtype=torch.float64, requires_grad=True)
        loss, *_ = imitation(Gaussian(torch.zeros_like(action), log_std.expand(count, 1)), action, phi="mass")
        slopes.append(torch.autograd.grad(loss, log_std)[0].item())
    assert slopes[0] < 0.0 < slopes[1]


def test_imitation_without_weights_is_maximum_likelihood():
    action = torch.tensor([[0.5, -0.2], [3.0, 0.1]])
    grads = []
    for which in (0, 1):
        mean, log_std = torch.zeros(2, 2, requires_grad=True), torch.full((2,), -0.5, requires_grad=True)
        pi = Gaussian(mean, log_std)
        loss = imitation(pi, action)[0] if which else -pi.log_prob(action).mean()
        loss.backward()
        grads.append([cast(Tensor, mean.grad), cast(Tensor, log_std.grad)])
    torch.testing.assert_close(grads[0], grads[1])


def test_the_weight_of_imitation_leaves_the_width_where_it_is_if_corrected():
    """Actions of the policy itself: no score of sigma, where maximum likelihood with that weight has one to narrow it.

    And an action fifty sigmas away has no pull.
    """
    generator = torch.Generator().manual_seed(0)
    action = torch.randn(20_000, 2, generator=generator)
    found: dict[Any, float] = {}
    for width in (1.0, width_correction(2), "fixed"):
        mean, log_std = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        loss, _, weight = imitation(Gaussian(mean.expand(len(action), 2), log_std), action, phi="mass", width=width)
        loss.backward()
        assert weight.mean().item() == pytest.approx(1.0 / 6.0, abs=0.003)
        assert cast(Tensor, mean.grad).abs().max() < 0.005
        found[width] = 0.0 if log_std.grad is None else log_std.grad.mean().item()
    # E[phi (1 - z^2)] = (1 - kappa) / 6 with kappa 5 / 6; the loss is its negative score, so sigma would shrink
    assert found[1.0] == pytest.approx(1.0 / 36.0, abs=0.003) and found["fixed"] == 0.0
    assert abs(found[width_correction(2)]) < 0.003
    mean = torch.zeros(1, 2, requires_grad=True)
    loss, *_ = imitation(Gaussian(mean, torch.zeros(2)), torch.full((1, 2), 50.0), phi="mass")
    loss.backward()
    assert cast(Tensor, mean.grad).tolist() == [[0.0, 0.0]]


def balance_by_hand() -> dict[str, Any]:
    """One segment of two steps, discount 1/2, beta 2.

    Charges: 2 (-1 + 1.5) - 3 = -2 and 2 (-2 + 1) - 0 = -2. Residuals: 5 - 2 - 2 / 2 = 2 and 5 - 2 - 1 - 8 / 4 = 0.
    """
    return {
        "log_prob": torch.tensor([[-1.0, -2.0]], requires_grad=True),
        "reference_log_prob": torch.tensor([[-1.5, -1.0]], requires_grad=True),
        "value": torch.tensor([5.0], requires_grad=True),
        "reward": torch.tensor([[3.0, 0.0]]),
        "end_value": torch.tensor([[2.0, 8.0]]),
        "within": torch.tensor([[True, True]]),
        "beta": 2.0,
        "discount": 0.5,
    }


def test_subtrajectory_balance_by_hand():
    """Weights of lambda 3/4: 1/4 and 3/4. So 2 / 4 pulls at the first step's log pi; value loss (1/4) 2^2 / 2."""
    samples = balance_by_hand()
    loss, metrics, weight = subtrajectory_balance(**samples, lambda_=0.75, value_coef=3.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * -1.0 + 3.0 * 0.5)
    assert cast(Tensor, samples["log_prob"].grad).tolist() == [[0.5, 0.0]]
    assert samples["value"].grad.tolist() == pytest.approx([3.0 * 0.5])
    assert samples["reference_log_prob"].grad is None
    assert float(metrics["value_loss"]) == pytest.approx(0.5)
    assert weight.tolist() == [-0.5]


def test_what_lies_behind_a_segments_end_does_not_count():
    short = balance_by_hand() | {"within": torch.tensor([[True, False]])}
    loss, *_ = subtrajectory_balance(**short)
    loss.backward()
    assert cast(Tensor, short["log_prob"].grad).tolist() == [[2.0, 0.0]]  # the residual of one step: 2


def random_segments(n: int = 6, k: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([4, 3, 2, 1, 4, 2])[:n, None]
    return {
        "log_prob": draw(n, k).requires_grad_(),
        "reference_log_prob": draw(n, k),
        "value": draw(n).requires_grad_(),
        "reward": draw(n, k),
        "end_value": draw(n, k),
        "within": torch.arange(k) < lengths,
    }


@pytest.mark.parametrize(("lambda_", "entropy_coef"), [(1.0, 0.0), (0.6, 0.3)])
def test_the_gradient_is_that_of_the_squared_residual(lambda_: float, entropy_coef: float):
    """Divided by beta + tau for the policy's part, undivided for the value's."""
    s, beta, discount = random_segments(), 0.4, 0.9
    loss, *_ = subtrajectory_balance(
        **s, beta=beta, discount=discount, lambda_=lambda_, entropy_coef=entropy_coef, value_coef=0.7
    )
    grads = torch.autograd.grad(loss, [s["log_prob"], s["value"]])
    charge = beta * (s["log_prob"] - s["reference_log_prob"]) + entropy_coef * s["log_prob"] - s["reward"]
    residuals = path_residuals(charge, s["value"], s["end_value"], discount=discount)
    square = 0.5 * (path_weights(s["within"], lambda_) * residuals.square()).sum(-1).mean()
    expected = torch.autograd.grad(square, [s["log_prob"], s["value"]])
    torch.testing.assert_close(grads[0], expected[0] / (beta + entropy_coef))
    torch.testing.assert_close(grads[1], 0.7 * expected[1])


def test_a_free_balance_is_the_policy_gradient():
    """beta 0, single steps: the gradient of -mean(A log pi) with A the TD error, as for any score function."""
    s = random_segments()
    loss, _, weight = subtrajectory_balance(**s, beta=0.0, discount=0.9, lambda_=0.0, value_coef=0.0)
    advantage = (s["reward"] + 0.9 * s["end_value"])[:, 0] - s["value"].detach()
    (found,) = torch.autograd.grad(loss, s["log_prob"])
    torch.testing.assert_close(found[:, 0], -advantage / 6.0)
    assert not found[:, 1:].any()
    torch.testing.assert_close(weight, advantage)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_the_known_optimum_is_balanced_and_found_from_anybodys_actions(entropy_coef: float):
    """Reward -3 a^2 at each step, pi_ref = N(0, 1): pi = N(0, s^2) with 1 / s^2 = (beta + 6) / (beta + tau).

    V is the same everywhere: V = discount V + (beta + tau) log integral(exp((r + beta log pi_ref) / (beta + tau))).
    """
    beta, discount, k = 0.5, 0.5, 3
    total = beta + entropy_coef
    width = math.sqrt(total / (beta + 6.0))
    of_step = total * math.log(width * math.sqrt(2.0 * math.pi)) - beta * 0.5 * math.log(2.0 * math.pi)
    best = of_step / (1.0 - discount)
    action = torch.rand(300, k, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3.0 - 1.0
    one = torch.ones(300, k, dtype=torch.float64)

    def loss_of(mean: Tensor, log_std: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        return subtrajectory_balance(
            Gaussian(mean.expand(300, k, 1), log_std).log_prob(action),
            Gaussian(torch.zeros_like(action), torch.zeros_like(action)).log_prob(action),
            value * one[:, 0],
            -3.0 * action.square().squeeze(-1),
            value.detach() * one,
            one.bool(),
            beta=beta,
            discount=discount,
            lambda_=0.9,
            entropy_coef=entropy_coef,
        )

    optimum = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.0, math.log(width), best)]
    loss, metrics, _ = loss_of(*optimum)
    assert float(metrics["value_loss"]) < 1e-20
    assert all(abs(float(g)) < 1e-9 for g in torch.autograd.grad(loss, optimum))
    found = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.4, 0.0, 0.0)]
    optimizer = torch.optim.Adam(found, lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1.0 - step / 300)
        optimizer.zero_grad()
        loss_of(*found)[0].backward()
        optimizer.step()
    assert [float(x.detach()) for x in found] == pytest.approx([0.0, math.log(width), best], abs=0.02)


def test_vargrad_by_hand():
    """beta 2: log Z of each -1 + 2 + 2 = 3 and -1 + 1 + 1 = 1; their mean 2, so the loss is 1."""
    log_prob = torch.tensor([[-2.0, -1.0]], requires_grad=True)
    loss, metrics, weight = vargrad_trajectory_balance(
        log_prob, torch.tensor([[-1.0, -1.0]]), torch.tensor([[4.0, 2.0]]), beta=2.0
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.0) and float(metrics["log_z"]) == pytest.approx(2.0)
    assert cast(Tensor, log_prob.grad).tolist() == [[-1.0, 1.0]]  # 2 (2 - 3) / 2: the first should become more likely
    assert weight.tolist() == [[2.0, -2.0]]


def test_vargrad_of_the_reference_itself_is_reinforce_with_the_groups_mean():
    log_prob, reward = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    loss, *_ = vargrad_trajectory_balance(log_prob, log_prob.detach(), reward, beta=0.5)
    reinforce = -((reward - reward.mean(-1, keepdim=True)) * log_prob).mean()
    grads = [torch.autograd.grad(x, log_prob)[0] for x in (loss, reinforce)]
    torch.testing.assert_close(grads[0], 2.0 / 0.5 * grads[1])


def test_vargrad_is_zero_where_the_policy_is_the_tilted_reference():
    """A constant added to a whole group changes nothing: log Z absorbs it, separately in each group."""
    reference, reward = torch.randn(3, 5), torch.randn(3, 5)
    tilted = reference + reward / 0.5 + torch.tensor([[1.0], [-2.0], [7.0]])
    loss, metrics, _ = vargrad_trajectory_balance(tilted, reference, reward, beta=0.5)
    assert float(loss) < 1e-10
    assert float(metrics["log_z"]) == pytest.approx(-2.0)  # -(1 - 2 + 7) / 3
