"""What only a GPU can show, in one call: that it computes what the CPU does, that nothing waits for it, and its speed.

Each part runs in its own process and its result is written as soon as it is known, so a part that fails or a machine
that goes away loses nothing else. `--device cpu` runs most parts, at a small scale; its figures mean nothing, but
nearly all of the script has then been run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from pathlib import Path
from typing import Any, Literal

import envs
from ess_rl.errors import UsageError
from experiments import records
from experiments.records import Record
from experiments.speed import gpu_checks, subjects, throughput

# FP32 operations and bytes per second of known cards, without tensor cores (NVIDIA's data sheets).
CARDS = {"H200": (67e12, 4.8e12), "H100": (67e12, 3.35e12), "A100": (19.5e12, 2.0e12)}
# P, and environments of each member: always 65,536 of Pendulum-v1 in total.
PENDULUM = {1: 65_536, 8: 8_192, 64: 1_024, 512: 128}


def measure(
    out: Path = Path("runs/gpu.json"),
    device: Literal["cuda", "cpu"] = "cuda",
    seconds: float = 10.0,
    only: tuple[str, ...] = (),
) -> Record:
    """Check and time everything on a GPU, and write one JSON file.

    Args:
        out: the JSON file; parts in it that passed are not repeated. It must be from this commit, device, --seconds and
            library versions; if the commit is unknown, or files differ from it, all of its parts must be repeated.
        device: cpu runs most parts, at a small scale, to test them.
        seconds: how long each rate is measured.
        only: names of the parts to run; default: all.
    """
    from experiments import plan

    plan.device_of(device)
    if not 0 < seconds < math.inf:
        raise UsageError(f"--seconds {seconds:g}: must be a number above 0")
    records.check_file(out)
    parts = _parts(device, seconds)
    unknown = [name for name in only if name not in parts]
    if unknown:
        raise UsageError(f"--only {' '.join(unknown)}: the parts are {', '.join(map(repr, parts))}")
    record: Record = {"device": _device(device), "seconds": seconds, **records.origin(), "parts": {}}
    if out.exists():
        older = records.read_json(out)
        for name in ("device", "seconds", "git_commit", "versions"):
            if older.get(name) != record[name]:
                raise UsageError(f"{out} is of another {name}, {older.get(name)}: move it away, or choose --out")
        kept = {name: part for name, part in older["parts"].items() if only and name not in only}
        if record["git_commit"] and not record["git_commit"].endswith("+changes"):
            kept |= {name: part for name, part in older["parts"].items() if part.get("passed") is True}
        elif kept:
            raise UsageError(
                f"{out} holds parts that --only leaves as they are ({', '.join(kept)}), and the code may have changed "
                "since: move it away, or choose --out"
            )
        record["parts"] = kept
        print(f"{out}: {len(kept)} parts are kept")
    for name, (function, *arguments) in parts.items():
        if name in record["parts"] or (only and name not in only):
            continue
        began = time.perf_counter()
        try:
            found = subjects.apart(function, *arguments)
        except Exception as error:  # the other parts are still worth having; the command fails at its end
            found = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        record["parts"][name] = {**found, "took_seconds": time.perf_counter() - began}
        records.write_file(out, record)
        print(f"{name:28} {_line(found)}", flush=True)
    failed = [name for name, part in record["parts"].items() if "error" in part or part.get("passed") is False]
    if failed:
        raise UsageError(f"{len(failed)} of {len(record['parts'])} parts failed, see {out}: {', '.join(failed)}")
    return record


def _parts(device: str, seconds: float) -> dict[str, tuple[Any, ...]]:
    """name -> (function, *arguments), in order of importance."""
    small = device == "cpu"
    parts: dict[str, tuple[Any, ...]] = {
        "environments": (gpu_checks.environments, device),
        "recorded is eager": (gpu_checks.recorded_is_eager, device),
        "the CPU's learning": (gpu_checks.as_on_the_cpu, device),
        "the CPU's learning, offline": (gpu_checks.as_on_the_cpu_offline, device),
        "nothing waits": (gpu_checks.nothing_waits, device),
        "memory": (gpu_checks.memory, device, 30 if small else 1000),
    }
    for members, num_envs in PENDULUM.items():
        if small and members > 8:
            continue
        num_envs = 32 if small else num_envs
        shape = {"num_envs": num_envs, "rollout": 16, "epochs": 4, "minibatch": num_envs * 16 // 4}
        parts[f"Pendulum-v1, P = {members}"] = (training, "Pendulum-v1", members, shape, seconds, device, "torch")
    for name, function, members in (("learner of HalfCheetah", learner, 512), ("offline AWAC", offline_learner, 10)):
        members = 2 if small else members
        parts[f"{name}, P = {members}"] = (function, members, seconds, device)
    if importlib.util.find_spec("mujoco_warp") is not None and not small:
        parts["mujoco_warp is MuJoCo"] = (gpu_checks.warp_is_mujoco, device)
        shape = {"num_envs": 8_192, "rollout": 16, "epochs": 4, "minibatch": 32_768}
        for env_id in ("HalfCheetah-v5", "Ant-v5"):
            parts[f"{env_id} on mujoco_warp"] = (training, env_id, 1, shape, seconds, device, "warp")
    if importlib.util.find_spec("envpool") is not None:
        shape = {"num_envs": 16, "rollout": 128, "epochs": 10, "minibatch": 64}
        for where in dict.fromkeys((device, "cpu")):
            name = f"HalfCheetah-v5 in EnvPool, learner on {where}"
            parts[name] = (training, "HalfCheetah-v5", 2 if small else 64, shape, seconds, where, "envpool")
    return parts


def training(env_id: str, members: int, shape: Record, seconds: float, device: str, backend: str) -> Record:
    """Measure P3O's whole training, with the floor set by the card's arithmetic and memory."""
    found = throughput.ours(env_id, "p3o", members, shape, seconds, device, True, backend)
    probe = envs.make(env_id, 1, backend=backend)
    found |= floor(probe.obs_dim, probe.act_dim, shape["epochs"], _card(device))
    probe.close()
    stages = sum(found["profile"].values())  # of wall time, from a recording's first kernel to the end of its last
    return {"members": members, **shape, **found, "share_of_the_stages": stages, "passed": True}


def learner(members: int, seconds: float, device: str) -> Record:
    """Measure updates only, of HalfCheetah's sizes on noise: all members on `device`, on the CPU as many as pay off."""
    import torch

    from agents import AGENTS
    from ess_rl.population import Population
    from ess_rl.transitions import Transitions

    config = AGENTS["p3o"].config(num_envs=16, rollout=128, epochs=10, minibatch=64)
    found: dict[str, float] = {}
    for where, count in ((device, members), ("cpu", min(members, 16))):
        agent = AGENTS["p3o"].agent(config, 17, 6)
        population = Population(agent, range(count), device=where, compiled=True)
        shape = (config.rollout, count, config.num_envs)
        rollout = Transitions.empty(shape, 17, 6, torch.device(where))
        rollout = dataclasses.replace(
            rollout, obs=torch.randn_like(rollout.obs), action=torch.randn_like(rollout.action),
            reward=torch.randn_like(rollout.reward),
        )  # fmt: skip
        found[where] = throughput.learner_alone(population, rollout, seconds)
    return {"env_steps_per_second": found, "ratio": found[device] / found["cpu"], "passed": True}


