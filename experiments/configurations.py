"""What a config.json says: all its settings, how two of them differ, what the runs learned from, and their command.

Files of earlier versions lack some fields; they mean what those versions did. Nothing here needs torch.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from typing import Any

from ess_rl.errors import UsageError
from experiments import records
from experiments.records import Record

# Fields that runs of earlier versions lack, and what those versions did, so that they stay comparable to present runs.
_LATER: Record = {
    "final_learning_rate": 0.0,
    "value_learning_rate": None,  # the same as the learning rate
    "replay": 0,
    "replay_from": "",
    "draw": "uniform",
    "correction": "none",
    "lag": 0,
    "behavior_temperature": 1.0,
    "rollout_precision": "fp32",
    "starts": "together",
    "sync_interval": 1,
}
_HINTS: Record = {"hints": 0, "hint_lambda": 1.0}
LATER_FIELDS: dict[str, Record] = {
    "p3o": {**_LATER, **_HINTS, "keep_ess": 0.0, "pull": "ess", "ess": "minibatch"},
    "ppo": {**_LATER, **_HINTS, "objective": "clip", "target_kl": 0.01},
    **{name: {"starts": "together", "sync_interval": 1} for name in ("p4o", "dapo", "tba", "p3o_2019")},
    **{name: {"sync_interval": 1} for name in ("bpo", "chord", "tba_group", "p3o_prior")},
    "iql": {"imitates": "sampled"},
    "d3rlpy-awac": {"entropy_temperature": 1.0, "first_weights": "theirs"},
    **{name: {"first_weights": "theirs"} for name in ("d3rlpy-iql", "d3rlpy-td3_bc")},
    # SB3's own defaults, which nothing had overridden.
    "sb3-ppo": {"discount": 0.99, "lambda_": 0.95, "clip": 0.2},
}
# What makes two runs the same, apart from where and by what version they are trained.
SAME = ("agent", "env", "dataset", "source", "backend", "seeds", "sweep", "steps", "episodes", "config")


def full_settings(config: Record) -> Record:
    """The agent's Config as recorded, with fields that its version lacked filled in from `LATER_FIELDS`."""
    settings = dict(config["config"])
    if "learning_rate" in settings and "learning_rate" not in config["sweep"]:
        for name, earlier in LATER_FIELDS.get(config["agent"], {}).items():
            settings.setdefault(name, settings["learning_rate"] if name == "value_learning_rate" else earlier)
    return settings


def differing(before: Record, now: Record, names: Iterable[str] = SAME) -> str:
    """How an existing run differs from what is requested now, in words; "" if it agrees in all of `names`.

    Fields of the agent's Config that the run's version lacked count as what that version did (`full_settings`), and
    data of unknown content ("source", which acting runs of earlier versions lack) as the same.
    """
    now = _as_json(now)
    for name in names:
        if name == "source" and not (name in before and name in now):
            continue
        there, asked = {name: before.get(name)}, {name: now.get(name)}
        if name == "config":
            there, asked = full_settings(before), full_settings(now)
        keys = sorted(key for key in {**there, **asked} if there.get(key) != asked.get(key))
        if keys:
            return ", ".join(f"{key} {there.get(key)}, not {asked.get(key)}" for key in keys)
    return ""


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def made_anew(configs: Iterable[Record]) -> list[str]:
    """Names of data that are not the same in all of these runs: their scores are not for one task, or one method.

    As in `differing`, data of unknown content count as the same.
    """
    contents: dict[str, set[str]] = {}
    for config in configs:
        for name in learned_from(config) if "source" in config else ():
            contents.setdefault(name, set()).add(config["source"])
    return sorted(name for name, found in contents.items() if len(found) > 1)


def learned_from(config: Record) -> list[str]:
    """The data sets or older runs that a run learned from: in place of an env, as old replay or to imitate."""
    own = config["config"]
    return [name for name in (config.get("dataset"), own.get("replay_from"), own.get("demonstrations")) if name]


