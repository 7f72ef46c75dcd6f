"""The options of every group as conf/ has them, and the keys that each gives values."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel carries conf/ inside the package, a checkout has it beside src/.
CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parents[1] / "conf") if path.is_dir())
CONFIG_NAME = "config"
# Groups whose options set the keys of others and have none of their own.
OF_SEVERAL = ("experiment", "method")


def options_of(group: str) -> list[str]:
    """The options of a group, `model` or `model.likelihood`; none for what is no group."""
    return sorted(path.stem for path in _folder(group).glob("*.yaml")) if group else []


def groups() -> list[str]:
    """The groups of the configuration's root."""
    return sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())


def root_keys() -> list[str]:
    """What may stand at the root of a configuration."""
    return [*groups(), *_content(CONF_DIR / f"{CONFIG_NAME}.yaml")]


def keys_of(group: str, option: str) -> set[str]:
    """The keys that an option gives values, with those of the options that it builds on."""
    content = _content(_folder(group) / f"{option}.yaml")
    bases = [base for base in content.get("defaults", []) if isinstance(base, str) and base != "_self_"]
    own = content.get(group, content)  # below its group's name in a file of the package _global_
    return set(own).union(*(keys_of(group, base) for base in bases)) - {"defaults"}


def as_dict(cfg: Any, resolve: bool = False) -> dict[str, Any]:
    """A configuration as dictionaries and lists, its references resolved if asked; its keys are text."""
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=resolve))


def dotted(node: dict, prefix: str = "") -> Iterator[str]:
    """Keys of a nested mapping as a.b.c, inner ones after their parents."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def unknown_key(key: str, known: Collection[str]) -> str:
    """The message for a key that does not exist: the options that have it, else the nearest that does exist, if any."""
    group, _, name = key.rpartition(".")
    if having := owners(group, name):
        return f"unknown key {key}: a key of {group}={', '.join(having)}"
    known = [name for name in known if name != key and not name.startswith("tuned") and "_target_" not in name]
    # The same word spelt differently in any group is likelier to be meant than another word of the same group.
    same = [other for other in known if _plain(other.rpartition(".")[2]) == _plain(name)]
    if not same and (elsewhere := [group for group in groups() if owners(group, name)]):
        group = elsewhere[0]
        return f"unknown key {key}; {group}.{name} is a key of {group}={', '.join(owners(group, name))}"
    near = (same or difflib.get_close_matches(key, known, n=1, cutoff=0.6))[:1]
    if near and f"{near[0]}.value" in known:
        near = [f"{near[0]}.value"]
    return f"unknown key {key}" + (f"; the nearest known one is {near[0]}" if near else "")


def _plain(name: str) -> str:
    return name.replace("_", "")


def owners(group: str, name: str) -> list[str]:
    """The options of a group that have a key of this name."""
    if group.split("/", maxsplit=1)[0].split(".", maxsplit=1)[0] in (*OF_SEVERAL, "hydra"):
        return []
    return [option for option in options_of(group) if name in keys_of(group, option)]


def _folder(group: str) -> Path:
    return CONF_DIR / group.replace(".", "/")


@functools.cache
def _content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
