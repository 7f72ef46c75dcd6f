"""The command line to configurations: every cell of a sweep, composed before the first one starts."""

from __future__ import annotations

import argparse
import copy
import difflib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lpc_runner.config.classes import name_classes
from lpc_runner.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel carries conf/ inside the package, a checkout has it beside src/.
CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parents[1] / "conf") if path.is_dir())
CONFIG_NAME = "config"
# What our launchers, and a sweeper, build on, and the extra of pyproject.toml that brings it.
_PLUGINS = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm", "optuna": "optuna"}


# ${square:x} of a YAML file; what is no number is left to whoever checks x.
OmegaConf.register_new_resolver("square", lambda x: x * x if isinstance(x, int | float) else x, replace=True)

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Composed:
    """A command: its cells, and the class of Hydra's launcher that will start them."""

    cells: list[Cell]
    launcher: str
    # Hydra's sweeper, if it chooses every run by those before; `cells` is then one that it could propose.
    sweeper: str | None = None


@dataclass(frozen=True)
class Cell:
    """One run to be: its resolved configuration, which option of each group it uses, its overrides."""

    cfg: DictConfig
    choices: dict[str, str]
    overrides: tuple[str, ...]


class _Word(str):
    """A word of the command line, to be told from an equal one by identity."""


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's own command line, flags in any place, and the same words with overrides before flags.

    Raises UserError (one line) for an unknown flag.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists what there is)")

    parser = get_args_parser()
    parser.error = refuse
    words = [_Word(word) for word in argv]
    args = parser.parse_intermixed_args(words)
    overrides = {id(word) for word in args.overrides}  # a flag may have taken an equal word for its value
    args.overrides = [str(word) for word in args.overrides]
    return args, [*args.overrides, *(str(word) for word in words if id(word) not in overrides)]


