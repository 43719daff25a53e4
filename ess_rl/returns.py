"""Advantages and value targets, all from one reverse linear recurrence.

Notation: T steps per segment, B segments. Every tensor is [T, B] (or [T, ...]); rewards are per control step, and so
are `discount` and `lambda_`, which are floats or 0-dim tensors. No function here stops gradients: they are called
outside the loss. ValueError if the shapes of a trajectory differ or an end flag is not bool: int flags would act as
numbers, and a value [T, B, 1] would broadcast.

    terminated   the task ended at t: next_value[t] counts as zero
    last         the episode ended at t, terminated or truncated: nothing after t belongs to it. (Truncated alone is
                 enough for `gae`, `vtrace`, `retrace` and `corrected`, which join it with `terminated`.)
                 A truncated step bootstraps from next_value[t], which is V(next_obs), not V of the reset state.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ess_rl import checks
from ess_rl.ess import effective_sample_size, policy_ratio

Correction = Literal["none", "vtrace", "retrace", "ess"]


def reverse_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """x_t = a_t + b_t x_{t+1} with x_T = 0, over the first axis of [T, ...], in log2(T) tensor steps.

    Affine maps compose associatively, so each step doubles the span that one map covers (Hillis and Steele 1986;
    Blelloch 1990, "Prefix sums and their applications").
    """
    stride = 1
    while stride < a.shape[0]:
        a, b = a + b * _shifted(a, stride), b * _shifted(b, stride)
        stride *= 2
    return a


def _shifted(x: Tensor, steps: int) -> Tensor:
    """x_{t + steps} of x [T, ...], zero past the end."""
    return pad(x[steps:], [0, 0] * (x.ndim - 1) + [0, steps])


def _check(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, last: Tensor, **others: Tensor
) -> None:
    checks.flags(terminated=terminated, last=last)
    checks.same_shape(reward=reward, value=value, next_value=next_value, last=last, **others)


def _td_error(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, discount: float | Tensor
) -> Tensor:
    """delta_t = r_t + discount (1 - terminated_t) V(next_obs_t) - V(obs_t)"""
    return reward + discount * torch.where(terminated, 0.0, next_value) - value


def _carry(terminated: Tensor, last: Tensor, discount: float | Tensor, lambda_: float | Tensor, like: Tensor) -> Tensor:
    """discount lambda where the episode goes on, else 0."""
    return discount * lambda_ * (~(last | terminated)).to(like.dtype)


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    last: Tensor,
    *,
    discount: float | Tensor,
    lambda_: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation. -> (advantage [T, B], value_target [T, B])

        delta_t = r_t + discount (1 - terminated_t) V(next_obs_t) - V(obs_t)
        A_t     = delta_t + discount lambda (1 - last_t) A_{t+1},      value_target_t = A_t + V(obs_t)

    Source: Schulman et al. 2016 (arXiv 1506.02438), Eq. 16; truncation apart from termination as in Pardo et al. 2018
    (arXiv 1712.00378).
    """
    _check(reward, value, next_value, terminated, last)
    delta = _td_error(reward, value, next_value, terminated, discount)
    advantage = reverse_recurrence(delta, _carry(terminated, last, discount, lambda_, delta))
    return advantage, advantage + value


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    last: Tensor,
    *,
    discount: float | Tensor,
    lambda_: float | Tensor,
    rho_bar: float | Tensor = 1.0,
    c_bar: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace on another policy's data. -> (advantage [T, B], value_target [T, B])

        rho_t    = exp(log_ratio_t),     delta_t as in `gae`
        target_t - V_t = min(rho_bar, rho_t) delta_t
                       + discount lambda min(c_bar, rho_t) (1 - last_t) (target_{t+1} - V_{t+1})
        A_t      = delta_t + discount lambda (1 - last_t) (target_{t+1} - V_{t+1})

    Source: Espeholt et al. 2018 (arXiv 1802.01561), Eq. 1 and Remark 2 for lambda. Two deviations, so that at
    log_ratio = 0 both outputs are GAE's: the advantage looks ahead with discount * lambda instead of just discount, and
    it is not multiplied by rho_t, because the policy ratio is applied once, by the objective. Bars may be infinite: a
    ratio then counts up to e^20. With rho_bar = c_bar = 1 the advantage is that of `retrace`, and the two differ only
    in the value target.
    """
    _check(reward, value, next_value, terminated, last, log_ratio=log_ratio)
    ratio = policy_ratio(log_ratio)
    delta = _td_error(reward, value, next_value, terminated, discount)
    carry = _carry(terminated, last, discount, lambda_, delta)
    excess = reverse_recurrence(torch.clamp(ratio, max=rho_bar) * delta, torch.clamp(ratio, max=c_bar) * carry)
    return delta + carry * _shifted(excess, 1), excess + value


def retrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    last: Tensor,
    *,
    discount: float | Tensor,
    lambda_: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Traces cut as in Retrace(lambda), with a state value. -> (advantage [T, B], value_target [T, B])

        A_t = delta_t + discount lambda (1 - last_t) min(1, rho_{t+1}) A_{t+1},      value_target_t = A_t + V(obs_t)

    with delta_t as in `gae`. The action at t is taken as given and the later ones are corrected; rho_t enters neither
    output, because it is applied once, by the objective.

    Source of the traces: Munos et al. 2016 (arXiv 1606.02647), Eq. 4 with c_s = lambda min(1, rho_s). Deviation: theirs
    corrects a Q-function, whose delta takes the expectation over the target policy's next action, so it has no bias
    where Q is exact. With V instead, every delta from t + 1 on is also weighted by its own cut ratio: A_t is V-trace's
    (`vtrace` with bars of 1), an estimate of Q - V that is biased wherever a ratio is cut, even with an exact V. The
    value target leaves the first action uncorrected and so is a target for Q(s_t, a_t): averaged over b's actions, it
    pulls V toward b's value by that one action, which `vtrace` corrects.
    """
    _check(reward, value, next_value, terminated, last, log_ratio=log_ratio)
    delta = _td_error(reward, value, next_value, terminated, discount)
    following = _shifted(torch.exp(log_ratio).clamp(max=1.0), 1)
    advantage = reverse_recurrence(delta, _carry(terminated, last, discount, lambda_, delta) * following)
    return advantage, advantage + value


