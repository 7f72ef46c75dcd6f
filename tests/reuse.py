"""What the tests of one process make once: parsed YAML and words, Hydra's composition of conf/'s files, the digits.

Each is a function of what it is given alone, and every caller gets a copy of its own. What Hydra does after that, it
does for each command: it sets the values of the command's words and checks them.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import yaml
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from lpc_runner.config.options import CONF_DIR
from lpc_runner.data import digits

Key = tuple[Any, ...] | None


def once(function: Callable, key: Callable[..., Key]) -> Callable:
    """`function`, which is called once for every key of its arguments; without a key (None) it is called."""
    made = {}

    @functools.wraps(function)
    def call(*args, **kwargs):
        known = key(*args, **kwargs)
        if known is None:
            return function(*args, **kwargs)
        if known not in made:
            made[known] = pickle.dumps(function(*args, **kwargs))
        return pickle.loads(made[known])

    return call


def text_of(stream, Loader) -> Key:
    if isinstance(stream, str | bytes):
        return Loader.__name__, stream
    text = stream.read()
    stream.seek(0)
    return Loader.__name__, text


def places(repo) -> Key:
    """Where Hydra looks, None where a user's folder is among them; the plugins that are registered."""
    found = [(source.scheme(), source.provider, source.path) for source in repo.get_sources()]
    if any(provider not in ("hydra", "main", "schema") for _, provider, _ in found):
        return None
    if any(provider == "main" and path != str(CONF_DIR) for _, provider, path in found):
        return None
    plugins = ConfigStore.instance().repo["hydra"]
    return (*found, *((group, *plugins[group]) for group in ("launcher", "sweeper")))


def file(repo, config_path) -> Key:
    where = places(repo)
    return None if where is None else (*where, config_path)


def tree(repo, config_name, overrides, prepend_hydra, skip_missing) -> Key:
    """What decides which files are read: the options that words choose, add and take away."""
    where = places(repo)
    if where is None:
        return None
    chosen = (overrides.override_choices, overrides.append_group_defaults, overrides.deletions)
    return (*where, config_name, repr(chosen), prepend_hydra, skip_missing)


def defaults_once(function: Callable) -> Callable:
    """`function` notes in `overrides` what it used of them, so that these notes are kept with its answer."""

    def noted(repo, config_name, overrides, **flags):
        answer = function(repo, config_name, overrides, **flags)
        return answer, {name: value for name, value in vars(overrides).items() if name != "config_overrides"}

    kept = once(noted, tree)

    @functools.wraps(function)
    def call(repo, config_name, overrides, **flags):
        answer, notes = kept(repo, config_name, overrides, **flags)
        vars(overrides).update(notes)
        return answer

    return call


def where_referred(function: Callable) -> Callable:
    """The options chosen so far, a copy of which Hydra makes for each of forty files, for those that refer to one."""

    @functools.wraps(function)
    def call(overrides, defaults_list, self_added):
        referred = any(default.is_interpolation() for default in defaults_list)
        return function(overrides, defaults_list, self_added) if referred else None

    return call


def files(self, defaults, repo) -> Key:
    where = places(repo)
    return None if where is None else (*where, repr(defaults))


MADE_ONCE = (
    (yaml, "load", functools.partial(once, key=text_of)),
    (ConfigRepository, "load_config", functools.partial(once, key=file)),
    (OverridesParser, "parse_rule", functools.partial(once, key=lambda self, s, rule_name: (s, rule_name))),
    (defaults_list, "_create_defaults_list", defaults_once),
    (defaults_list, "_create_interpolation_map", where_referred),
    (ConfigLoaderImpl, "_compose_config_from_defaults_list", functools.partial(once, key=files)),
    (digits, "enlarge", functools.partial(once, key=lambda images: (images.shape, images.tobytes()))),
)
for owner, name, kept in MADE_ONCE:
    setattr(owner, name, kept(getattr(owner, name)))
