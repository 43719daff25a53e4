"""Suites of runs, as data. `ess-rl benchmark SUITE` trains a suite's missing runs; `experiments.benchmark` says how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments import records


@dataclass(frozen=True)
class Job:
    """One run set: an agent on a task, all its seeds and settings as one program."""

    agent: str  # one of AGENTS, OFFLINE_AGENTS or the PEERS in `experiments.peers`
    env: str
    steps: int = 1_000_000  # env steps of each seed; updates on a data set
    seeds: Sequence[int] = range(10)
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of the agent's Config not at their defaults
    sweep: Mapping[str, Sequence[float]] = field(default_factory=dict)  # fields with several values
    options: Mapping[str, Any] = field(default_factory=dict)  # passed to `plan.make`: episodes, compiled, backend ...
    label: str = ""  # tells it apart from other jobs of the same agent on the same task
    dataset: str = ""  # the data set that an offline agent learns from, of that env

    @property
    def data_sets(self) -> list[str]:
        """All data sets that it learns from, or that old replay or demonstrations come from: they must be here."""
        others = [self.settings.get(name, "") for name in ("replay_from", "demonstrations")]
        return [name for name in (self.dataset, *others) if name]

    @property
    def name(self) -> str:
        """The name of its folder."""
        folder = records.default_folder(self.agent, self.dataset or self.env).name
        return f"{folder}-{self.label.replace(' ', '-')}" if self.label else folder

    @property
    def members(self) -> int:
        """Number of members in it."""
        count = len(self.seeds)
        for values in self.sweep.values():
            count *= len(values)
        return count


OTHER_CLIPS = (0.1, 0.3, 0.4)  # of PPO, in addition to its customary 0.2

# In the order in which they are run: cheap and informative ones first.
MUJOCO = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "Swimmer-v5",
    "Reacher-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Ant-v5",
    "Humanoid-v5",
)
CLASSIC = (
    "Pendulum-v1",
    "InvertedPendulum-v5",
    "MountainCarContinuous-v0",
    "ess/CartPole-v0",
    "ess/CartPoleSwingUp-v0",
    "ess/Acrobot-v0",
    "ess/TwoLinkArm-v0",
    "ess/LQR-v0",
)
# Data sets from our own runs, of four seeds of P3O per task: their env, and how they are recorded.
DATA_SETS = {
    f"ess/{name}/{level}-v0": (env, options)
    for name, env in {"halfcheetah": "HalfCheetah-v5", "hopper": "Hopper-v5", "walker2d": "Walker2d-v5"}.items()
    for level, options in {
        "medium": "--member 1 --checkpoint 300000 --steps 200000",
        "medium-replay": "--member 1 --checkpoint 100000 200000 300000 --steps 200000",
        "medium-expert": "--member 1 --checkpoint 300000 1000000 --steps 400000",
    }.items()
}
# From half-trained policies, half as large: for what should take minutes.
SMALL_SETS = {
    "ess/hopper/small-v0": ("Hopper-v5", "--member 1 --checkpoint 300000 --steps 100000"),
    "ess/halfcheetah/small-v0": ("HalfCheetah-v5", "--member 2 --checkpoint 100000 --steps 100000"),
}
# Small data sets that studies ask for: some demonstrations, and what a quick study uses in place of a real one.
DEMONSTRATIONS, RANDOM = "ess/pendulum/demonstrations-v0", "ess/pendulum/random-v0"
OFFLINE_AGENTS = ("bc", "awac", "iql", "td3_bc", "p3o_offline")


def how_to_record(dataset: str) -> str:
    """The command that records a data set; RUN is a run of a million steps on its env."""
    if dataset == RANDOM:
        return f"ess-rl dataset record --random Pendulum-v1 --id {dataset} --steps 400 --num-envs 2"
    command = f"ess-rl dataset record RUN --id {dataset}"
    known = {**DATA_SETS, **SMALL_SETS, DEMONSTRATIONS: ("Pendulum-v1", "--steps 400 --num-envs 2")}
    if dataset not in known:
        return command
    env, options = known[dataset]
    return f"{command} {options}, RUN a finished run on {env}"


# What another agent needs to learn by P3O's objective. (None of them has keep_ess to scale its learning rate down.)
BY_P3O: dict[str, Any] = {
    "objective": "p3o",
    "learning_rate": 1.5e-4,
    "final_learning_rate": 0.3,
    "value_learning_rate": 4e-4,
    "rollout": 256,
    "minibatch": 128,
}
SMALL = {"num_envs": 4, "rollout": 64, "epochs": 2, "minibatch": 64, "hidden": (8, 8)}
SMOKE: Any = {  # for jobs that take seconds: they show that something works
    "steps": 4_096,
    "seeds": range(3),
    "settings": SMALL,
    "options": {"episodes": 2, "compiled": "off", "checkpoints": 2},
}

SUITES: dict[str, tuple[Job, ...]] = {
    # Half a minute: does the whole chain work?
    "smoke": tuple(Job(agent, env, **SMOKE) for env in ("Pendulum-v1", "ess/LQR-v0") for agent in ("p3o", "ppo")),
    # Minutes per task.
    "classic": tuple(Job(agent, env, steps=300_000) for env in CLASSIC for agent in ("p3o", "ppo")),
    # P3O with one configuration against PPO with four clip ranges: 500 M env steps, 7 to 8 hours on two cores; and
    # Stable-Baselines3's PPO on the three tasks that everybody reports, an hour each. P3O's seeds are ones that nobody
    # had looked at when its configuration was fixed.
    "mujoco": tuple(
        job
        for env in MUJOCO
        for job in (
            Job("p3o", env, seeds=range(60, 70)),
            Job("ppo", env),
            Job("ppo", env, sweep={"clip": OTHER_CLIPS}, label="clips"),
            *([Job("sb3-ppo", env)] if env in MUJOCO[:3] else []),
        )
    ),
    # Five agents on nine data sets, which must have been recorded. Published tables use a million updates of networks
    # with two layers of 256 units: this is a hundredth of the updates and a thirteenth of the network, with a learning
    # rate at which critics are learned all the same, and takes an hour on two cores.
    "offline": tuple(
        Job(
            agent,
            env,
            dataset=dataset,
            steps=10_000,
            settings={"hidden": (64, 64), "learning_rate": 1e-3},
            options={"checkpoints": 4},
        )
        for dataset, (env, _) in DATA_SETS.items()
        for agent in OFFLINE_AGENTS
    ),
}
