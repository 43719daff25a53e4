"""d3rlpy's BC, AWAC, IQL and TD3+BC with the data, hyperparameters, evaluation and records of our offline agents.

They see the transitions that `ess_rl.offline` sees: observations normalized by the statistics of all the data (and
clipped, as in `normalizer.standardize`), actions clipped to [-1, 1], rewards scaled if the agent scales them. d3rlpy
stores episodes, and drops the last transition of a truncated one, because it has nowhere to keep the observation that
this transition led to: here such an episode has one more step, which holds that observation and is never drawn. Their
hyperparameters are those of the agents in `agents`: networks, Adam (including its epsilon of 1e-5), minibatches drawn
with replacement, discount, tau. A policy is scored like ours, by its mean action in episodes that begin like those of
our run with the same seed.

Remaining differences, with the option that removes one if there is any, as read in d3rlpy 2.8.1 (ours; theirs):
    all      initial weights are orthogonal, policies near 0; torch's uniform ones (`--first-weights ours`, not for
             `bc`: those of our agent with that seed, and its log_std). All gradients of an update are taken at the same
             parameters; the critics step first, and the policy sees the updated ones. The likelihood is that of the
             action as sampled (except in `iql`); as clipped
    bc       likelihood of a Gaussian with state-dependent width; squared distance to a deterministic tanh policy
    awac     weights exp(A / temperature) up to 100, or a softmax over the minibatch (`awac --weights softmax`); the
             softmax. Q is the policy's value; its value with its entropy as a bonus, at the temperature of 1 left over
             from their SAC (`--entropy-temperature 0` removes it). A mean without tanh throughout; tanh of the mean for
             likelihood and advantage, tanh of the sample for the critic's target. log_std starts at -1 and stays above
             -4; at -3, between -6 and 0
    iql      log_std starts at -1 and stays above -4; at -1.5, between -5 and 2
    td3_bc   the policy is updated at updates 2, 4, 6 ...; 1, 3, 5 ...
With all of these removed, their gradients are ours: `tests/experiments/test_d3rlpy.py`.

Each seed is a process with one thread (`experiments.peers.by_seed`). d3rlpy is installed without its requirements,
because it pins a gymnasium version other than the one our environments need: INSTALL says how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from agents import OFFLINE_AGENTS
from ess_rl import normalizer, offline
from ess_rl.child import peak_memory_mib
from ess_rl.contract import Tree
from ess_rl.errors import NonFiniteError, UsageError
from ess_rl.gaussian import Gaussian
from ess_rl.transitions import Transitions
from experiments import offline_run, records, run
from experiments.peers import by_seed
from experiments.records import Record

VERSION = "2.8.1"
INSTALL = (
    f"pip install --no-deps d3rlpy=={VERSION} && pip install colorama dataclasses-json gym scikit-learn structlog tqdm"
)


@dataclass(frozen=True)
class BCConfig:
    """Defaults are those of `agents.bc`."""

    learning_rate: float = 3e-4  # of Adam
    hidden: tuple[int, ...] = (256, 256)  # relu units
    minibatch: int = 256  # samples of one update


@dataclass(frozen=True)
class AWACConfig:
    """Defaults are those of `agents.awac`."""

    temperature: float = 1.0  # lambda of the paper, in units of the scaled reward; lower is greedier
    entropy_temperature: float = 1.0  # of the entropy that their critic adds to the value; the paper's AWAC has none: 0
    return_range: float = 0.0  # rewards are scaled so that returns of the data span this; 0 leaves them as they are
    learning_rate: float = 3e-4  # of Adam, for the policy and the critics
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics mixed into their targets at each update
    first_weights: Literal["theirs", "ours"] = "theirs"  # theirs are torch's, ours those of our agent with that seed
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and critics
    minibatch: int = 256  # samples of one update


@dataclass(frozen=True)
class IQLConfig:
    """Defaults are those of `agents.iql`."""

    expectile: float = 0.7  # of Q over the actions of the data; 0.5 is the value of the behavior policy
    inverse_temperature: float = 3.0  # beta of the paper, in units of 1 / scaled reward; higher is greedier
    return_range: float = 1000.0  # rewards are scaled so that returns of the data span this; 0 leaves them as they are
    learning_rate: float = 3e-4  # of Adam; the policy's falls to 0 as a cosine
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics mixed into their targets at each update
    first_weights: Literal["theirs", "ours"] = "theirs"  # theirs are torch's, ours those of our agent with that seed
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy, value and critics
    minibatch: int = 256  # samples of one update


@dataclass(frozen=True)
class TD3BCConfig:
    """Defaults are those of `agents.td3_bc`."""

    alpha: float = 2.5  # weight of Q relative to the squared distance to the data; 0 is cloning
    policy_noise: float = 0.2  # standard deviation of the noise on the target's action, in units of [-1, 1]
    noise_clip: float = 0.5  # bound of that noise
    policy_delay: int = 2  # updates of the critics for each one of the policy and the targets
    learning_rate: float = 3e-4  # of Adam, for the policy and the critics
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of policy and critics mixed into their targets when these move
    first_weights: Literal["theirs", "ours"] = "theirs"  # theirs are torch's, ours those of our agent with that seed
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and critics
    minibatch: int = 256  # samples of one update


def bc(d3rlpy: Any, config: BCConfig, steps: int) -> Any:
    """-> d3rlpy's config of the algorithm for `steps` updates; likewise in the functions below"""
    return d3rlpy.algos.BCConfig(
        batch_size=config.minibatch,
        learning_rate=config.learning_rate,
        optim_factory=_adam(d3rlpy),
        encoder_factory=_layers(d3rlpy, config),
    )


