"""The agents, one readable file each."""

from typing import Any, NamedTuple

from agents import (
    awac,
    awr,
    bc,
    bpo,
    brac,
    chord,
    dapo,
    iql,
    p3o,
    p3o_2019,
    p3o_offline,
    p3o_prior,
    p4o,
    ppo,
    tba,
    tba_group,
    td3_bc,
)


class Entry(NamedTuple):
    """An agent's class and its Config, called as agent(config, obs_dim, act_dim)."""

    agent: Any
    config: Any
    description: str


# Agents that act and learn from the outcome: `ess_rl.contract.Agent`.
AGENTS: dict[str, Entry] = {
    "p3o": Entry(
        p3o.P3O, p3o.Config, "the batch's effective sample size caps the ratio and sets the pull to the behavior"
    ),
    "p3o_2019": Entry(
        p3o_2019.P3O2019,
        p3o_2019.Config,
        "A2C alternating with replayed updates, which the ESS caps and pulls to the behavior",
    ),
    "ppo": Entry(ppo.PPO, ppo.Config, "clips the ratio at a fixed range: the field's usual on-policy baseline"),
    "bpo": Entry(bpo.BPO, bpo.Config, "draws the ratio to an end of its range: up above the median action, else down"),
    "p4o": Entry(p4o.P4O, p4o.Config, "P3O with two anchors: the behavior and a recent policy, each with its ESS"),
    "dapo": Entry(
        dapo.DAPO, dapo.Config, "penalizes an action by the divergence from the behavior over the steps that follow"
    ),
    "tba": Entry(tba.TBA, tba.Config, "balances segments of trajectories against a reference policy, with no ratio"),
    "tba_group": Entry(
        tba_group.TBAGroup, tba_group.Config, "balances whole episodes that begin in the same state against each other"
    ),
    "chord": Entry(chord.CHORD, chord.Config, "ppo or p3o, plus imitation of a data set (--dataset ID)"),
    "p3o_prior": Entry(
        p3o_prior.P3OPrior, p3o_prior.Config, "p3o, plus a KL to a prior fitted to demonstrations (--dataset ID)"
    ),
}

# Methods of the family that are options of one of them: what follows `ess-rl train`.
VARIANTS: dict[str, str] = {
    "p3o --keep-ess 0": "P3O as in its paper: the ESS does not limit the learning rate",
    "p3o_2019 --details shared": "the objective of 2019 with PPO's Adam and standardized advantages",
    "ppo --objective decoupled": "clips around the iteration's first policy instead of the behavior",
    "ppo --objective generalized": "GePPO's clip, around the ratio of a recent policy",
    "ppo --objective band": "CISPO: the ratio as a weight, cut to a fixed band",
    "ppo --objective kl": "PPO's penalty on the KL, its weight adapted to a target",
    "ppo --objective variance": "a penalty on the ratio's variance, after R2VPO",
    "dapo --objective p3o": "P3O-DA: 1 - ESS in place of DAPO's coefficient",
    "ppo --hints G": "HINT, for p3o too: groups of G environments that fail begin again from a hint",
}

# Agents that learn only from a data set: `ess_rl.contract.OfflineAgent`.
OFFLINE_AGENTS: dict[str, Entry] = {
    "bc": Entry(bc.BC, bc.Config, "clones the actions of a data set"),
    "awr": Entry(awr.AWR, awr.Config, "imitates a data set's actions, weighted by exp(return - value)"),
    "awac": Entry(awac.AWAC, awac.Config, "imitates a data set's actions, weighted by exp(advantage)"),
    "iql": Entry(iql.IQL, iql.Config, "as awac, with a critic that never evaluates actions outside the data"),
    "td3_bc": Entry(
        td3_bc.TD3BC, td3_bc.Config, "a deterministic policy climbs its critic, with a squared pull to the data"
    ),
    "brac": Entry(brac.BRAC, brac.Config, "climbs its critics, with a KL penalty to the behavior in value and policy"),
    "p3o_offline": Entry(
        p3o_offline.P3OOffline,
        p3o_offline.Config,
        "P3O starting from the behavior: the batch says how far to leave the data",
    ),
}
