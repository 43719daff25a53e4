"""The agents, one readable file each."""

from typing import Any, NamedTuple

from agents import p3o, ppo


class Entry(NamedTuple):
    """An agent's class and its Config, called as agent(config, obs_dim, act_dim)."""

    agent: Any
    config: Any
    description: str


AGENTS: dict[str, Entry] = {
    "p3o": Entry(
        p3o.P3O, p3o.Config, "the batch's effective sample size caps the ratio and sets the pull to the behavior"
    ),
    "ppo": Entry(ppo.PPO, ppo.Config, "clips the ratio at a fixed range: the field's usual on-policy baseline"),
}
