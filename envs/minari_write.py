"""Writes episodes to a Minari data set, with the behavior in their infos; completely or not at all."""

from __future__ import annotations

import copy
import itertools
import os
import platform
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

import envs
from envs import minari_data
from envs.spaces import BoxAction
from ess_rl.errors import UsageError

_PART = f".recording-{platform.node()}-"  # prefix of a folder being written; then the id of the process that writes it
_AT_ONCE = 100  # episodes handed to Minari together


class Episode(NamedTuple):
    """One episode of T steps. Actions, means and standard deviations are in units of [-1, 1]."""

    obs: NDArray[Any]  # [T + 1, obs_dim], the last one is what the last step reached
    action: NDArray[Any]  # [T, act_dim] as sampled
    reward: NDArray[Any]  # [T]
    terminated: NDArray[np.bool_]  # [T]
    truncated: NDArray[np.bool_]  # [T]
    behavior_mean: NDArray[Any] | None = None  # [T, act_dim]; None: unknown
    behavior_log_std: NDArray[Any] | None = None


def spaces_of(env_id: str, **options: Any) -> tuple[spaces.Box, spaces.Box]:
    """Flat observation space and action space of a task, with `options` of Gymnasium's `make`.

    Raises:
        UsageError: Gymnasium does not have the task, or its actions have no scale (`minari_data.bounds`).
    """
    if "gymnasium" not in envs.backends_of(env_id):
        raise UsageError(f"Gymnasium does not know {env_id}, and data sets name their task as Gymnasium does")
    env = gymnasium.make(env_id, **options)
    try:
        minari_data.bounds(env_id, env.action_space)
        flat = spaces.flatten_space(env.observation_space)
        assert isinstance(flat, spaces.Box) and isinstance(env.action_space, spaces.Box)
        return flat, env.action_space
    finally:
        env.close()


def spec_of(env_id: str, **options: Any) -> EnvSpec:
    """Spec by which a set names its task, with `options` of Gymnasium's `make`; the task must have been made before.

    Raises:
        UsageError: the task was registered with something that cannot be written to a file.
    """
    spec = copy.deepcopy(gymnasium.spec(env_id.rpartition(":")[2]))  # the module of a MODULE:ID is imported by now
    if hasattr(spec.entry_point, "__qualname__"):  # a class or a function
        spec.entry_point = f"{spec.entry_point.__module__}:{spec.entry_point.__qualname__}"  # type: ignore[attr-defined]
    spec.kwargs |= {name: value for name, value in options.items() if name != "max_episode_steps"}
    spec.max_episode_steps = options.get("max_episode_steps", spec.max_episode_steps)
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{env_id} cannot be named in a data set, register it with plain values: {reason}") from None
    return spec


def check_name(dataset_id: str, *, overwrite: bool) -> None:
    """Raise UsageError if no set of this name can be written."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        raise UsageError(f"--id {dataset_id}: not a name of a data set: NAMESPACE/NAME-v0") from None
    if (minari_data.root() / dataset_id).exists() and not overwrite:
        raise UsageError(f"--id {dataset_id} exists already: choose another name or version, or --overwrite it")


def write(
    dataset_id: str,
    env_id: str,
    episodes: Iterable[Episode],
    metadata: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a new data set in Minari's own HDF5 format. -> its folder

    It is written next to the others under a hidden name and renamed at the end. What killed processes left is removed.

    Args:
        env_id: the task, whose env spec the set will carry.
        metadata: author, description, ref_min_score ... as Minari names them.
        options: of Gymnasium's `make`, if the task was made with any.

    Raises:
        UsageError: a set of that name exists, or the name is invalid, or there are no episodes.
    """
    episodes = iter(episodes)
    if (first := next(episodes, None)) is None:
        raise UsageError(f"{dataset_id}: no episodes to write")
    episodes = itertools.chain([first], episodes)
    _remove_leftovers()  # first, because it may restore a set of this name
    check_name(dataset_id, overwrite=overwrite)
    folder = minari_data.root() / dataset_id
    part = minari_data.root() / f"{_PART}{os.getpid()}"
    part.mkdir()
    try:
        _fill(part / "data", dataset_id, env_id, episodes, metadata, options or {})
        _create_namespace(dataset_id)
        if folder.exists():
            (part / "old" / dataset_id).parent.mkdir(parents=True)
            folder.rename(part / "old" / dataset_id)
        folder.mkdir(parents=True)
        (part / "data").rename(folder / "data")
    finally:
        _clear(part)
    return folder


def _fill(
    folder: Path,
    dataset_id: str,
    env_id: str,
    episodes: Iterable[Episode],
    metadata: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    obs_space, action_space = spaces_of(env_id, **options)
    to_simulator = BoxAction(env_id, action_space)

    def buffer(episode: Episode) -> EpisodeBuffer:
        infos = {}
        if episode.behavior_mean is not None and episode.behavior_log_std is not None:
            infos = {
                "behavior_mean": episode.behavior_mean,
                "behavior_log_std": episode.behavior_log_std,
                "sampled_action": episode.action,
            }
        return EpisodeBuffer(
            observations=episode.obs.astype(obs_space.dtype),  # type: ignore[arg-type] (an array is as good as a list)
            actions=to_simulator(torch.from_numpy(episode.action)),  # type: ignore[arg-type]
            rewards=episode.reward,  # type: ignore[arg-type]
            terminations=episode.terminated,  # type: ignore[arg-type]
            truncations=episode.truncated,  # type: ignore[arg-type]
            infos=infos or None,
        )

    folder.mkdir()
    storage = MinariStorage.new(folder, obs_space, action_space, spec_of(env_id, **options))
    waiting = []
    for episode in episodes:
        waiting.append(buffer(episode))
        if len(waiting) == _AT_ONCE:
            storage.update_episodes(waiting)
            waiting = []
    if waiting:
        storage.update_episodes(waiting)
    storage.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__, **metadata})


def _create_namespace(dataset_id: str) -> None:
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = dataset_id.rpartition("/")[0]
    if namespace and namespace not in list_local_namespaces():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            create_namespace(namespace)


def _remove_leftovers() -> None:
    """Remove the folders of processes that no longer exist."""
    for path in minari_data.root().glob(f"{_PART}*"):
        number = path.name.removeprefix(_PART)
        if number.isdigit() and not _is_alive(int(number)):
            _clear(path)


def _clear(part: Path) -> None:
    """Remove what a recording leaves behind; a set that it was meant to replace but did not is moved back."""
    for metadata in (part / "old").rglob("data/metadata.json"):
        old = metadata.parents[1]
        folder = minari_data.root() / old.relative_to(part / "old")
        if not (folder / "data").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (old / "data").rename(folder / "data")
    shutil.rmtree(part, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # an older process had our id