def awac(d3rlpy: Any, config: AWACConfig, steps: int) -> Any:
    return d3rlpy.algos.AWACConfig(**_actor_critic(d3rlpy, config), lam=config.temperature)


def iql(d3rlpy: Any, config: IQLConfig, steps: int) -> Any:
    falling = d3rlpy.optimizers.lr_schedulers.CosineAnnealingLRFactory(T_max=steps)
    return d3rlpy.algos.IQLConfig(
        **_actor_critic(d3rlpy, config) | {"actor_optim_factory": _adam(d3rlpy, lr_scheduler_factory=falling)},
        value_encoder_factory=_layers(d3rlpy, config),
        expectile=config.expectile,
        weight_temp=config.inverse_temperature,
    )


def td3_bc(d3rlpy: Any, config: TD3BCConfig, steps: int) -> Any:
    return d3rlpy.algos.TD3PlusBCConfig(
        **_actor_critic(d3rlpy, config),
        alpha=config.alpha,
        target_smoothing_sigma=config.policy_noise,
        target_smoothing_clip=config.noise_clip,
        update_actor_interval=config.policy_delay,
    )


def _actor_critic(d3rlpy: Any, config: Any) -> dict[str, Any]:
    return {
        "batch_size": config.minibatch,
        "gamma": config.discount,
        "tau": config.tau,
        "actor_learning_rate": config.learning_rate,
        "critic_learning_rate": config.learning_rate,
        "actor_optim_factory": _adam(d3rlpy),
        "critic_optim_factory": _adam(d3rlpy),
        "actor_encoder_factory": _layers(d3rlpy, config),
        "critic_encoder_factory": _layers(d3rlpy, config),
    }


def _adam(d3rlpy: Any, **more: Any) -> Any:
    return d3rlpy.optimizers.AdamFactory(eps=1e-5, **more)  # that of `ess_rl.optim`


def _layers(d3rlpy: Any, config: Any) -> Any:
    return d3rlpy.models.VectorEncoderFactory(hidden_units=list(config.hidden))


class Peer(NamedTuple):
    """One algorithm of d3rlpy."""

    description: str
    ours: str  # our corresponding agent
    config: type
    build: Callable[[Any, Any, int], Any]  # d3rlpy, config, updates -> d3rlpy's config


PEERS: dict[str, Peer] = {
    "d3rlpy-bc": Peer("d3rlpy's BC, deterministic, with bc's numbers", "bc", BCConfig, bc),
    "d3rlpy-awac": Peer("d3rlpy's AWAC, softmax weights, with awac's numbers", "awac", AWACConfig, awac),
    "d3rlpy-iql": Peer("d3rlpy's IQL with iql's numbers", "iql", IQLConfig, iql),
    "d3rlpy-td3_bc": Peer("d3rlpy's TD3+BC with td3_bc's numbers", "td3_bc", TD3BCConfig, td3_bc),
}


