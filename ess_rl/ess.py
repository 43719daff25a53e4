"""Effective sample size of importance weights: how many of n samples still count after reweighting."""

import torch
from torch import Tensor

from ess_rl import checks, processes

HIGHEST_LOG_RATIO = 20.0  # e^20 is 4.9e8


def policy_ratio(log_ratio: Tensor) -> Tensor:
    """rho = exp(log_ratio), clamped at e^20; beyond that there is no gradient.

    Deviation of everything that uses it: e^89 overflows float32, and an infinite ratio turns the zero gradient outside
    a clip range, or the zero behind the end of an episode, into NaN. Such ratios occur in data collected elsewhere,
    where a fitted behavior policy is narrow and an action far from its mean.
    """
    return torch.exp(log_ratio.clamp(max=HIGHEST_LOG_RATIO))


def effective_sample_size(
    log_ratio: Tensor, mask: Tensor | None = None, dim: int | tuple[int, ...] | None = None
) -> Tensor:
    """Normalized effective sample size e = (sum rho)^2 / (n sum rho^2), with rho = exp(log_ratio).

    1 when all ratios are equal, 1/n when one outweighs all others; multiplying every ratio by a constant changes
    nothing. As n goes to infinity, e -> exp(-D_2(pi || b)), D_2 the order-2 Renyi divergence, if E_b[rho^2] is finite;
    if it is not (a Gaussian policy wider than sqrt(2) times the behavior's), the e of a finite batch is far too high.

    Source: Kong 1992; as trust in a batch: Fakoor et al. 2019 (arXiv 1905.01756), 2026 (arXiv 2605.12380, Eq. 11).
    Deviation: the sums are over exp(log_ratio - max), which leaves e unchanged but cannot overflow.

    Args:
        log_ratio: log pi(a|s) - log b(a|s), any shape. Half precision is summed, and returned, in float32.
        mask: bool, same shape (ValueError otherwise); False elements do not count, whatever they hold.
        dim: axes of the samples; None means all axes.

    Raises:
        ValueError: no samples, or a mask that is not bool or has another shape.

    Returns:
        e in [1/n, 1], shaped like `log_ratio` without `dim`, on its device, without gradient or host synchronization.
        NaN if a ratio that counts is infinite or NaN, or if nothing counts: such a batch has no meaningful ESS. Under
        torch.distributed (process group initialized) the batch is that of all processes together: every process must
        make the call, and all get the same result.
    """
    if mask is not None:
        checks.flags(mask=mask)
        checks.same_shape(log_ratio=log_ratio, mask=mask)
    if log_ratio.numel() == 0:
        raise ValueError(f"log_ratio {list(log_ratio.shape)}: no samples, and so no effective sample size")
    log_ratio = log_ratio.detach().to(torch.promote_types(log_ratio.dtype, torch.float32))
    dims = tuple(range(log_ratio.ndim)) if dim is None else dim
    valid = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    log_ratio = torch.where(valid, log_ratio, -torch.inf)
    top = processes.all_max(log_ratio.amax(dims, keepdim=True))
    ratio = torch.exp(log_ratio - top)
    sums = torch.stack([ratio.sum(dims), ratio.square().sum(dims), valid.to(ratio.dtype).sum(dims)])
    first, second, count = processes.all_sum(sums).unbind(0)
    # Rounding can push the quotient past its bounds, and 1 - e below 0. clamp keeps NaN.
    return torch.clamp(first.square() / (count * second), min=1.0 / count, max=torch.ones_like(count))


def advantage_weighted_ess(log_ratio: Tensor, advantage: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Effective sample size of rho |A|, the magnitude of each sample's contribution to the policy gradient:

        e_A = (sum rho |A|)^2 / (n sum rho^2 A^2)

    This is the relevant ESS if the ratio is large precisely for actions that matter (or for those that do not). On
    fresh data it is (mean |A|)^2 / mean A^2, which is 2 / pi for normally distributed advantages, not 1. Ours; the idea
    of weighting trust by |A| is HINT's "Affinity" (no ESS there).

    Args:
        log_ratio: log pi(a|s) - log b(a|s), any shape.
        advantage: same shape (ValueError otherwise); its scale does not matter. An advantage of 0 counts as the
            smallest positive normal float, so that a batch of zeros has a value: the plain ESS.
        dim: axes of the samples; None means all axes.
    """
    checks.same_shape(log_ratio=log_ratio, advantage=advantage)
    size = advantage.detach().abs().clamp(min=torch.finfo(advantage.dtype).tiny)
    return effective_sample_size(log_ratio + torch.log(size), dim=dim)
