"""Returns: by hand, against plain loops and another library, and by known identities. Tensors are [T, B]."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ess_rl.ess import effective_sample_size
from ess_rl.returns import (
    Correction,
    corrected,
    divergence_ahead,
    gae,
    path_residuals,
    path_weights,
    retrace,
    reverse_recurrence,
    vtrace,
    windows,
    within_episode,
)

DISCOUNT = 0.97


def segments(steps: int, batch: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A random segment with both kinds of ends; float64, so that agreement can be checked to the last digits."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(steps, batch, generator=generator, dtype=torch.float64)

    terminated, truncated = draw() > 1.2, draw() > 1.2
    return {
        "reward": draw(),
        "value": draw(),
        "next_value": draw(),
        "terminated": terminated,
        "last": terminated | truncated,
    }


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 128, 129])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 4)])
def test_reverse_recurrence_equals_a_loop(steps: int, trailing: tuple[int, ...]):
    generator = torch.Generator().manual_seed(steps)
    a = torch.randn(steps, *trailing, generator=generator, dtype=torch.float64)
    b = torch.rand(steps, *trailing, generator=generator, dtype=torch.float64)
    expected, x = torch.empty_like(a), torch.zeros(trailing, dtype=torch.float64)
    for t in reversed(range(steps)):
        x = a[t] + b[t] * x
        expected[t] = x
    torch.testing.assert_close(reverse_recurrence(a, b), expected)


def test_reverse_recurrence_keeps_its_inputs():
    a, b = torch.ones(4), torch.full((4,), 0.5)
    reverse_recurrence(a, b)
    assert torch.equal(a, torch.ones(4))
    assert torch.equal(b, torch.full((4,), 0.5))


def test_gae_by_hand():
    # discount 0.5, lambda 0.5, so 0.25 between steps. Two columns, equal except for the end at t = 1.
    #               terminated at 1               truncated at 1
    # delta_2 = 3 + 0.5 * 4 - 2 = 3              the same: the next episode
    # delta_1 = 2 + 0       - 1 = 1              2 + 0.5 * 6 - 1 = 4
    # delta_0 = 1 + 0.5 * 1 - 4 = -2.5           the same
    # A_2 = 3, A_1 = delta_1 (nothing passes `last`), A_0 = -2.5 + 0.25 A_1 = -2.25 and -1.5
    def twice(*x: float) -> Tensor:
        return torch.tensor(x)[:, None].expand(-1, 2)

    terminated = torch.tensor([[False, False], [True, False], [False, False]])
    last = torch.tensor([[False, False], [True, True], [False, False]])
    value = twice(4.0, 1.0, 2.0)
    advantage, value_target = gae(
        twice(1.0, 2.0, 3.0), value, twice(1.0, 6.0, 4.0), terminated, last, discount=0.5, lambda_=0.5
    )
    torch.testing.assert_close(advantage, torch.tensor([[-2.25, -1.5], [1.0, 4.0], [3.0, 3.0]]))
    torch.testing.assert_close(value_target, advantage + value)


@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 128])
def test_gae_equals_a_loop(steps: int, lambda_: float):
    s = segments(steps)
    expected, advantage = torch.empty_like(s["reward"]), torch.zeros(5, dtype=torch.float64)
    for t in reversed(range(steps)):
        bootstrap = s["next_value"][t] * ~s["terminated"][t]
        delta = s["reward"][t] + DISCOUNT * bootstrap - s["value"][t]
        advantage = delta + DISCOUNT * lambda_ * (~s["last"][t] * advantage)
        expected[t] = advantage
    torch.testing.assert_close(gae(**s, discount=DISCOUNT, lambda_=lambda_)[0], expected)


def test_gae_equals_stable_baselines3():
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import RolloutBuffer

    s = {name: x.float() if x.dtype == torch.float64 else x for name, x in segments(64).items()}
    s["last"] = s["terminated"]  # the buffer has no truncation here
    s["next_value"][:-1] = s["value"][1:]
    space = Box(-1.0, 1.0, (1,))
    buffer = RolloutBuffer(64, space, space, gamma=DISCOUNT, gae_lambda=0.8, n_envs=5)
    buffer.rewards, buffer.values = s["reward"].numpy(), s["value"].numpy()
    buffer.episode_starts = np.concatenate([np.zeros((1, 5)), s["last"][:-1].numpy()]).astype(np.float32)
    buffer.compute_returns_and_advantage(s["next_value"][-1], s["last"][-1].numpy())
    advantage, value_target = gae(**s, discount=DISCOUNT, lambda_=0.8)
    torch.testing.assert_close(advantage, torch.from_numpy(buffer.advantages), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value_target, torch.from_numpy(buffer.returns), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
def test_vtrace_of_on_policy_data_is_gae(lambda_: float):
    s = segments(50)
    log_ratio = torch.zeros_like(s["reward"])
    torch.testing.assert_close(
        vtrace(log_ratio, **s, discount=DISCOUNT, lambda_=lambda_), gae(**s, discount=DISCOUNT, lambda_=lambda_)
    )


@pytest.mark.parametrize(("rho_bar", "c_bar", "lambda_"), [(1.0, 1.0, 1.0), (2.0, 0.7, 0.9), (1.0, 1.0, 0.0)])
def test_vtrace_target_equals_the_sum_of_the_paper(rho_bar: float, c_bar: float, lambda_: float):
    # Espeholt et al. 2018, Eq. 1: v_s = V_s + sum_t discount^(t - s) (prod_{s <= i < t} c_i) rho_t delta_t, within the
    # episode of s; c_i = lambda min(c_bar, ratio_i), rho_t = min(rho_bar, ratio_t).
    s = segments(12)
    log_ratio = torch.randn(12, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ratio = log_ratio.exp()
    delta = s["reward"] + DISCOUNT * (s["next_value"] * ~s["terminated"]) - s["value"]
    target = s["value"].clone()
    for b in range(5):
        for start in range(12):
            product = 1.0
            for t in range(start, 12):
                target[start, b] += product * min(rho_bar, float(ratio[t, b])) * delta[t, b]
                product *= DISCOUNT * lambda_ * min(c_bar, float(ratio[t, b]))
                if s["last"][t, b]:
                    break
    advantage, value_target = vtrace(log_ratio, **s, discount=DISCOUNT, lambda_=lambda_, rho_bar=rho_bar, c_bar=c_bar)
    torch.testing.assert_close(value_target, target)
    # A_t = r_t + discount (1 - terminated) V' - V + discount lambda (1 - last) (v_{t+1} - V_{t+1})
    ahead = torch.cat([target[1:] - s["value"][1:], torch.zeros(1, 5, dtype=torch.float64)])
    torch.testing.assert_close(advantage, delta + DISCOUNT * lambda_ * (~s["last"] * ahead))


def estimators(log_ratio: Tensor, s: dict[str, Tensor]) -> list[Tensor]:
    return [
        *gae(**s, discount=DISCOUNT, lambda_=0.9),
        *vtrace(log_ratio, **s, discount=DISCOUNT, lambda_=0.9, rho_bar=1.5),
        divergence_ahead(log_ratio, log_ratio, s["last"], discount=DISCOUNT, c_bar=0.9),
    ]


def test_joined_segments_equal_separate_ones():
    first, second = segments(9, seed=1), segments(6, seed=2)
    first["last"][-1] = True
    log_ratios = [0.3 * first["reward"].sin(), 0.3 * second["reward"].sin()]
    joined = estimators(torch.cat(log_ratios), {name: torch.cat([first[name], second[name]]) for name in first})
    apart = zip(estimators(log_ratios[0], first), estimators(log_ratios[1], second), strict=True)
    for whole, parts in zip(joined, apart, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))


def test_nothing_leaks_across_an_end():
    s = segments(20)
    s["last"][10], s["terminated"][10] = True, False
    log_ratio = torch.zeros_like(s["reward"])
    before = estimators(log_ratio, s)
    for name in ("reward", "value", "next_value"):
        s[name] = torch.cat([s[name][:11], 1e6 + s[name][11:]])
    log_ratio[11:] = 3.0
    for x, y in zip(before, estimators(log_ratio, s), strict=True):
        assert torch.equal(x[:11], y[:11])


def test_the_value_behind_a_termination_is_not_read():
    s = segments(20)
    log_ratio = torch.zeros_like(s["reward"])
    before = estimators(log_ratio, s)
    s["next_value"] = torch.where(s["terminated"], torch.nan, s["next_value"])
    for x, y in zip(before, estimators(log_ratio, s), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("correction", get_args(Correction))
def test_truncations_alone_may_be_given_as_ends(correction: Correction):
    """As in most code, which keeps Gymnasium's two flags."""
    s = segments(20)
    log_ratio = 0.3 * s["value"].cos()
    assert (s["terminated"] & s["last"]).any()
    of_both = s | {"last": s["last"] & ~s["terminated"]}
    found = [corrected(correction, log_ratio, **x, discount=DISCOUNT, lambda_=0.9) for x in (s, of_both)]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_without_bars_vtrace_is_importance_sampling_even_of_huge_ratios():
    # V = 0, discount = lambda = 1: r = 1, 2 and ratios 3, 2. The targets are 2 x 2 and 3 (1 + 4).
    zero, never = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    last, reward = torch.tensor([[False], [True]]), torch.tensor([[1.0], [2.0]])
    free: Any = {"discount": 1.0, "lambda_": 1.0, "rho_bar": math.inf, "c_bar": math.inf}
    log_ratio = torch.tensor([[3.0], [2.0]]).log()
    advantage, target = vtrace(log_ratio, reward, zero, zero, never, last, **free)
    assert target.flatten().tolist() == pytest.approx([15.0, 4.0])
    assert advantage.flatten().tolist() == pytest.approx([5.0, 2.0])
    for x in vtrace(torch.full((2, 1), 100.0), reward, zero, zero, never, last, **free):
        assert x.isfinite().all()
    assert divergence_ahead(reward, torch.full((2, 1), 100.0), last, discount=1.0, c_bar=math.inf).isfinite().all()


