"""Experiment configs: a file with `get_config(arm)`, overrides from the command line, to and from JSON.

`ml_collections.config_flags` reads such files too, but only through absl's global flags, and it neither names the
nearest valid key nor lets a command line turn one seed into several; what is needed here is a page of code.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

DEFAULT_ARM = "small"

# How a run is looked after, not what it computes: may be another when it goes on. `loop` says what they mean.
CARE = {"step_timeout": None, "grace_seconds": None}


def load_module(path: str | Path) -> ModuleType:
    """Executes a Python file as a module.

    Raises:
      ValueError: there is no such file, or its name does not end in `.py`.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"no Python file at {path}; a config is named like configs/family/slug.py or configs/family/slug.py:arm"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split_arm(name: str) -> tuple[str, str]:
    """`"configs/f/x.py:tiny"` -> `("configs/f/x.py", "tiny")`; without an arm it is "small"."""
    path, colon, arm = name.partition(":")
    return path, arm if colon else DEFAULT_ARM


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of `path.py[:arm]` with overrides applied; see `override` for their types.

    Raises:
      ValueError: no such file, a file without `get_config`, an unknown arm, an unknown key or a value of another type.
    """
    path, arm = split_arm(name)
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config(arm); a config file must")
    config = module.get_config(arm)
    for key, value in (overrides or {}).items():
        override(config, key, value)
    return config


def choose_arm(base: Mapping[str, Any], arm: str, arms: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """The config of an arm: `base` and `CARE` with that arm's dotted overrides. The last line of most `get_config`
    functions.

    Raises:
      ValueError: unknown arm (the choices are listed), unknown key.
    """
    if arm not in arms:
        raise ValueError(f"unknown arm {arm!r}; this config has {', '.join(arms)}")
    config = ConfigDict({**CARE, **base}).copy_and_resolve_references()  # the groups inside are shared otherwise
    for key, value in arms[arm].items():
        override(config, key, value)
    return config


def optimizer_config(learning_rate: float, **fields: Any) -> ConfigDict:
    """The fields that `make_optimizer` reads, with their defaults; `fields` replaces some of them."""
    config = ConfigDict(
        {
            "learning_rate": learning_rate,
            "schedule": "constant",  # constant, linear, cosine
            "warmup_updates": 0,
            "final_fraction": 0.0,  # of the learning rate, at the end of a decay
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,  # None: no clipping
        }
    )
    for key, value in fields.items():
        override(config, key, value)
    return config


def override(config: ConfigDict, key: str, value: Any) -> None:
    """Sets `config.a.b` for the dotted `key`, with the type that the default has.

    A string stands for the value as typed on a command line. It is read by the default's type: int (`1e3` is one),
    float, bool (true/false, yes/no, 1/0), str, tuple (`1,2` or `(1, 2)`, elements of the type of the first default
    element); a default of None takes any Python literal, else text. `None` is accepted for every key. The key `seed`
    also takes several: `0,1,2`.

    Raises:
      ValueError: unknown key (the nearest is named), a group of keys, or a value that does not have the default's type.
    """
    flat = flatten(config)
    if key not in flat:
        if any(name.startswith(f"{key}.") for name in flat):
            inside = ", ".join(name for name in flat if name.startswith(f"{key}."))
            raise ValueError(f"config.{key} is a group; set one of its keys: {inside}")
        near = difflib.get_close_matches(key, flat, n=1, cutoff=0.0)
        raise ValueError(
            f"config has no key {key!r}; the nearest is {near[0]!r}" if near else f"config has no key {key!r}"
        )
    *parents, last = key.split(".")
    group = config
    for parent in parents:
        group = group[parent]
    # The types are checked here, and a tuple of seeds in place of one seed is wanted.
    with group.unlocked(), group.ignore_type():
        group[last] = _typed(key, value, flat[key])


def _typed(key: str, value: Any, default: Any) -> Any:
    several_seeds = key.split(".")[-1] == "seed"
    if isinstance(value, str) and not (isinstance(default, str) and value != "None"):
        value = _parse(value, default, several_seeds)
    if value is None or default is None:
        return value
    if isinstance(value, list):
        value = tuple(value)
    if several_seeds and isinstance(value, tuple) and value and all(type(seed) is int for seed in value):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(default, (tuple, list)) and isinstance(value, tuple):
        return value
    if several_seeds and isinstance(default, tuple) and type(value) is int:
        return value
    if type(value) is not type(default):
        raise ValueError(
            f"config.{key} must be of type {type(default).__name__} like its default {default!r}, got {value!r}"
        )
    return value


def _parse(text: str, default: Any, several_seeds: bool) -> Any:
    text = text.strip()
    if text in ("None", "none"):
        return None
    if isinstance(default, bool):
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower(), text)
    if isinstance(default, (tuple, list)) or (several_seeds and "," in text):
        first = default[0] if isinstance(default, (tuple, list)) and default else None
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        return tuple(_parse(part.strip("'\""), first, False) for part in parts)
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value


def parse_overrides(arguments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Splits a command line into `--config.key=value` overrides and the rest.

    Raises:
      ValueError: an override without `=`.
    """
    overrides: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            raise ValueError(f"write the override as --config.{key}=value, with an equals sign")
        overrides[key] = value
    return overrides, rest


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": value}` for every leaf; an empty group is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)) and len(value):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict | Mapping[str, Any]) -> str:
    """The config as JSON text, keys sorted; tuples become lists."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.dumps(plain, indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json`: lists come back as tuples."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(tuples(inner) for inner in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key in which two configs differ, as JSON sees them (a tuple equals a list). `CARE` may."""
    absent = "(absent)"
    flat_old, flat_new = flatten(json.loads(to_json(old))), flatten(json.loads(to_json(new)))
    return [
        f"{key}: {flat_old.get(key, absent)!r} there, {flat_new.get(key, absent)!r} now"
        for key in sorted((flat_old.keys() | flat_new.keys()) - CARE.keys())
        if flat_old.get(key, absent) != flat_new.get(key, absent)
    ]