def offline_learner(members: int, seconds: float, device: str) -> Record:
    """Measure AWAC's updates, of HalfCheetah's sizes on a million transitions of noise, all members together."""
    from agents import OFFLINE_AGENTS
    from ess_rl import offline
    from ess_rl.offline import OfflinePopulation

    entry, data, found = OFFLINE_AGENTS["awac"], gpu_checks.noise(1_000_000, 17, 6), {}
    for where in dict.fromkeys((device, "cpu")):
        population = OfflinePopulation(entry.agent(entry.config(), 17, 6), range(members), device=where, compiled=True)
        population.describe(data)
        columns, done = offline.samples(data, where), 0

        def learn(population: Any = population, columns: Any = columns) -> int:
            nonlocal done
            population.updates(columns, done, 320, 10**9)
            done += 320
            return 320 * members

        learn()
        found[where] = subjects.per_second(learn, seconds, where)
    return {"updates_per_second": found, "ratio": found[device] / found["cpu"], "passed": True}


def floor(obs_dim: int, act_dim: int, epochs: int, card: tuple[float, float] | None) -> Record:
    """Operations and bytes of one env step of training, and the most env steps per second that the card could do.

    Two networks of 64 and 64 units, a multiply and an add for each weight. Forward: once to act (the policy), three
    times for the targets (the policy, the value here and next), twice to see how far the policy moved; forward and
    backward, three times the work of forward, in every epoch. Bytes: activations of both networks, written in forward
    and read in backward, and the record of a step, written once and read once per epoch; parameters, caches and fusion
    by compilers are left out.
    """
    policy = 2 * (obs_dim * 64 + 64 * 64 + 64 * act_dim)
    value = 2 * (obs_dim * 64 + 64 * 64 + 64)
    operations = policy + (policy + 2 * value) + 2 * policy + epochs * 3 * (policy + value)
    step = 4 * (2 * obs_dim + 3 * act_dim + 3)
    moved = step * (2 + epochs) + epochs * 2 * 2 * 2 * 4 * 64
    found: Record = {"flop_per_env_step": operations, "bytes_per_env_step": moved}
    if card is not None:
        found["floor_steps_per_second"] = {"arithmetic": card[0] / operations, "memory": card[1] / moved}
    return found


def _card(device: str) -> tuple[float, float] | None:
    name = _device(device)
    return next((rates for card, rates in CARDS.items() if card in name), None)


def _device(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _line(found: Record) -> str:
    """One-line summary of a part, for the terminal."""
    if "error" in found:
        return f"FAILED  {found['error'].splitlines()[0][:120]}"
    if "steps_per_second" in found:
        rate, share = found["steps_per_second"], found["share_of_the_stages"]
        return f"{rate:,.0f} env steps/s, {share:.0%} of the time in collection, targets and updates"
    if "ratio" in found:
        return f"{found['ratio']:.1f} times the CPU's"
    return "passed" if found["passed"] else f"FAILED  {found}"