def library() -> Any:
    """Import d3rlpy. Raises UsageError if d3rlpy, or something that it needs, is not installed."""
    if importlib.util.find_spec("d3rlpy") is None:
        raise UsageError(f"d3rlpy is not installed: {INSTALL}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gym, which it imports, warns that gymnasium replaced it
            return importlib.import_module("d3rlpy")
    except ImportError as error:
        raise UsageError(f"d3rlpy cannot be imported ({error}): {INSTALL}") from None


def start(
    agent: str,
    dataset_id: str,
    *,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    steps: int,
    out: Path,
    episodes: int = records.EPISODES,
    eval_env: str | None = None,
    trust: bool = False,
    download: bool = False,
    backend: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Check a configuration, make its folder and write config.json. -> the folder

    A folder that holds the same run, with the same seeds or fewer, is reused, and the run resumes.

    Args:
        settings: fields of the peer's config that are not at their defaults.
        steps: gradient updates of each seed.
        episodes, eval_env, trust, download, backend: as in `offline_run.make`.

    Raises:
        UsageError: something in it cannot work, or `out` holds something else. In either case nothing is written.
    """
    config = PEERS[agent].config(**settings)
    by_seed.check("d3rlpy", config, seeds, steps=steps, episodes=episodes)
    library()
    task, _ = offline_run.task_of(dataset_id, eval_env=eval_env, trust=trust, download=download, backend=backend)
    record = {
        "format": records.FORMAT, "agent": agent, **task, "seeds": list(seeds), "sweep": {}, "steps": steps,
        "episodes": episodes, "device": "cpu", "compiled": False,
        "config": {**dataclasses.asdict(config), "hidden": list(config.hidden)}, **records.origin(),
    }  # fmt: skip
    same = ("agent", "dataset", "source", "env", "env_options", "eval_env", "backend", "steps", "episodes", "config")
    return by_seed.begin(record, out, same, overwrite=overwrite)


def carry_on(folder: Path, jobs: int | None = None, *, trust: bool = False) -> Record:
    """Train the missing seeds, `jobs` at a time (default: one per core), and write the result. -> the result

    Raises:
        UsageError: as `offline_run.carry_on`, or d3rlpy is missing.
        NonFiniteError: training diverged; finished seeds are kept.
    """
    config = records.read_config(folder)
    if not (folder / "result.json").exists():
        library()
        run.trust_spec(config, trust)
        offline_run.data_of(config, trust=trust)
    score = partial(offline_run.normalized, config["references"])
    return by_seed.train_missing(folder, jobs, partial(train_one, trust=trust), normalized_score=score)


def train_one(config: Record, seed: int, *, trust: bool = False) -> Record:
    """Train and evaluate one seed in this process."""
    torch.set_num_threads(1)
    run.trust_spec(config, trust)
    data, peer = offline_run.data_of(config, trust=trust).transitions, PEERS[config["agent"]]
    learner = Learner(peer, peer.config(**config["config"]), data, seed, config["steps"])
    began = time.perf_counter()
    for number in range(config["steps"]):
        for name, value in learner.update().items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{config['agent']}: non-finite {name} in update {number + 1:,} of seed {seed}")
    seconds = time.perf_counter() - began
    return {
        "seed": seed,
        "updates": config["steps"],
        "final_return": run.evaluate(learner, config, config["episodes"]).mean().item(),
        "training_return": None,  # no policy acted in training
        "training_seconds": seconds,
        "peak_memory_mib": peak_memory_mib(),
    }


class Learner:
    """One seed of one algorithm on a data set [N, ...]. To an evaluation it is a population of one."""

    size, device = 1, torch.device("cpu")

    def __init__(self, peer: Peer, config: Any, data: Transitions, seed: int, steps: int):
        d3rlpy = library()
        d3rlpy.seed(seed)
        self.seeds, self.seed = [seed], torch.tensor([seed])
        self.stats = offline.data_stats(data, self.device)
        self.minibatch = config.minibatch
        parts = episodes(data, self.stats, getattr(config, "return_range", 0.0))
        with contextlib.redirect_stdout(io.StringIO()):  # it logs what it finds
            self.buffer = d3rlpy.dataset.create_infinite_replay_buffer(
                [d3rlpy.dataset.Episode(**part) for part in parts]
            )
            self.algorithm = peer.build(d3rlpy, config, steps).create(device="cpu:0")
            self.algorithm.build_with_dataset(self.buffer)
        if isinstance(config, AWACConfig):
            factor = config.entropy_temperature
            log_factor = math.log(factor) if factor > 0.0 else -math.inf
            self.algorithm.impl.modules.log_temp._parameter.data.fill_(log_factor)  # no update changes it
        if getattr(config, "first_weights", "theirs") == "ours":
            begin_as_ours(self.algorithm.impl.modules, peer, config, data, seed)
        assert self.buffer.transition_count == len(data.reward)

    def update(self) -> dict[str, float]:
        """Run one update, on a minibatch drawn as d3rlpy draws them. -> its losses"""
        return self.algorithm.update(self.buffer.sample_transition_batch(self.minibatch))

    def policy(self, obs: Tensor) -> Gaussian:
        """The mean action at raw observations [1, N, obs_dim]; its log_std is not used, and 0."""
        mean = torch.from_numpy(self.algorithm.predict(normalizer.standardize(self.stats["obs"], obs[0]).numpy()))
        return Gaussian(mean[None], torch.zeros_like(mean[None]))


def begin_as_ours(modules: Any, peer: Peer, config: Any, data: Transitions, seed: int) -> None:
    """Give d3rlpy's networks, and their targets, the initial weights and log_std of our agent with that seed."""
    ours = OFFLINE_AGENTS[peer.ours]
    known = {field.name for field in dataclasses.fields(ours.config)}
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name in known}
    agent = ours.agent(ours.config(**numbers), data.obs.shape[1], data.action.shape[1])
    params = tree_map(lambda x: x[0], offline.OfflinePopulation(agent, [seed]).state["params"])
    policy = params["policy"].get("mean", params["policy"])
    pairs = [(modules.policy, policy)]
    pairs += [(modules.targ_policy, policy)] if hasattr(modules, "targ_policy") else []
    for nets in (modules.q_funcs, modules.targ_q_funcs):
        pairs += zip(nets, params["q"].values(), strict=True)
    pairs += [(modules.value_func, params["value"])] if "value" in params else []
    for module, layers in pairs:
        linears = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
        for linear, layer in zip(linears, layers.values(), strict=True):
            linear.weight.data.copy_(layer["weight"].T)  # torch stores [out, in]
            linear.bias.data.copy_(layer["bias"])
    if "log_std" in params["policy"]:  # theirs is low + (high - low) sigmoid(parameter)
        low, high = modules.policy._min_logstd, modules.policy._max_logstd
        share = (params["policy"]["log_std"] - low) / (high - low)
        modules.policy._logstd.data.copy_(torch.logit(share).reshape(modules.policy._logstd.shape))


def episodes(data: Transitions, stats: Tree, return_range: float = 0.0) -> Iterator[dict[str, Any]]:
    """Arguments of `d3rlpy.dataset.Episode` for each episode of a data set [N, ...] with these `offline.data_stats`.

    An episode of L steps that did not terminate has L + 1 here: d3rlpy makes L transitions from it.
    """
    obs, next_obs = (normalizer.standardize(stats["obs"], x) for x in (data.obs, data.next_obs))
    scale = offline.reward_scale(stats, torch.tensor(return_range))
    columns = {
        "observations": obs, "actions": data.action.clamp(-1.0, 1.0), "rewards": (scale * data.reward)[:, None]
    }  # fmt: skip
    first = 0
    for last in data.last.nonzero().flatten().tolist():
        found = {name: x[first : last + 1].numpy() for name, x in columns.items()}
        terminated = bool(data.terminated[last])
        if not terminated:
            more = {"observations": next_obs[last : last + 1].numpy(), "actions": 0.0 * found["actions"][:1]}
            more["rewards"] = 0.0 * found["rewards"][:1]
            found = {name: np.concatenate([x, more[name]]) for name, x in found.items()}
        yield {**found, "terminated": terminated}
        first = last + 1