def test_discount_and_lambda_may_be_tensors():
    s = {name: x.float() if x.dtype == torch.float64 else x for name, x in segments(10).items()}
    torch.testing.assert_close(
        gae(**s, discount=torch.tensor(0.9), lambda_=torch.tensor(0.5)), gae(**s, discount=0.9, lambda_=0.5)
    )


def test_divergence_ahead_by_hand():
    # discount 1/2, c_bar 1/4; d = 1, 2, 4 and ratios 4, 1/2, 1/4. In the second column an episode ends at t = 1.
    # V_2 = 1/4 4 = 1,   V_1 = 1/2 2 + 1/2 1/4 V_2 = 9/8 and 1
    # ahead_2 = 0,   ahead_1 = 1/2 V_2 = 1/2 and 0,   ahead_0 = 1/2 V_1 = 9/16 and 1/2
    # As released d_{t+1} stands for d_t: V_2 = 1/4 4 = 1, V_1 = 1/2 4 + 1/8 and 2 + 0, ahead_0 = 17/16 and 1
    d = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(-1, 2)
    log_ratio = torch.log(torch.tensor([4.0, 0.5, 0.25]))[:, None].expand(-1, 2)
    last = torch.tensor([[False, False], [False, True], [False, False]])
    ahead = divergence_ahead(d, log_ratio, last, discount=0.5, c_bar=0.25)
    torch.testing.assert_close(ahead, torch.tensor([[9.0 / 16.0, 0.5], [0.5, 0.0], [0.0, 0.0]]))
    ahead = divergence_ahead(d, log_ratio, last, discount=0.5, c_bar=0.25, released=True)
    torch.testing.assert_close(ahead, torch.tensor([[17.0 / 16.0, 1.0], [0.5, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("c_bar", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_divergence_ahead_equals_a_loop(steps: int, c_bar: float, released: bool):
    s = segments(steps)
    d, log_ratio = s["reward"], 0.5 * s["value"]
    ratio, expected = log_ratio.exp(), torch.zeros_like(d)
    value = torch.zeros(5, dtype=torch.float64)
    for t in reversed(range(steps)):
        expected[t] = DISCOUNT * (~s["last"][t] * value)
        paid = d[min(t + 1, steps - 1)] if released else d[t]
        value = ratio[t].clamp(max=1.0) * paid + ratio[t].clamp(max=c_bar) * expected[t]
    found = divergence_ahead(d, log_ratio, s["last"], discount=DISCOUNT, c_bar=c_bar, released=released)
    torch.testing.assert_close(found, expected)


def test_the_divergence_ahead_of_ratios_below_the_cuts_is_importance_sampling():
    """Ratios below 1 are not cut: the divergence ahead is the discounted sum of d, weighted by products of ratios."""
    d = segments(6)["reward"]
    log_ratio, never = -segments(6, seed=1)["reward"].abs(), torch.zeros(6, 5, dtype=torch.bool)
    expected = torch.zeros(5, dtype=torch.float64)
    for t in range(1, 6):
        expected += DISCOUNT**t * log_ratio[1 : t + 1].sum(0).exp() * d[t]
    torch.testing.assert_close(divergence_ahead(d, log_ratio, never, discount=DISCOUNT)[0], expected)


CORRECTIONS: list[Correction] = ["none", "vtrace", "retrace", "ess"]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction_of_on_policy_data_is_gae(correction: Correction):
    data = segments(40)
    zero = torch.zeros_like(data["reward"])
    found = corrected(correction, zero, **data, discount=DISCOUNT, lambda_=0.9)
    torch.testing.assert_close(found, gae(**data, discount=DISCOUNT, lambda_=0.9))


def test_corrections_of_older_data():
    data, log_ratio = segments(40), segments(40, seed=1)["reward"]
    numbers: Any = {"discount": DISCOUNT, "lambda_": 0.9}
    found = {name: corrected(name, log_ratio, **data, **numbers, rho_bar=1.3, c_bar=0.7) for name in CORRECTIONS}
    torch.testing.assert_close(found["none"], gae(**data, **numbers))
    torch.testing.assert_close(found["vtrace"], vtrace(log_ratio, **data, **numbers, rho_bar=1.3, c_bar=0.7))
    torch.testing.assert_close(found["retrace"], retrace(log_ratio, **data, **numbers))
    e = float(effective_sample_size(log_ratio))
    assert e < 0.8
    torch.testing.assert_close(found["ess"], gae(**data, discount=DISCOUNT, lambda_=0.9 * e))
    with pytest.raises(ValueError, match="correction='td'"):
        corrected("td", log_ratio, **data, **numbers)  # type: ignore[arg-type]


def test_retrace_by_hand():
    # discount 0.5, lambda 1, values 0, rewards 1, 2, 4, ratios 8, 1/2, 4 and no end: the action at t is given.
    # A_2 = 4,   A_1 = 2 + 0.5 min(1, 4) 4 = 4,   A_0 = 1 + 0.5 min(1, 1/2) 4 = 2
    column = torch.tensor([1.0, 2.0, 4.0])[:, None]
    zero, never = torch.zeros_like(column), torch.zeros_like(column, dtype=torch.bool)
    log_ratio = torch.log(torch.tensor([8.0, 0.5, 4.0]))[:, None]
    advantage, target = retrace(log_ratio, column, zero, zero, never, never, discount=0.5, lambda_=1.0)
    assert advantage.flatten().tolist() == target.flatten().tolist() == [2.0, 4.0, 4.0]


def test_vtrace_and_retrace_differ_in_the_value_target_alone():
    """With bars of 1: both give A_t = delta_t + discount lambda min(1, rho_{t+1}) A_{t+1}."""
    data = segments(9)
    log_ratio = torch.randn_like(data["reward"])
    numbers: Any = {"discount": 0.97, "lambda_": 0.9}
    one, of_v = vtrace(log_ratio, **data, **numbers)
    other, of_q = retrace(log_ratio, **data, **numbers)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(of_v - data["value"], log_ratio.exp().clamp(max=1.0) * (of_q - data["value"]))


def test_windows_hold_the_steps_that_follow():
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])  # two environments
    first, second = [[1, 2], [2, 3], [3, 3]], [[10, 20], [20, 30], [30, 30]]
    assert windows(x, 2)[:, 0].tolist() == first and windows(x, 2)[:, 1].tolist() == second
    assert torch.equal(windows(torch.stack([x, -x], dim=-1), 2), torch.stack([windows(x, 2), -windows(x, 2)], dim=-1))
    assert windows(x, 9).shape == (3, 2, 3)  # no longer than the record


def test_segments_end_with_the_episode_or_the_record():
    last = torch.tensor([[False, True, False, False]]).T
    expected = [[True, True, False], [True, False, False], [True, True, False], [True, False, False]]
    assert within_episode(last, 3)[:, 0].tolist() == expected


def test_path_weights_by_hand():
    within = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    assert path_weights(within, 0.5).tolist() == [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert path_weights(within, 1.0).tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert path_weights(within, 0.0).tolist() == [[1.0, 0.0, 0.0]] * 3


def test_path_residuals_by_hand():
    """4 + 1 - 10 / 2 = 0;  4 + 1 + 2 / 2 - 20 / 4 = 1;  4 + 1 + 1 + 8 / 4 - 0 = 8."""
    charge, end_value = torch.tensor([1.0, 2.0, 8.0]), torch.tensor([10.0, 20.0, 0.0])
    assert path_residuals(charge, torch.tensor(4.0), end_value, discount=0.5).tolist() == [0.0, 1.0, 8.0]


@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("length", [1, 3, 12])
def test_weighted_residuals_are_gae_of_the_segment(length: int, lambda_: float):
    s = segments(12)
    s["next_value"][:-1] = torch.where(s["last"][:-1], s["next_value"][:-1], s["value"][1:])
    end_value = torch.where(s["terminated"], 0.0, s["next_value"])
    residuals = path_residuals(
        windows(-s["reward"], length), s["value"], windows(end_value, length), discount=torch.tensor(DISCOUNT)
    )
    weights = path_weights(within_episode(s["last"], length), torch.tensor(lambda_))
    found = -(weights * residuals).sum(-1)
    for t in range(12):
        part = {name: x[t : t + length] for name, x in s.items()}
        expected, _ = gae(**part, discount=DISCOUNT, lambda_=lambda_)
        torch.testing.assert_close(found[t], expected[0], rtol=1e-6, atol=1e-6)
