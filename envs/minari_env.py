"""The task that a Minari data set was recorded in, and whether its env spec may be trusted.

An env spec is text in the data set, and names the Python entry point that makes the environment: whoever wrote the set
chooses what is imported. So a spec only selects a registered task, unless the user trusts it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
from typing import Any, NamedTuple

from ess_rl.errors import UsageError

# Packages whose registered environments may be imported without asking.
_KNOWN = ("gymnasium.", "gymnasium_robotics.", "envs.")
_TRUSTED = "trusted"  # the namespace of specs that the user trusts


class Task(NamedTuple):
    """Arguments for `envs.make`."""

    env_id: str
    options: dict[str, Any]  # those in which the spec differs from what is registered under its id
    spec: str | None = None  # the text of a spec that is not registered but was trusted


def task_of(metadata: dict[str, Any], *, trust: bool = False) -> Task | None:
    """The task to evaluate in, from a data set's metadata; None if it names none.

    Raises:
        UsageError: its spec names code that is not registered by Gymnasium, Gymnasium-Robotics or this project.
    """
    name, text = metadata.get("dataset_id", "the data set"), spec_text(metadata)
    if text is None:
        return None
    try:
        spec = json.loads(text)
        env_id, entry_point, kwargs = spec["id"], spec["entry_point"], dict(spec["kwargs"])
        wrappers = list(spec["additional_wrappers"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{name}: its env spec cannot be read: name a task with --eval-env") from None
    known = _registered(env_id)
    if known is None or wrappers:
        what = f"the wrapper {wrappers[0]['entry_point']!r}" if wrappers else f"the entry point {entry_point!r}"
        if not trust:
            raise UsageError(
                f"{name}: its env spec {env_id!r} names {what}, which neither Gymnasium, Gymnasium-Robotics nor this "
                "project registers: name a task with --eval-env, or have that code imported with --trust-env-spec"
            )
        return Task(register_trusted(text), {}, text)
    return Task(env_id, _other(kwargs, known) | _other_limit(spec, known))


def is_of(metadata: dict[str, Any], env_id: str, options: dict[str, Any]) -> bool:
    """Return whether a data set, and with it its references, is of this task with these options, as far as it says."""
    text = spec_text(metadata)
    own = id_in(text)
    if own is None:
        return True
    if env_id == _trusted_id(own):
        return True
    known, spec = _registered(own), json.loads(text or "{}")
    if spec.get("additional_wrappers"):  # which may change rewards, and are made only with the set's own spec
        return False
    there = {} if known is None else _other(dict(spec.get("kwargs", {})), known) | _other_limit(spec, known)
    return env_id.rpartition(":")[2] == own and options == there


def _other(kwargs: dict[str, Any], known: Any) -> dict[str, Any]:
    """Arguments of an env spec that differ from what is registered. How it was rendered is not part of a task."""
    return {
        key: value
        for key, value in kwargs.items()
        if key != "render_mode" and (key not in known.kwargs or known.kwargs[key] != value)
    }


def _other_limit(spec: dict[str, Any], known: Any) -> dict[str, int]:
    """The time limit of an env spec, if it differs from what is registered; -1 tells Gymnasium that there is none."""
    limit = spec.get("max_episode_steps")
    return {} if limit == known.max_episode_steps else {"max_episode_steps": -1 if limit is None else limit}


def spec_text(metadata: dict[str, Any]) -> str | None:
    """The env spec as JSON: that of evaluation if there is one, else that of collection."""
    return metadata.get("eval_env_spec") or metadata.get("env_spec")


def register_trusted(text: str) -> str:
    """Register a spec with Gymnasium; its code is imported when the environment is made. -> its id here"""
    from gymnasium import registry
    from gymnasium.envs.registration import EnvSpec

    spec = copy.deepcopy(EnvSpec.from_json(text))
    spec.id = _trusted_id(spec.id)
    registry[spec.id] = spec
    return spec.id


def _trusted_id(env_id: str) -> str:
    return f"{_TRUSTED}/{re.sub(r'[^A-Za-z0-9_-]', '-', env_id)}"


def is_safe(metadata: dict[str, Any]) -> bool:
    """Return whether making the env spec, as Minari does if a set recorded no spaces, runs only registered code."""
    for text in (metadata.get("env_spec"), metadata.get("eval_env_spec")):
        if text is None:
            continue
        try:
            spec = json.loads(text)
            env_id, entry_point, wrappers = spec["id"], spec["entry_point"], spec["additional_wrappers"]
        except (ValueError, KeyError, TypeError):
            return False
        known = _registered(env_id)
        if known is None or known.entry_point != entry_point or wrappers:
            return False
    return True


def _registered(env_id: str) -> Any:
    """The spec registered under this id by a known package; None if there is none."""
    import gymnasium

    if ":" in env_id:  # Gymnasium would import the module named before it
        return None
    if env_id.startswith("ess/"):
        importlib.import_module("envs.gymnasium_export")
    if env_id not in gymnasium.registry and importlib.util.find_spec("gymnasium_robotics") is not None:
        gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    spec = gymnasium.registry.get(env_id)
    return spec if spec is not None and str(spec.entry_point).startswith(_KNOWN) else None


def options_in(text: str | None) -> dict[str, Any]:
    """Options with which an env spec differs from the task registered under its id, except its time limit."""
    try:
        spec = json.loads(text) if text else {}
        known = _registered(spec["id"])
        return _other(dict(spec["kwargs"]), known) if known is not None else {}
    except (ValueError, KeyError, TypeError):
        return {}


def id_in(text: str | None) -> str | None:
    """The id that an env spec gives itself."""
    try:
        return json.loads(text)["id"] if text else None
    except (ValueError, KeyError, TypeError):
        return None