def command(config: Record) -> str | None:
    """The command line that reproduces this run, with every setting spelled out: defaults change, it does not.

    None if no command line can express the run: seeds that are not a range, or a sweep that is not a product.
    """
    seeds = list(dict.fromkeys(config["seeds"]))
    sweep = {name: list(dict.fromkeys(values)) for name, values in config["sweep"].items()}
    product = len(seeds) * math.prod(len(values) for values in sweep.values())
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))) or product != len(config["seeds"]):
        return None
    words = ["ess-rl"]
    if (several := config.get("processes", 1)) > 1:
        words = ["torchrun", "--nproc-per-node", str(several), "-m", "experiments"]
    where = ["--dataset", config["dataset"]] if config.get("dataset") else ["--env", config["env"]]
    words += ["train", config["agent"], *where]
    options: Record = {"seeds": len(seeds), "seed0": seeds[0], "steps": config["steps"], "episodes": config["episodes"]}
    if config.get("dataset"):
        options |= {"backend": config["backend"]}
        if "iterations" in config:  # a run of ours, not of a peer
            options |= {"device": config["device"], "compile": "on" if config["compiled"] else "off"}
            options |= {"checkpoints": config["checkpoints"]}
        options |= {"eval_env": config["eval_env"]} if config.get("eval_env") else {}
        options |= {"trust_env_spec": True} if config.get("env_spec") else {}
    elif "iterations" in config:  # a run of ours, not of a peer
        options |= {"backend": config["backend"], "device": config["device"]}
        options["compile"] = "on" if config["compiled"] else "off"
        # If the run does not record it: the smallest number of checkpoints with the recorded distance between them.
        fewest = math.ceil(config["iterations"] / config["reset_every"])
        options["checkpoints"] = config.get("checkpoints", fewest)
        options |= {"save_replay": config["save_replay"]} if config.get("save_replay") else {}
        options |= {"async": True} if config.get("asynchronous") else {}
        options |= {"split": config["split"]} if config.get("split", 1) > 1 else {}
    for name, value in (options | full_settings(config) | sweep).items():
        words += _option(name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    if value == "":  # a name that is not given
        return []
    flag = name.rstrip("_").replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def check(config: Record) -> None:
    """Raises UsageError if a config.json lacks what every table needs."""
    seeds, sweep = config["seeds"], config["sweep"]
    whole = isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)
    if not whole or not isinstance(config["config"], dict) or not isinstance(sweep, dict):
        raise UsageError("config.json: seeds, sweep or config is not what a run writes; the file was changed by hand")
    if any(not isinstance(values, list) or len(values) != len(seeds) for values in sweep.values()):
        raise UsageError("config.json: a swept setting does not have one value a member")
    if not isinstance(config["steps"], int) or not all(isinstance(config[x], str) for x in ("agent", "env", "backend")):
        raise UsageError("config.json: steps, agent, env or backend is not what a run writes")


def check_result(config: Record, result: Any) -> None:
    """Raises UsageError if a result.json is incomplete, or does not belong to this config.json."""
    if not isinstance(result, dict):
        raise UsageError("result.json: not the result of a run")
    for name in ("agent", "env", "backend", "seeds", "sweep", "dataset"):
        if result.get(name) != config.get(name):
            raise UsageError(f"result.json: its {name!r} is not that of config.json: files of two runs were mixed")
    finals = result.get("final_return")
    if not isinstance(finals, list) or len(finals) != len(config["seeds"]):
        raise UsageError("result.json: 'final_return' does not have one score a member")
    for seed, score in zip(config["seeds"], finals, strict=True):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise UsageError(f"result.json: the final return of seed {seed} is {score!r}, not a finite number")
    if not isinstance(records.steps_of(result), int):
        raise UsageError(f"result.json: {records.steps_name(config)!r} is missing")
