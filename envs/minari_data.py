"""Minari data sets as `Transitions`: flattened once to memory-mapped files and checked in the process.

data = minari_data.load("mujoco/hopper/medium-v0")
data.transitions.obs  # [N, obs_dim], in the order of the episodes

The cache is hidden among Minari's own data sets (MINARI_DATASETS_PATH). Its name contains a hash of the set's files, so
a set that changed is flattened again. Three entries of `infos`, which `minari_write` records, describe the behavior, in
units of [-1, 1]: "behavior_mean", "behavior_log_std" and "sampled_action", the action before it was clipped. If they
are missing, a fitted model (`ess_rl.behavior`) supplies the first two.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from envs import minari_env
from envs import spaces as action_spaces
from ess_rl import behavior
from ess_rl.errors import UsageError
from ess_rl.transitions import Transitions

CACHE = ".ess-rl"  # next to the namespaces; hidden, so Minari does not look into it
_VERSION = 3  # of the files in the cache
_INFOS = ("behavior_mean", "behavior_log_std", "sampled_action")  # in units of [-1, 1]


@dataclass(frozen=True)
class DataSet:
    """A data set as memory-mapped tensors."""

    id: str
    metadata: dict[str, Any]  # as Minari stores it, spaces and specs as JSON
    source: str  # hash of the files it was flattened from
    transitions: Transitions  # [N, ...]; version is -1
    starts: torch.Tensor  # [episodes] int64, of the episodes as recorded
    action_range: tuple[tuple[float, float], ...]  # of each action, in the simulator's units; scaled to [-1, 1] here
    obs_names: tuple[str, ...]  # of the obs_dim components of an observation
    recorded_behavior: bool  # if False, the behavior is that of a fitted model, or NaN if none was to be fitted
    cut: int  # episodes whose last step had no end flag; it counts as truncated

    @property
    def references(self) -> tuple[float, float] | None:
        """ref_min_score and ref_max_score; None if they define no normalized score."""
        return references_of(self.metadata)


@dataclass(frozen=True)
class Demonstrations:
    """Observations and actions of a data set, as memory-mapped tensors."""

    metadata: dict[str, Any]  # as Minari stores it
    obs_names: tuple[str, ...]  # of the obs_dim components of an observation
    obs: torch.Tensor  # [M, obs_dim]
    action: torch.Tensor  # [M, act_dim], as sampled, if the set recorded it
    action_range: tuple[tuple[float, float], ...]  # of each action, in the simulator's units; scaled to [-1, 1] here


def root() -> Path:
    """Folder in which Minari keeps data sets: MINARI_DATASETS_PATH, or its default in the home folder."""
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path()


def local() -> dict[str, dict[str, Any]]:
    """Metadata of the local data sets.

    Raises:
        UsageError: a folder there that looks like one has another kind of name.
    """
    import minari

    try:
        return minari.list_local_datasets()
    except (ValueError, TypeError):  # of a name, which the error does not always tell
        for place in sorted(root().glob("**/data")):
            parts = place.parent.relative_to(root()).parts
            hidden = any(part.startswith(".") for part in parts)  # Minari does not look into those
            if not hidden and not _is_name("/".join(parts)):
                raise UsageError(
                    f"{place.parent} is not named as a data set, NAME-v0: rename it, or move it away"
                ) from None
        raise


def _is_name(dataset_id: str) -> bool:
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        return False
    return True


def folder_of(dataset_id: str) -> Path:
    """The folder of a data set's files.

    Raises:
        UsageError: the name is invalid, or there is no such local set.
    """
    if not _is_name(dataset_id):
        raise UsageError(f"{dataset_id!r} is not a name of a data set: NAMESPACE/NAME-v0")
    folder = root() / dataset_id / "data"
    if not (folder / "metadata.json").exists():
        remedy = f"one of Minari's server comes with 'ess-rl train AGENT --dataset {dataset_id} --download'"
        if dataset_id.startswith("ess/"):  # the names that our pages and suites give to sets of our own runs
            remedy = f"'ess-rl dataset record RUN --id {dataset_id}' records it (experiments/OFFLINE.md)"
        raise UsageError(f"no data set {dataset_id!r} in {root()} (there: {', '.join(local()) or 'none'}): {remedy}")
    return folder


def metadata_of(dataset_id: str) -> dict[str, Any]:
    """Metadata of a local data set, as Minari stores it.

    Raises:
        UsageError: there is no such local set, or its metadata.json is damaged.
    """
    place = folder_of(dataset_id) / "metadata.json"
    try:
        found = json.loads(place.read_text())
    except ValueError as error:
        raise UsageError(f"{dataset_id} cannot be read: its metadata.json is damaged ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{dataset_id} cannot be read: its metadata.json is damaged (it holds no names)")
    return found


def references_of(metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """ref_min_score and ref_max_score; None if one is missing or not a finite number, or both are equal."""
    try:
        low, high = float(metadata["ref_min_score"]), float(metadata["ref_max_score"])
    except (KeyError, TypeError, ValueError):
        return None
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low != high else None


def check_order(
    dataset_id: str, obs_names: Sequence[str], env_id: str, options: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Raise UsageError if a task has the parts of its observations in another order than a data set of it.

    A set has the keys of a dictionary in alphabetical order, because Gymnasium reads its space back so; a task may not.
    `say` is called with a warning if the task does not name the parts.
    """
    import envs

    if not any("/" in name for name in obs_names) or "gymnasium" not in envs.backends_of(env_id):
        return
    env = gymnasium.make(env_id, **options)
    try:
        here = tuple(_names(env_id, env.observation_space, ""))
    finally:
        env.close()
    if sorted(here) == sorted(obs_names) and here != tuple(obs_names):
        raise UsageError(
            f"{dataset_id} has its observations in the order {_keys(obs_names)}, {env_id} in the order {_keys(here)}: "
            "declare the keys of its observation space in alphabetical order"
        )
    if sorted(here) != sorted(obs_names):
        say(
            f"warning: {dataset_id} has the observations {_keys(obs_names)}; {env_id} does not name its own: they are "
            "taken to be in the same, alphabetical, order"
        )


