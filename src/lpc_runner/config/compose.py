"""The command line to configurations: every cell of a sweep, composed before the first one starts."""

from __future__ import annotations

import argparse
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lpc_runner.base.errors import UserError
from lpc_runner.config.classes import name_classes
from lpc_runner.config.options import CONF_DIR, CONFIG_NAME, as_dict, dotted, options_of, unknown_key
from lpc_runner.config.sources import OwnFiles, require_own_names, variants_read
from lpc_runner.config.words import as_text, parsed, values_of

# What our launchers, and a sweeper, build on, and the extra of pyproject.toml that brings it.
_PLUGINS = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm", "optuna": "optuna"}


# ${square:x} of a YAML file; what is not a number is left as it is, for the check of its own key.
OmegaConf.register_new_resolver("square", lambda x: x * x if isinstance(x, int | float) else x, replace=True)
# ${share:n,k} of a YAML file: a k-th of the whole number n, at least 1.
OmegaConf.register_new_resolver("share", lambda n, k: max(n // k, 1) if isinstance(n, int) else n, replace=True)

NO_LAUNCHER = "none"
FLEET = "lpc_runner.runner.fleet.Fleet"  # no class of Hydra's: the command makes its runs in one job
_PLAIN = (bool, int, float, str, type(None))
# A command that chooses an option of one of these has said what the method is; else the dataset does, tuned.method.
_METHOD_WORDS = {"method", "experiment", "objective", "sampler", "preconditioning", "step_size"}

Composing = Callable[..., DictConfig]  # overrides to a configuration, Hydra's own part included


@dataclass(frozen=True)
class Composed:
    """A command: its cells, and the class of Hydra's launcher that will start them, NO_LAUNCHER for a single run."""

    cells: list[Cell]
    launcher: str
    # Hydra's sweeper, if it chooses every run by those before; `cells` is then one that it could propose.
    sweeper: str | None = None
    # With check=true: what each dataset chose besides, in words.
    chosen: tuple[str, ...] = ()
    # Of a command of one cell that says nothing of the method: the word on it that the dataset adds.
    method_word: str | None = None
    # Of a single run, or a fleet's first: what Hydra composed, its own part included, and Hydra's loader.
    single: tuple[DictConfig, Any] | None = None

    @property
    def is_sweep(self) -> bool:
        """Whether it is a sweep, be it of one cell."""
        return self.launcher != NO_LAUNCHER

    @property
    def is_fleet(self) -> bool:
        """Whether this process trains several runs together."""
        return self.launcher == FLEET


@dataclass(frozen=True)
class Cell:
    """One run to be: its resolved configuration, which option of each group it uses, its overrides."""

    cfg: DictConfig
    choices: dict[str, str]
    overrides: tuple[str, ...]


def compose_command(args: argparse.Namespace) -> Composed:
    """All cells of a command, one unless it is a sweep. Raises UserError (one line) if any does not compose."""
    folder = None if args.config_dir is None else Path(args.config_dir).absolute()
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir: {folder} is not a folder")
    try:
        with _initialised(folder):
            once = functools.cache(_compose_raw)  # a single run's first composition is its only one
            words, launcher, sweeper = _expand(args, once)
            cells, method_word = _compose_all(words, [CONF_DIR, *([folder] if folder else [])], once)
            if folder is not None:
                for cell in cells:
                    require_own_names(folder, cell.choices)
            chosen = _chosen_by_datasets(cells) if cells[0].cfg.check else ()
            single = None
            if launcher in (NO_LAUNCHER, FLEET):
                left_out = parsed(args.overrides) if launcher == FLEET else []  # of a cell's words, by _expand
                hydras = [str(override.input_line) for override in left_out if override.is_hydra_override()]
                single = once(*_with(method_word, words[0]), *hydras), _loader()
            return Composed(cells, launcher, sweeper, chosen, method_word, single)
    except OmegaConfBaseException as error:  # when a value is read
        raise UserError(f"{error.full_key}: {_first_sentence(error)}") from None


def _loader() -> Any:
    """Hydra's, which has a `repository` beside what Hydra declares."""
    return GlobalHydra.instance().config_loader()


def _chosen_by_datasets(cells: list[Cell]) -> tuple[str, ...]:
    """Of each dataset, the options and values of other groups that some of its cells have from its file alone."""
    named = {override.key_or_group for cell in cells for override in parsed(cell.overrides)}
    lines = []
    for option in dict.fromkeys(cell.choices["dataset"] for cell in cells):
        of_it = [cell for cell in cells if cell.choices["dataset"] == option]
        file = _loader().repository.load_config(f"dataset/{option}")
        groups = {item.group.strip("/"): item.value for item in file.defaults_list if item.is_override()}
        words = {key: value for key, value in groups.items() if any(cell.choices.get(key) == value for cell in of_it)}
        content = as_dict(file.config) if "dataset" in file.config else {}
        for key, value in _leaves({name: node for name, node in content.items() if name != "dataset"}):
            if any(OmegaConf.select(cell.cfg, key) == value for cell in of_it):
                words[key] = value
        if said := ", ".join(f"{key}={value}" for key, value in words.items() if key not in named):
            lines.append(f"dataset={option} also chose {said}")
    return tuple(lines)


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@contextmanager
def _initialised(own: Path | None = None) -> Iterator[None]:
    """Hydra with conf/ and behind it, as its own command line has them, a folder of a user's options."""
    base, runtime, instance = VersionBase.instance(), JobRuntime.instance(), GlobalHydra.instance()
    # The state of a Hydra application that calls this, which Hydra's own context manager restores only in part.
    before = base.version_base, runtime.get("name"), instance.hydra
    instance.clear()
    try:
        with variants_read(), initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            if own is not None:
                loader = _loader()
                places = loader.get_search_path()
                places.prepend("command-line", f"{OwnFiles.scheme()}://{own}", "schema")
                loader.repository.initialize_sources(places)
            yield
    finally:
        base.version_base, instance.hydra = before[0], before[2]
        runtime.set("name", before[1])
        GlobalHydra.set_instance(instance)


def _expand(args: argparse.Namespace, once: Composing) -> tuple[list[list[str]], str, str | None]:
    """The overrides of every cell, the product of the command line's and the experiment's sweeps; the launcher.

    Last the sweeper, if it is not Hydra's basic one: then the cell is that of every first value.
    """
    given = parsed(args.overrides)
    sweeps = [override for override in given if override.is_sweep_override()]
    fixed = [override.input_line for override in given if not override.is_sweep_override()]
    # The experiment says whether it is a sweep; a swept experiment or method counts with its first value.
    probe = [*fixed, *(f"{override.get_key_element()}={_first_value(override)}" for override in sweeps)]
    composed = once(*probe)
    hydra_cfg = composed.hydra
    if hydra_cfg.job.chdir:
        raise UserError("hydra.job.chdir=true: paths are those of the folder where the command is typed; leave it out")
    if not args.multirun and hydra_cfg.mode != RunMode.MULTIRUN:
        if sweeps:
            text = as_text(sweeps[0].get_key_element(), sweeps[0].get_value_string())
            raise UserError(f"{sweeps[0].input_line}: several values are a sweep: add -m; one text is quoted: {text}")
        return [list(args.overrides)], NO_LAUNCHER, None
    if not args.cfg and composed.get("check") is not True:
        _require_launcher(hydra_cfg.launcher)
    params = hydra_cfg.sweeper.get("params") or {}
    lines = [*(f"{key}={value}" for key, value in params.items()), *args.overrides]
    axes = [override for override in parsed(lines) if not override.is_hydra_override()]
    launcher, sweeper = hydra_cfg.launcher._target_, hydra_cfg.sweeper._target_
    if not sweeper.endswith(f".{BasicSweeper.__name__}"):
        last = {axis.get_key_element(): axis for axis in axes}  # the command line's before the experiment's
        swept = {key: f"{key}={_first_value(axis)}" for key, axis in last.items() if axis.is_sweep_override()}
        cell = [swept.get(key, str(axis.input_line)) for key, axis in last.items()]
        return [cell], launcher, hydra_cfg.runtime.choices["hydra/sweeper"]
    for sweep in (axis for axis in axes if axis.is_sweep_override()):
        values_of(sweep)
    (batch,) = BasicSweeper.split_arguments(axes, None)
    return [list(cell) for cell in batch], launcher, None


def _first_value(sweep: Override) -> str:
    """The first value of a sweep, an interval's lower end, as text. Raises UserError where there is none."""
    value = sweep.value()
    return str(value.start) if isinstance(value, IntervalSweep) else values_of(sweep)[0]


def starts_workers_here(launcher: str) -> bool:
    """Whether Hydra's launcher of that class path has runs made side by side by processes of this machine."""
    return "joblib" in launcher


def runs_in_this_process(launcher: str) -> bool:
    """Whether runs of a launcher of that class path, or without one, are made by the command's own process."""
    return launcher in (NO_LAUNCHER, FLEET) or launcher.endswith(f".{BasicLauncher.__name__}")


def _require_launcher(launcher: DictConfig) -> None:
    """Raises UserError for what a launcher would find out when everything else is ready."""
    if starts_workers_here(launcher._target_) and launcher.n_jobs == 0:
        raise UserError("hydra.launcher.n_jobs must be an integer other than 0 (-1: as many as there are cores), got 0")
    if launcher._target_.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise UserError("hydra/launcher=slurm: there is no srun here: start it where SLURM's commands are")


def _compose_all(cells: list[list[str]], folders: list[Path], once: Composing) -> tuple[list[Cell], str | None]:
    """Every cell; and of a single one, the word on its method that its dataset adds where its own say nothing of it.

    Cells that differ in plain values alone take the composition of the first of them: Hydra composes some forty files
    for each, a sixth of a second, half a minute for a sweep of 200 seeds.
    """
    known: dict[tuple[str, ...], DictConfig] = {}
    composed, word = [], None
    for overrides in cells:
        read = parsed(overrides)
        values = {o.key_or_group: o.value() for o in read if _is_plain(o, folders)}
        if len({o.key_or_group for o in read}) < len(read):  # the last of two counts, whatever it is
            values = {}
        rest = [line for line, o in zip(overrides, read) if o.key_or_group not in values]
        key = (*rest, *sorted(values))
        if key not in known:
            full = once(*overrides)
            suited = OmegaConf.select(full, "tuned.method")
            if suited is not None and not _METHOD_WORDS & {o.key_or_group for o in read}:
                word = f"method={suited}"
                full = once(*_with(word, overrides))
            known[key] = full
        full = known[key]
        cfg = OmegaConf.masked_copy(full, [str(name) for name in full if name != "hydra"])  # copies every value
        for name, value in values.items():
            OmegaConf.update(cfg, name, value, merge=True)
        composed.append(resolved(cfg, choices_of(full.hydra), overrides))
    return composed, word if len(cells) == 1 else None


def _with(word: str | None, overrides: list[str]) -> list[str]:
    return overrides if word is None else [word, *overrides]


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


def _compose_raw(*overrides: str) -> DictConfig:
    try:
        return compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=True)
    except UserError:  # a file of the user's own
        raise
    except Exception as error:  # Hydra raises errors of every kind; none of our code runs here
        raise UserError(_explain(error)) from error


def _explain(error: Exception) -> str:
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
        return unknown_key(key[1].lstrip("+").split("=")[0], list(dotted(as_dict(compose(CONFIG_NAME)))))
    return _first_sentence(error)


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def options_composed(group: str) -> dict[str, DictConfig]:
    """Every option of a group of the root by name, with what it brings along, references unresolved."""
    with _initialised():
        return {option: compose(f"{group}/{option}")[group] for option in options_of(group)}


def recompose_group(group: str, option: str) -> DictConfig:
    """The values of one group's option, on their own. Raises UserError if there is no such option."""
    with _initialised():
        return _compose_raw(f"{group}={option}")[group]
