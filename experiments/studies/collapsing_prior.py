"""What happens when a prior's standard deviation collapses?

The gradient of KL(pi || b) grows as the inverse square of b's standard deviation sigma_0 (Rudner et al. 2021, arXiv
2212.13936), and P3O's pull is such a KL, with a weight 1 - e of at most 1. Two parts:

    computed    the norm of the policy's gradient as a function of sigma_0, for a policy at initialization and a b whose
                mean is another network's: for the KL only, for P3O's whole loss with actions drawn from b, and for both
                remedies, the reverse KL and a floor under sigma_0
    trained     p3o_prior on Pendulum, with a prior fitted to two episodes: the mean of one network, equally sure
                everywhere; an ensemble and a Gaussian process, whose variance grows away from those episodes; the
                reverse KL to the first. sigma_0 is every prior's standard deviation on its demonstrations

The effect of a floor on the trained ones can be read off: one network with a floor is the same network with sigma_0 at
the floor. Learning fails if the return at the smallest sigma_0 is clearly below that at the largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.study import Finals, Outcome, Study, Verdict, curve, difference, level, picture
from experiments.suites import DEMONSTRATIONS, RANDOM, SMALL, SMOKE, Job

SIGMAS = (1.0, 0.3, 0.1, 0.03, 0.01)
ARMS: dict[str, dict[str, Any]] = {
    "network": {"prior": "mle"},
    "ensemble": {"prior": "ensemble"},
    "Gaussian process": {"prior": "gp"},
    "network, reverse KL": {"prior": "mle", "prior_kl": "reverse"},
}
FREE = "no prior"
FLOOR = 0.1
SLOPES = {"KL(pi || b)": -2.0, "P3O": -2.0, "KL(b || pi)": 0.0, "P3O, reverse KL": 0.0}  # predicted, within 0.3
FLOORED = f"KL(pi || b), sigma_0 at least {FLOOR:g}"
GRADIENT = "gradient"


def jobs(quick: bool) -> tuple[Job, ...]:
    base: Any = {**SMALL, "demonstrations": RANDOM} if quick else {"demonstrations": DEMONSTRATIONS}
    how: Any = {**SMOKE, "seeds": range(2), "steps": 1_024} if quick else {"steps": 150_000}
    made = []
    for label, changes in ARMS.items():
        sweep = {"prior_std": SIGMAS[::4] if quick else SIGMAS}
        settings = {**base, **changes}
        made.append(Job("p3o_prior", "Pendulum-v1", **{**how, "settings": settings, "sweep": sweep, "label": label}))
    settings = {**base, "prior": "mle", "prior_coef": 0.0}
    made.append(Job("p3o_prior", "Pendulum-v1", **{**how, "settings": settings, "label": FREE}))
    return tuple(made)


def gradients(quick: bool = False) -> Outcome:
    """Norms of the gradient with respect to all parameters of a policy, [seeds, sigma_0]."""
    import torch
    from torch.func import grad
    from torch.utils._pytree import tree_leaves

    from ess_rl import random
    from ess_rl.gaussian import Gaussian, kl
    from ess_rl.networks import mlp, mlp_init, policy, policy_init
    from ess_rl.objectives import p3o

    obs_dim, act_dim, hidden, samples = 3, 1, (64, 64), 1024
    norms: dict[str, list[list[float]]] = {label: [] for label in (*SLOPES, FLOORED)}
    for number in range(2 if quick else 10):
        seed = torch.tensor(number)
        net = policy_init(random.fold_in(seed, 0), obs_dim, act_dim, hidden, -1.0)
        other = mlp_init(random.fold_in(seed, 1), (obs_dim, *hidden, act_dim), 1.0)
        obs = random.normal(random.fold_in(seed, 2), (samples, obs_dim))
        noise = random.normal(random.fold_in(seed, 3), (samples, act_dim))
        advantage = random.normal(random.fold_in(seed, 4), (samples,))
        behavior_mean = mlp(other, obs)

        def loss(net: Any, label: str, sigma: float) -> torch.Tensor:
            sigma = max(sigma, FLOOR) if label == FLOORED else sigma
            pi = policy(net, obs)  # noqa: B023 (used at once)
            b = Gaussian(behavior_mean, torch.full_like(behavior_mean, sigma).log())  # noqa: B023
            apart = kl(b, pi) if label in ("KL(b || pi)", "P3O, reverse KL") else kl(pi, b)
            if not label.startswith("P3O"):
                return apart.mean()
            action = b.sample(noise)  # noqa: B023
            return p3o(pi.log_prob(action), b.log_prob(action), advantage, apart)[0]  # noqa: B023

        for label, rows in norms.items():
            found = [grad(loss)(net, label, sigma) for sigma in SIGMAS]
            rows.append([float(sum(x.square().sum() for x in tree_leaves(one))) ** 0.5 for one in found])
    return {(GRADIENT, label): np.array(rows) for label, rows in norms.items()}


def slopes(norms: Finals) -> Finals:
    """Slopes [seeds] of the least-squares line through log norm [seeds, sigma_0] over log sigma_0."""
    return np.polyfit(np.log10(SIGMAS), np.log10(norms).T, 1)[0]


def _split(outcome: Outcome) -> tuple[dict[str, Finals], dict[str, dict[float, Finals]], Finals]:
    """-> (norms by loss, final returns by arm and sigma_0 from the largest down, final returns without a prior)"""
    norms = {label: x for (kind, label), x in outcome.items() if kind == GRADIENT}
    arms: dict[str, dict[float, Finals]] = {}
    for (job, members), finals in outcome.items():
        if job in ARMS:
            arms.setdefault(job, {})[float(members.split()[-1])] = finals
    arms = {arm: dict(sorted(rows.items(), reverse=True)) for arm, rows in arms.items()}
    (free,) = [finals for (job, _), finals in outcome.items() if job == FREE]
    return norms, arms, free


def _signed(x: float) -> str:
    """Format with two decimals and a sign; a zero gets a plus, whichever side it was rounded from."""
    return f"{round(x, 2) + 0.0:+.2f}"


def judge(outcome: Outcome) -> Verdict:
    norms, arms, free = _split(outcome)
    sentences, wrong, open_ = [], [], []
    for label, predicted in SLOPES.items():
        value, low, high = level(slopes(norms[label]))
        sentences.append(
            f"gradient of {label}: slope {_signed(value)} [{_signed(low)}, {_signed(high)}], predicted {predicted:+.0f}"
        )
        if high < predicted - 0.3 or low > predicted + 0.3:
            wrong.append(f"the slope of {label}")
        elif low < predicted - 0.3 or high > predicted + 0.3:
            open_.append(f"the slope of {label}")
    times = np.median(norms[FLOORED][:, -1] / norms[FLOORED][:, 0])
    sentences.append(f"gradient of {FLOORED}: at {SIGMAS[-1]:g} {times:.0f} times that at {SIGMAS[0]:g}")
    sentences.append(f"return with no prior: {level(free).value:.0f}")
    fails = {}
    for arm, rows in arms.items():
        (largest, at_largest), *_, (smallest, at_smallest) = rows.items()
        fails[arm] = difference(at_smallest, at_largest)
        sentences.append(
            f"{arm}: {level(at_largest).value:.0f} at sigma_0 = {largest:g}; at {smallest:g} {fails[arm]} to that"
        )
    if fails["network"].low > 0.0:
        wrong.append("one network, which does not fail")
    elif fails["network"].high >= 0.0:
        open_.append("one network")
    for arm in list(ARMS)[1:]:
        if fails[arm].high < 0.0:
            wrong.append(f"{arm}, which fails")
        ahead = difference(*(list(arms[one].values())[-1] for one in (arm, "network")))
        sentences.append(f"at the smallest sigma_0 {arm} less network: {ahead}")
        if ahead.high < 0.0:
            wrong.append(f"{arm} below the network")
        elif ahead.low <= 0.0:
            open_.append(f"{arm} over the network")
    sentences.append(f"against the prediction: {', '.join(wrong) or 'nothing'}; open: {', '.join(open_) or 'nothing'}")
    return Verdict("refuted" if wrong else "undecided" if open_ else "supported", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    norms, arms, free = _split(outcome)
    with picture(path, panels=2) as (left, right):
        for label, of in norms.items():
            left.loglog(SIGMAS, np.median(of, 0), "o-", label=label)
        left.set(xlabel="sigma_0", ylabel="norm of the policy's gradient (median)")
        left.invert_xaxis()
        for arm, rows in arms.items():
            curve(right, [f"{sigma:g}" for sigma in rows], [level(of) for of in rows.values()], label=arm)
        right.axhline(level(free).value, color="gray", linestyle="--", label=FREE)
        right.set(xlabel="sigma_0", ylabel="final return (IQM, 95 % interval)")


STUDY = Study(
    name="collapsing-prior",
    question="Does learning fail as a prior's standard deviation collapses, and what helps?",
    prediction=(
        "The gradient grows as sigma_0^-2 (log-log slope within 0.3 of -2 for KL(pi || b), alone and as P3O's pull) "
        "and does not with the reverse KL (within 0.3 of 0). Learning fails at a small sigma_0 with the prior of one "
        "network; not with an ensemble's, a Gaussian process's or the reverse KL, which all end above it there."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
    compute=gradients,
)
