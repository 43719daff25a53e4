"""Optimization as pure functions of trees of tensors."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from ess_rl import processes
from ess_rl.contract import Metrics, Tree
from ess_rl.ess import effective_sample_size


def gradient(loss_function: Callable[[Tree], tuple[Tensor, Metrics]], params: Tree) -> tuple[Tree, Metrics]:
    """Gradient of a loss at `params`, and the metrics that come with it.

    If several processes share the minibatch, both are means over them, so the loss must be a mean over samples.
    """
    return processes.all_mean(grad(loss_function, has_aux=True)(params))


def adam_init(params: Tree) -> Tree:
    """Zero first and second moments, and a zero step count."""
    leaf = pytree.tree_leaves(params)[0]
    return {
        "m": pytree.tree_map(torch.zeros_like, params),
        "v": pytree.tree_map(torch.zeros_like, params),
        "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
    }


def adam_step(
    params: Tree,
    grads: Tree,
    optimizer: Tree,
    learning_rate: float | Tensor,
    *,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-5,
) -> tuple[Tree, Tree]:
    """One step of Adam. -> (params, optimizer)

    Source: Kingma and Ba 2015 (arXiv 1412.6980), Algorithm 1; a test checks that it equals torch.optim.Adam. An
    epsilon of 1e-5 is customary in PPO implementations; torch's own default is 1e-8.
    """
    # Autograd returns the gradient of an [in, 1] weight transposed. Everything computed from it would inherit these
    # strides and differ in layout from the initial parameters: one more program to compile for every function.
    grads = pytree.tree_map(lambda g: g.clone(memory_format=torch.contiguous_format), grads)
    step = optimizer["step"] + 1.0
    m = pytree.tree_map(lambda m, g: beta_1 * m + (1.0 - beta_1) * g, optimizer["m"], grads)
    v = pytree.tree_map(lambda v, g: beta_2 * v + (1.0 - beta_2) * g * g, optimizer["v"], grads)
    rate = learning_rate / (1.0 - beta_1**step)
    root = torch.sqrt(1.0 - beta_2**step)
    params = pytree.tree_map(lambda p, m, v: p - rate * m / (torch.sqrt(v) / root + epsilon), params, m, v)
    return params, {"m": m, "v": v, "step": step}


def adam_steps(
    params: Tree, grads: Tree, optimizer: Tree, rates: Mapping[str, float | Tensor]
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """`adam_step` for each network in `rates`, name -> learning rate; each has its own moments in `optimizer`."""
    steps = {name: adam_step(params[name], grads[name], optimizer[name], rate) for name, rate in rates.items()}
    return {name: new for name, (new, _) in steps.items()}, {name: moments for name, (_, moments) in steps.items()}


def rmsprop_init(params: Tree) -> Tree:
    """A second moment of zero."""
    return {"v": pytree.tree_map(torch.zeros_like, params)}


def rmsprop_step(
    params: Tree,
    grads: Tree,
    optimizer: Tree,
    learning_rate: float | Tensor,
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> tuple[Tree, Tree]:
    """One step of RMSProp, without momentum or centering. -> (params, optimizer)

        v = decay v + (1 - decay) g^2,   params -= learning_rate g / (sqrt(v) + epsilon)

    Source: Tieleman and Hinton 2012 (lecture 6.5); a test checks that it equals torch.optim.RMSprop. The defaults
    are those of the usual A2C implementations.
    """
    grads = pytree.tree_map(lambda g: g.clone(memory_format=torch.contiguous_format), grads)  # as in adam_step
    v = pytree.tree_map(lambda v, g: decay * v + (1.0 - decay) * g * g, optimizer["v"], grads)
    params = pytree.tree_map(lambda p, g, v: p - learning_rate * g / (torch.sqrt(v) + epsilon), params, grads, v)
    return params, {"v": v}


def clip_by_global_norm(grads: Tree, max_norm: float | Tensor) -> tuple[Tree, Tensor]:
    """Scale `grads` so that their joint 2-norm is at most `max_norm`. -> (grads, norm before)"""
    leaves = pytree.tree_leaves(grads)
    norm = torch.sqrt(sum((leaf.square().sum() for leaf in leaves), start=torch.zeros_like(leaves[0].sum())))
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return pytree.tree_map(lambda g: g * factor, grads), norm


def held_back(rate_factor: float | Tensor, log_ratio: Tensor, keep_ess: float | Tensor) -> Tensor:
    """Adapt a learning-rate factor so that an iteration's updates leave an ESS of `keep_ess`.

        factor <- factor * sqrt( log(keep_ess) / log(e) ),     e the ESS of exp(log_ratio)

    by a factor of at most 1.5 at once, up or down, and within 0.01 and 1: never above the schedule. A mean that moved
    by x standard deviations in each of d action dimensions gives log e = -d x^2 (Gaussians of equal width), hence the
    root.

    Source: ours; Schulman's implementations of 2016 controlled the KL of PPO in this way.

    Args:
        rate_factor: a number or a 0-dim tensor, in [0.01, 1].
        log_ratio: of the policy after the updates to that before them, on the iteration's data, any shape.
        keep_ess: likewise a number or a tensor, in [0, 1); 0 limits nothing.
    """
    log_e = torch.log(effective_sample_size(log_ratio))
    keep = keep_ess if isinstance(keep_ess, Tensor) else torch.full_like(log_e, keep_ess)
    allowed = -torch.log(keep)  # of -log e; infinite for 0
    change = torch.sqrt(allowed / -log_e.clamp(max=-1e-6)).clamp(1.0 / 1.5, 1.5)
    return (rate_factor * change).clamp(0.01, 1.0)


def linear_decay(rate: Tensor, progress: Tensor, final: float | Tensor = 0.0) -> Tensor:
    """`rate` at the beginning of training, `final` times `rate` at the end, where `progress` is 1; 0-dim."""
    return rate * (1.0 - (1.0 - final) * progress)


def polyak(target: Tree, params: Tree, share: float | Tensor) -> Tree:
    """(1 - share) target + share params: a target network that follows slowly (Polyak and Juditsky 1992)."""
    return pytree.tree_map(lambda old, new: old + share * (new - old), target, params)