def _keys(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.partition("/")[0] for name in names))


def download(dataset_id: str) -> None:
    """Download a set through Minari, if it is not local yet.

    Raises:
        UsageError: no internet, no such set, or a package that the download needs is missing.
    """
    import minari

    if (root() / dataset_id / "data" / "metadata.json").exists():
        return
    try:
        minari.download_dataset(dataset_id)
    except Exception as error:  # each kind of server and of network failure has its own errors
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{dataset_id} cannot be downloaded, is there internet? ({type(error).__name__}: {reason})"
        ) from None


def load(
    dataset_id: str,
    *,
    trust: bool = False,
    fit: behavior.Config | None = None,
    needs_behavior: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> DataSet:
    """Load a local data set as tensors on the CPU; from the second time on, within seconds.

    Args:
        trust: let Minari make the environment of a set that did not record its spaces, whatever code that imports.
        fit: how a behavior model is fitted if the set did not record the behavior.
        needs_behavior: if False, no model is fitted: a behavior that was not recorded is NaN.
        say: called with a message before anything slow.

    Raises:
        UsageError: the set is not local, its action space is not a bounded Box, its observations cannot be flattened,
            an episode is empty, or a number is not finite (with its place).
    """
    metadata, source, place, info, columns = _cached(dataset_id, trust, say)
    names = ("behavior_mean", "behavior_log_std")
    if not info["recorded_behavior"] and needs_behavior:
        model = _fitted(place, columns, fit or behavior.Config(), say)
        columns |= {name: _map(model / f"{name}.npy") for name in names}
    elif not info["recorded_behavior"]:
        columns |= {name: torch.full((1, 1), math.nan).expand_as(columns["action"]) for name in names}
    starts = columns.pop("starts")
    version = torch.full((1,), -1, dtype=torch.int64).expand(len(columns["reward"]))
    return DataSet(
        id=dataset_id, metadata=metadata, source=source, transitions=Transitions(**columns, version=version),
        starts=starts, action_range=_ranges(info),
        obs_names=tuple(info["obs_names"]), recorded_behavior=info["recorded_behavior"],
        cut=info["cut"],
    )  # fmt: skip


def demonstrations(dataset_id: str, *, say: Callable[[str], None] = lambda text: None) -> Demonstrations:
    """Load only the observations and actions of a local data set; no behavior model is fitted. Raises as `load`."""
    metadata, _, _, info, columns = _cached(dataset_id, False, say)
    names = tuple(info["obs_names"])
    return Demonstrations(metadata, names, columns["obs"], columns["action"], _ranges(info))


def _ranges(info: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    return tuple((low, high) for low, high in info["action_range"])


def _cached(
    dataset_id: str, trust: bool, say: Callable[[str], None]
) -> tuple[dict[str, Any], str, Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Flatten a local data set if it is not cached. -> (metadata, hash, folder in the cache, info there, columns)"""
    folder, metadata = folder_of(dataset_id), metadata_of(dataset_id)
    source = _hash(folder)
    place = root() / CACHE / f"{quote(dataset_id, safe='')}-{source}"  # no two sets share a name
    if not (place / "info.json").exists():
        say(f"flattening {dataset_id} ...")
        recorded_spaces = "observation_space" in metadata and "action_space" in metadata
        if not (recorded_spaces or trust or minari_env.is_safe(metadata)):  # Minari would make the environment
            raise UsageError(
                f"{dataset_id} recorded no spaces, and its env spec names code that is not registered: "
                f"`ess-rl dataset show {dataset_id} --trust-env-spec` has it imported, once"
            )
        _write(place, *_flatten(dataset_id, folder))
        _forget(place)
    info = json.loads((place / "info.json").read_text())
    columns = {name: _map(place / f"{name}.npy") for name in info["columns"]}
    return metadata, source, place, info, columns


def source_of(dataset_id: str) -> str:
    """Hash of the contents of a local data set. Raises UsageError if the set is not local."""
    return _hash(folder_of(dataset_id))


def _hash(folder: Path) -> str:
    """Hash of all its files, read once per process unless a size or time changes: a run asks two or three times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _hash_of(tuple((path, (status := path.stat()).st_size, status.st_mtime_ns) for path in files))


@functools.cache
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    found = hashlib.blake2b(f"{_VERSION}".encode(), digest_size=8)
    for path, _, _ in files:
        with open(path, "rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha1").digest())  # a gigabyte per second
    return found.hexdigest()


def _map(path: Path) -> torch.Tensor:
    return torch.from_numpy(
        np.load(path, mmap_mode="c")
    )  # "c": torch expects writable memory, but the file never changes


def _write(place: Path, columns: dict[str, NDArray[Any]], info: dict[str, Any]) -> None:
    """Write by renaming the whole folder, so that it is either complete or absent."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=place.parent))
    try:
        for name, column in columns.items():
            np.save(part / f"{name}.npy", column)
        (part / "info.json").write_text(json.dumps(info))
        try:
            part.rename(place)
        except OSError:  # another process was faster
            if not (place / "info.json").exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _forget(place: Path) -> None:
    """Remove cached versions of this set with other contents, and what killed processes left behind."""
    name, day = place.name.rpartition("-")[0], 86_400.0  # seconds
    older = [path for path in place.parent.glob(f"{name}-{'[0-9a-f]' * 16}") if path != place]
    left = [path for path in place.parent.glob(".part-*") if time.time() - path.stat().st_mtime > day]
    for path in [*older, *left]:
        shutil.rmtree(path, ignore_errors=True)


def _fitted(place: Path, columns: dict[str, torch.Tensor], config: behavior.Config, say: Callable[[str], None]) -> Path:
    """Return the folder with the behavior given by a model with these settings, which is fitted if not cached."""
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
    folder = place / f"behavior-{hashlib.blake2b(settings, digest_size=8).hexdigest()}"
    if not (folder / "info.json").exists():
        say(f"the set does not say what acted: fitting a model, {config.max_updates:,} updates at most, once ...")
        obs, action = columns["obs"].clone(), columns["action"].clone()
        try:
            model = behavior.fit(obs, action, columns["terminated"] | columns["truncated"], config=config)
        except ValueError as error:
            raise UsageError(
                f"the behavior policy was not recorded, and no model of it can be fitted: {error}"
            ) from None
        b = [model(part) for part in obs.split(100_000)]
        arrays = {
            "behavior_mean": torch.cat([x.mean for x in b]).numpy(),
            "behavior_log_std": torch.cat([x.log_std for x in b]).numpy(),
        }
        floored = np.average([behavior.floored(model, x) for x in obs.split(100_000)], weights=[
            len(x) for x in obs.split(100_000)
        ])  # fmt: skip
        nll = model.held_out_nll[0].item()
        _write(folder, arrays, {"nll": nll, "floored": float(floored)})
        say(f"  its nll on held-out episodes is {nll:.3f} nats; its std is at the floor in {floored:.1%} of the states")
    return folder


def _flatten(dataset_id: str, folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read every episode. -> (columns [N, ...], the rest of what the cache holds)"""
    import minari

    try:
        data = minari.MinariDataset(folder)
        episodes = data.iterate_episodes()
        obs_space, action_space = data.observation_space, data.action_space
    except Exception as error:  # a damaged file, or one from another version of Minari or Gymnasium
        raise UsageError(f"{dataset_id} cannot be read ({type(error).__name__}: {_one_line(error)})") from None
    low, high = bounds(dataset_id, action_space)
    names = tuple(_names(dataset_id, obs_space, ""))
    half_range, center = 0.5 * (high - low), 0.5 * (high + low)
    parts: dict[str, list[NDArray[Any]]] = {}
    starts, cut, recorded = [0], 0, True
    try:
        for number, episode in enumerate(episodes):
            steps = len(episode.rewards)
            if steps == 0:
                raise UsageError(f"{dataset_id}: episode {number} has no step: remove it from the set")
            obs = _flat(obs_space, episode.observations)
            if len(obs) != steps + 1:
                raise UsageError(f"{dataset_id}: episode {number} has {steps} steps and {len(obs)} observations")
            action: NDArray[Any] = (np.asarray(episode.actions, np.float32).reshape(steps, -1) - center) / half_range
            found: dict[str, NDArray[Any]] = {
                "obs": obs[:-1], "action": action, "reward": np.asarray(episode.rewards, np.float32).reshape(steps),
                "terminated": np.asarray(episode.terminations, bool).reshape(steps), "next_obs": obs[1:],
            }  # fmt: skip
            ended = np.array(episode.truncations, bool).reshape(steps)
            if not (ended[-1] or found["terminated"][-1]):
                ended[-1], cut = True, cut + 1
            found["truncated"] = ended
            acted = _behavior(episode.infos or {}, action)
            recorded = recorded and acted is not None
            _check_finite(dataset_id, number, found | (acted or {}))
            for name, x in (found | (acted or {})).items():
                parts.setdefault(name, []).append(x)
            starts.append(starts[-1] + steps)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{dataset_id} cannot be read ({type(error).__name__}: {_one_line(error)})") from None
    if len(starts) == 1:
        raise UsageError(f"{dataset_id} has no episodes")
    acted = {name: parts.pop(name, []) for name in _INFOS}  # useless if only some episodes have them
    if recorded:
        parts |= acted | {"action": acted["sampled_action"]}
        del parts["sampled_action"]
    columns = {name: np.concatenate(x) for name, x in parts.items()} | {"starts": np.array(starts[:-1])}
    info = {"columns": list(columns), "obs_names": names, "recorded_behavior": recorded, "cut": cut}
    info["action_range"] = np.stack([low, high], axis=1).tolist()
    return columns, info


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def bounds(name: str, space: spaces.Space) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bounds [act_dim] of an action space, as `envs.spaces.bounds`, between which each action has a width to scale.

    Raises:
        UsageError: it is not such a space.
    """
    low, high = (x.ravel() for x in action_spaces.bounds(name, space))
    if not (low < high).all():
        raise UsageError(f"{name} has the action space {space}, whose bounds do not give a scale of [-1, 1]")
    return low, high


def _names(dataset_id: str, space: spaces.Space, prefix: str) -> list[str]:
    """Name each component of a flattened observation, in Gymnasium's own order."""
    if isinstance(space, spaces.Dict):
        return [name for key, part in space.spaces.items() for name in _names(dataset_id, part, f"{prefix}{key}/")]
    if isinstance(space, spaces.Tuple):
        return [name for i, part in enumerate(space.spaces) for name in _names(dataset_id, part, f"{prefix}{i}/")]
    if isinstance(space, spaces.Discrete):
        return [f"{prefix}is {space.start + i}" for i in range(int(space.n))]
    if isinstance(space, spaces.Box | spaces.MultiBinary) and not (space.dtype == np.uint8 and len(space.shape) > 1):
        return [f"{prefix}{i}" for i in range(int(np.prod(space.shape)))]
    raise UsageError(
        f"{dataset_id} has observations of {space}: numbers, and dictionaries or tuples of them, can be flattened; "
        "pictures and texts cannot"
    )


def _flat(space: spaces.Space, value: Any) -> NDArray[np.float32]:
    """Flatten the observations of an episode to [rows, obs_dim], in the order of `_names`."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([_flat(part, value[key]) for key, part in space.spaces.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([_flat(part, x) for part, x in zip(space.spaces, value, strict=True)], axis=1)
    x = np.asarray(value)
    if isinstance(space, spaces.Discrete):
        return (x.reshape(-1, 1) == space.start + np.arange(space.n)).astype(np.float32)
    return x.reshape(len(x), -1).astype(np.float32)


def _behavior(infos: dict[str, Any], action: NDArray[np.float32]) -> dict[str, NDArray[np.float32]] | None:
    """Return the behavior and the action as sampled, if an episode with actions [T, act_dim] recorded them.

    An action at its bounds may have been sampled beyond them, and the density at the bound is not that of the sampled
    action: so an episode without `sampled_action` has recorded the behavior only if no action is at its bounds.
    """
    if (np.abs(action) < 1.0).all():
        infos = {"sampled_action": action, **infos}
    found = {}
    for name in _INFOS:
        if name not in infos:
            return None
        x = np.asarray(infos[name], np.float32)
        # Minari's DataCollector has one more entry, of the reset, before the others.
        found[name] = x.reshape(len(x), -1)[-len(action) :]
        if found[name].shape != action.shape:
            return None
    return found


def _check_finite(dataset_id: str, episode: int, columns: dict[str, NDArray[Any]]) -> None:
    for name, x in columns.items():
        if not np.isfinite(x).all():
            step = int(np.argwhere(~np.isfinite(x))[0][0])
            raise UsageError(
                f"{dataset_id}: {name} is not a finite number in episode {episode}, step {step}: "
                "remove that episode from the set"
            )