def compose_command(args: argparse.Namespace) -> Composed:
    """All cells of a command, one unless it is a sweep. Raises UserError (one line) if any does not compose."""
    extra = []
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir: {folder} is not a folder")
        extra = [f"hydra.searchpath=['file://{folder}']"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"), _naming_the_key():
        cells, launcher, sweeper = _expand(args, extra)
        composed = _compose_all(cells, extra, [CONF_DIR, *([folder] if extra else [])])
        return Composed(composed, launcher, sweeper)


@contextmanager
def _naming_the_key() -> Iterator[None]:
    """What OmegaConf says of a value, when it is read, as one line with the key."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_sentence(error)}") from None


def _expand(args: argparse.Namespace, extra: list[str]) -> tuple[list[list[str]], str, str | None]:
    """The overrides of every cell, the product of the command line's and the experiment's sweeps; the launcher.

    Last the sweeper, if it is not Hydra's basic one: then the cell is that of every first value.
    """
    parsed = _parsed(args.overrides)
    sweeps = [override for override in parsed if override.is_sweep_override()]
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    # The experiment says whether it is a sweep; a swept experiment or method counts with its first value.
    first = {override.get_key_element(): _first_value(override) for override in sweeps}
    if empty := [key for key, value in first.items() if value is None]:
        raise UserError(f"{empty[0]}: the sweep names no value")
    probe = [*fixed, *(f"{key}={value}" for key, value in first.items())]
    composed = _compose_raw(probe, extra)
    hydra_cfg = composed.hydra
    if not args.multirun and hydra_cfg.mode != RunMode.MULTIRUN:
        if sweeps:
            raise UserError(f"{sweeps[0].input_line}: several values are a sweep: add -m")
        return [list(args.overrides)], "none", None
    if not args.cfg and composed.get("check") is not True:
        _require_launcher(hydra_cfg.launcher)
    params = hydra_cfg.sweeper.get("params") or {}
    lines = [*(f"{key}={value}" for key, value in params.items()), *args.overrides]
    parsed = [o for o in _parsed(lines) if not o.is_hydra_override()]
    launcher, sweeper = hydra_cfg.launcher._target_, hydra_cfg.sweeper._target_
    if not sweeper.endswith(f".{BasicSweeper.__name__}"):
        last = {o.get_key_element(): o for o in parsed}  # the command line's before the experiment's
        swept = {key: f"{key}={_first_value(o)}" for key, o in last.items() if o.is_sweep_override()}
        return (
            [[swept.get(key, o.input_line) for key, o in last.items()]],
            launcher,
            hydra_cfg.runtime.choices["hydra/sweeper"],
        )
    if intervals := [o.input_line for o in parsed if isinstance(o.value(), IntervalSweep)]:
        raise UserError(f"{intervals[0]}: only a sweeper that searches chooses from an interval: hydra/sweeper=...")
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    return [list(cell) for cell in batch], launcher, None


def _first_value(sweep: Override) -> str | None:
    """The first value of a sweep, an interval's lower end, as text; None where there is none."""
    value = sweep.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(iter(sweep.sweep_string_iterator()), None)


def starts_workers_here(launcher: str) -> bool:
    """Whether Hydra's launcher of that class path has runs made side by side by processes of this machine."""
    return "joblib" in launcher


def _require_launcher(launcher: DictConfig) -> None:
    """Raises UserError for what a launcher would find out when everything else is ready."""
    if starts_workers_here(launcher._target_) and launcher.n_jobs == 0:
        raise UserError("hydra.launcher.n_jobs must be an integer other than 0 (-1: as many as there are cores), got 0")
    if launcher._target_.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise UserError("hydra/launcher=slurm: there is no srun here: start it where SLURM's commands are")


def _compose_all(cells: list[list[str]], extra: list[str], folders: list[Path]) -> list[Cell]:
    """Every cell; those that differ in plain values alone take the composition of the first of them.

    Hydra composes some forty files for each cell, a sixth of a second: half a minute for a sweep of 200 seeds.
    """
    known: dict[tuple[str, ...], tuple[DictConfig, dict[str, str]]] = {}
    composed = []
    for overrides in cells:
        parsed = _parsed(overrides)
        values = {o.key_or_group: o.value() for o in parsed if _is_plain(o, folders)}
        if len({o.key_or_group for o in parsed}) < len(parsed):  # the last of two counts, whatever it is
            values = {}
        rest = [line for line, o in zip(overrides, parsed) if o.key_or_group not in values]
        key = (*rest, *sorted(values))
        if key not in known:
            full = _compose_raw(overrides, extra)
            cfg = OmegaConf.masked_copy(full, [name for name in full if name != "hydra"])
            known[key] = cfg, choices_of(full.hydra)
        cfg, choices = copy.deepcopy(known[key][0]), dict(known[key][1])
        for name, value in values.items():
            OmegaConf.update(cfg, name, value, merge=True)
        composed.append(resolved(cfg, choices, overrides))
    return composed


def _parsed(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        if word := re.fullmatch(r"Error parsing override '(.*)'", _first_sentence(error)):
            raise UserError(f"{word[1]}: not of the form key=value") from None
        kind, _, line = _first_sentence(error).partition(": ")
        if kind != "LexerNoViableAltException":
            raise UserError(_first_sentence(error)) from None
        remedy = "no shell expands this ~: $HOME is your folder" if "=~" in line else "quote it twice: 'key=\"value\"'"
        raise UserError(f"{line}: a character that Hydra does not read; {remedy}") from None


def _is_plain(override: Override, folders: list[Path]) -> bool:
    """Whether it gives one key one number, word or null, no reference, and chooses no option of a group."""
    key = override.key_or_group
    if override.type != OverrideType.CHANGE or override.package is not None or override.is_sweep_override():
        return False
    is_group = "/" in key or any((folder / key).is_dir() for folder in folders)
    if is_group or override.is_hydra_override():
        return False
    return isinstance(override.value(), _PLAIN) and "${" not in str(override.value())


def resolved(cfg: DictConfig, choices: dict[str, str], overrides: list[str]) -> Cell:
    """The cell of a composed configuration. Raises UserError for a value that is missing."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} has no value: give one with {missing[0]}=...")
    OmegaConf.resolve(cfg)
    name_classes(cfg)
    return Cell(cfg, choices, tuple(overrides))


def choices_of(hydra_cfg: DictConfig) -> dict[str, str]:
    """Which option of each of our groups a composed configuration uses."""
    return {group: option for group, option in hydra_cfg.runtime.choices.items() if "hydra" not in group}


def _compose_raw(overrides: list[str], extra: list[str]) -> DictConfig:
    try:
        return compose(CONFIG_NAME, overrides=[*extra, *overrides], return_hydra_config=True)
    except Exception as error:  # Hydra lets errors of every kind through; none of our code runs here
        raise UserError(_explain(error, extra)) from error


def _explain(error: Exception, extra: list[str]) -> str:
    """One line for what Hydra says in up to thirteen."""
    text = str(error)
    if plugin := re.search(
        r"Could not (?:find|load) 'hydra/(launcher|sweeper)/(joblib|submitit_slurm|submitit_local|optuna)'", text
    ):
        extra_of = _PLUGINS[plugin[2]]
        return f"hydra/{plugin[1]}={extra_of}: its plugin is not installed: pip install 'lpc-runner[{extra_of}]'"
    if option := re.search(r"Could not find '(.+)'\n\nAvailable options in '(.+)':\n((?:\t.+\n?)+)", text):
        group, options = option[2], ", ".join(option[3].split())
        return f"{group}={option[1].removeprefix(group + '/')}: no such option; there are: {options}"
    if key := re.search(r"Could not (?:override|append to config).*?'([^']+)'", text):
        return unknown_key(key[1].lstrip("+").split("=")[0], known_keys(extra))
    if group := re.search(r"Could not override '(.+?)'\.\s*No match in the defaults list", text):
        return unknown_key(group[1], known_keys(extra))
    return _first_sentence(error)


def known_keys(extra: list[str] | None = None) -> list[str]:
    """Every key of the configuration as it stands without overrides, in dotted form."""
    cfg = compose(CONFIG_NAME, overrides=extra or [])
    return list(dotted(OmegaConf.to_container(cfg)))


def dotted(node: dict, prefix: str = "") -> Iterator[str]:
    """Keys of a nested mapping as a.b.c, inner ones after their parents."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a key that does not exist: the options that have it, else the nearest that does exist, if any."""
    group, _, name = key.rpartition(".")
    if owners := [
        option for option in options_of(group) if re.search(rf"^{re.escape(name)}:", _text(group, option), re.M)
    ]:
        return f"unknown key {key}: a key of {group}={', '.join(owners)}"
    known = [name for name in known if name != key and not name.startswith("tuned") and "_target_" not in name]
    tail = key.rpartition(".")[2].replace("_", "")
    # The same word spelt otherwise, in whichever group, is meant more often than another word of the same group.
    same = [name for name in known if name.rpartition(".")[2].replace("_", "") == tail]
    near = (same or difflib.get_close_matches(key, known, n=1, cutoff=0.6))[:1]
    if near and f"{near[0]}.value" in known:
        near = [f"{near[0]}.value"]
    return f"unknown key {key}" + (f"; the nearest known one is {near[0]}" if near else "")


def options_of(group: str) -> list[str]:
    """The options of a group, `model` or `model.likelihood`; none for what is no group."""
    folder = CONF_DIR / group.replace(".", "/")
    return sorted(path.stem for path in folder.glob("*.yaml")) if group else []


def _text(group: str, option: str) -> str:
    return (CONF_DIR / group.replace(".", "/") / f"{option}.yaml").read_text(encoding="utf-8")


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def recompose_group(group: str, option: str) -> DictConfig:
    """The values of one group's option, on their own. Raises UserError if there is no such option."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return _compose_raw([f"{group}={option}"], [])[group]