def corrected(
    correction: Correction,
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    last: Tensor,
    *,
    discount: float | Tensor,
    lambda_: float | Tensor,
    rho_bar: float | Tensor = 1.0,
    c_bar: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets from another policy's data, in one of four ways. All are `gae` at log_ratio = 0.

    "none"      `gae` with the current value: lambda-returns of the behavior policy (as in P3O 2019)
    "vtrace"    `vtrace`: traces and deltas cut at c_bar and rho_bar
    "retrace"   `retrace`: V-trace's advantage with bars of 1, and a value target with the first action uncorrected
    "ess"       `gae` with lambda times the effective sample size of the given segments: the less their actions
                agree with the current policy, the shorter the lookahead. Ours; no source.
    """
    trajectory = (reward, value, next_value, terminated, last)
    if correction == "vtrace":
        return vtrace(log_ratio, *trajectory, discount=discount, lambda_=lambda_, rho_bar=rho_bar, c_bar=c_bar)
    if correction == "retrace":
        return retrace(log_ratio, *trajectory, discount=discount, lambda_=lambda_)
    if correction == "ess":
        return gae(*trajectory, discount=discount, lambda_=lambda_ * effective_sample_size(log_ratio))
    if correction == "none":
        return gae(*trajectory, discount=discount, lambda_=lambda_)
    raise ValueError(f"correction={correction!r}: choose one of none, vtrace, retrace, ess")


def divergence_ahead(
    divergence: Tensor,
    log_ratio: Tensor,
    last: Tensor,
    *,
    discount: float | Tensor,
    c_bar: float | Tensor = 1.0,
    released: bool = False,
) -> Tensor:
    """The divergence that an action leads to, charged from the next step on: [T, B].

        V_t     = min(1, rho_t) d_t + discount (1 - last_t) min(c_bar, rho_t) V_{t+1}
        ahead_t = discount (1 - last_t) V_{t+1},      D_t = d_t + ahead_t

    d_t is the cost of the action at t itself (`ess_rl.objectives.divergence_slope`), D_t its multi-step divergence: the
    divergence of the states that pi and b visit, not only of their actions. c_bar = 0 looks one step ahead. Nothing is
    added beyond the end of a segment or of an episode, terminated or truncated.

    Source: Wang et al. 2019 (arXiv 2501.15034), the recursion as their code documents it. To compute V_t, that code
    reads d_{t+1} in place of d_t (except at the segment's end), even past the end of an episode; `released` reproduces
    this, for ablation.
    """
    checks.flags(last=last)
    checks.same_shape(divergence=divergence, log_ratio=log_ratio, last=last)
    ratio = policy_ratio(log_ratio)
    carry = discount * (~last).to(divergence.dtype)
    paid = torch.cat([divergence[1:], divergence[-1:]]) if released else divergence
    value = reverse_recurrence(ratio.clamp(max=1.0) * paid, ratio.clamp(max=c_bar) * carry)
    return carry * _shifted(value, 1)


def windows(x: Tensor, length: int) -> Tensor:
    """The segment that begins at each step: x [T, B, ...] to [T, B, min(length, T), ...], steps t to t + length - 1.

    Past the end the last step is repeated; `within_episode` says which steps count.
    """
    steps = torch.arange(x.shape[0], device=x.device)
    index = (steps[:, None] + steps[:length]).clamp(max=x.shape[0] - 1)
    return x[index].movedim(1, 2)


def within_episode(last: Tensor, length: int) -> Tensor:
    """Mask of `windows`: the steps within the record and the episode that the segment begins in; bool, same shape."""
    steps = torch.arange(last.shape[0], device=last.device)
    held = steps[:, None] + steps[:length] < last.shape[0]
    ends = windows(last, length).long()
    return held[:, None] & (ends.cumsum(-1) == ends)  # no end among the earlier steps


def path_weights(within: Tensor, lambda_: float | Tensor) -> Tensor:
    """Weight of each length of a segment, within [..., k] -> [..., k]; the weights sum to 1.

        w_j = (1 - lambda) lambda^(j - 1) for j < L,     w_L = lambda^(L - 1)

    with L the number of steps within the episode. lambda = 1 uses only the longest length, 0 only a single step. These
    are the weights of the lambda-return: weighted by them, the `path_residuals` of charges -r are V minus the
    lambda-return, truncated after k steps. SubTB(lambda) (Madan et al. 2022, arXiv 2209.12782) has lambda^j,
    normalized.
    """
    number = torch.arange(within.shape[-1], device=within.device)
    following = torch.cat([within[..., 1:], torch.zeros_like(within[..., :1])], dim=-1)
    share = torch.where(following, 1.0 - lambda_, 1.0)
    return within * share * lambda_**number


def path_residuals(charge: Tensor, value: Tensor, end_value: Tensor, *, discount: float | Tensor) -> Tensor:
    """Deviation of a segment from balance, for each of its lengths j = 1 ... k: [..., k].

        delta_j = V(s_0) - discount^j V(s_j) + sum_{i < j} discount^i c_i

    Args:
        charge: [..., k] cost of each step: -r, plus any other charges.
        value: [...] V(s_0).
        end_value: [..., k] V of the states the steps lead to, s_1 ... s_k; zero where the task ended.
    """
    number = torch.arange(charge.shape[-1], dtype=charge.dtype, device=charge.device)
    return value[..., None] - discount ** (number + 1) * end_value + (discount**number * charge).cumsum(-1)


def return_range(reward: Tensor, last: Tensor) -> Tensor:
    """Largest minus smallest undiscounted episode return in rewards [T, ...]; 0-dim, 0 if that is rounding error.

    Source: the reward scale in IQL's code (Kostrikov et al. 2021, arXiv 2110.06169), 1000 / range.
    """
    checks.flags(last=last)
    checks.same_shape(reward=reward, last=last)
    first = torch.cat([torch.ones_like(last[:1]), last[:-1]])
    returns = reverse_recurrence(reward.double(), (~last).double())[first]
    span = returns.max() - returns.min()
    return torch.where(span > 1e-6 * returns.abs().max(), span, 0.0)
