"""A study: the runs of a folder, which of them are repetitions of one another, and the label of each such group."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.base.presentation import SYMBOLS
from lpc_runner.store.runs import CHANGES_NO_RESULT, FIRST_VALUES, follow
from lpc_runner.study.runs import Run, read_runs

GROUPS = ("dataset", "model", "sampler", "objective", "preconditioning")
STEP = ("step_size", "preconditioning", "beta")  # tuned together
CHAIN = (*STEP, "step_size_schedule", "num_steps", "theta_states")
ORDER = ("model", "preconditioning", "step_size", "beta", "num_steps", "learning_rate", "num_epochs")
METHODS = ("VAE", "VEM", "IWAE", "PC", "LPC prior", "LPC forward", "LPC reverse", "LPC jeffreys", "LPC persistent")
# Parts of config.yaml in which repetitions may differ.
_FREE = ("seed", *CHANGES_NO_RESULT)
_FREE_PATHS = ("trainer.checkpoint_seconds", "trainer.log_every", "metrics.weights", "metrics.batch_size")
_FREE_PATHS += ("dataset.data_dir", "hydra")


@dataclass
class Group:
    """Runs that differ only in seed; label: method and what sets it apart from the others of its dataset."""

    method: str
    dataset: str
    properties: dict[str, Any]
    runs: list[Run]
    label: str = ""
    repeated: list[Run] = field(default_factory=list)

    @property
    def finished(self) -> list[Run]:
        """Runs that reached their end."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def counted(self) -> list[Run]:
        """The runs whose numbers are averaged: the finished ones, else the diverged ones."""
        return self.finished or [run for run in self.runs if run.status == "diverged"]

    @property
    def diverged(self) -> bool:
        """No run finished, so that the numbers are those of last finite states."""
        return bool(self.counted) and self.counted[0].status == "diverged"

    @property
    def followed(self) -> list[Run]:
        """The runs whose curves and chains are shown: the averaged ones, or what is under way where none is done."""
        return self.counted or self.runs

    def values(self, name: str, setting: tuple[Any, ...] | None = None) -> dict[Any, float]:
        """One number of the averaged runs that have it, by seed; setting None: one that no setting enters."""
        measured = {run.seed: run.values(setting) for run in self.counted}
        return {seed: values[name] for seed, values in measured.items() if name in values}

    def finite(self, name: str, setting: tuple[Any, ...] | None = None) -> dict[Any, float]:
        """`values` without those that are not finite."""
        return {seed: value for seed, value in self.values(name, setting).items() if math.isfinite(value)}

    @property
    def outcome(self) -> str:
        """How many seeds diverged, as in: 2 of 3 diverged; empty where none did."""
        number = sum(run.status == "diverged" for run in self.runs)
        return f"{number} of {len(self.runs)} diverged" if number else ""

    @property
    def marked_label(self) -> str:
        """The label, and how many seeds diverged: their numbers are not in the mean of those that finished."""
        if self.diverged:
            return f"{self.label}\N{NO-BREAK SPACE}†"
        return f"{self.label} ({self.outcome})" if self.outcome else self.label


def equal_but(varied: Collection[str], groups: Sequence[Group]) -> list[list[Group]]:
    """Families of groups that agree in all other settings than the varied ones."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        rest = sorted((key, repr(value)) for key, value in group.properties.items() if key not in varied)
        families.setdefault(repr(rest), []).append(group)
    return list(families.values())


def method_of(sampler: str, objective: str, start: str | None = None) -> str:
    """The name of a method: VAE, PC (no noise), LPC with its objective; other samplers by their own names.

    start: where chains start, None for the sampler's default.
    """
    if sampler == "none":
        return {"reverse": "VAE", "iwae": "IWAE", "variational_em": "VEM"}.get(objective, f"no chain {objective}")
    if sampler == "map":
        return "PC" if objective == "prior" else f"PC {objective}"
    name = f"{'LPC' if sampler == 'langevin' else sampler} {objective}"
    if start == "persistent":
        return name.replace(" prior", "") + " persistent"
    return name if start is None else f"{name}, start={start}"


def group_runs(runs: Sequence[Run], warnings: list[str]) -> list[Group]:
    """Groups in reading order, labelled; of runs with equal seed and settings only one is counted."""
    by_settings: dict[str, list[tuple[dict[str, Any], Run]]] = {}
    for run in runs:
        properties = _properties(run)
        by_settings.setdefault(repr(sorted(properties.items(), key=str)), []).append((properties, run))
    groups: list[Group] = []
    for members in by_settings.values():
        groups += _split(members, warnings)
    _label(groups)
    groups.sort(key=lambda group: (group.dataset, [*METHODS, group.method].index(group.method), _natural(group.label)))
    return groups


def _properties(run: Run) -> dict[str, Any]:
    """Settings that apply to this run, without its seed: a VAE has no step size, for example."""
    properties = {name: run.choices[name] for name in GROUPS if run.choices.get(name) is not None}
    if run.choices.get("step_size") is not None:
        properties["step_size_schedule"] = run.choices["step_size"]
    properties |= {key: value for key, value in run.keys.items() if key != "seed"}
    if properties.get("sampler") == "none":
        properties = {key: value for key, value in properties.items() if key not in CHAIN}
    if properties.get("preconditioning") == "none":
        properties.pop("beta", None)
    return properties


def _split(members: list[tuple[dict[str, Any], Run]], warnings: list[str]) -> list[Group]:
    """Groups of runs with these properties, apart where config.yaml differs in anything but the seed."""
    members = sorted(members, key=lambda member: (member[1].status != "finished", member[1].name))
    configs = [compared_config(run) for _, run in members]
    known = [config for config in configs if config]
    paths = sorted({path for config in known for path in config})
    differing = [path for path in paths if len({repr(config.get(path)) for config in known}) > 1]
    groups: dict[str, Group] = {}
    for (properties, run), config in zip(members, configs):
        extra = {path: config.get(path, FIRST_VALUES.get(path)) for path in differing}
        sampler, objective, dataset = (str(properties.get(key, "?")) for key in ("sampler", "objective", "dataset"))
        method = method_of(sampler, objective, properties.get("start"))
        group = groups.setdefault(repr(extra), Group(method, dataset, properties | extra, []))
        if any(run.seed == other.seed for other in group.runs):
            group.repeated.append(run)
            warnings.append(f"{run.name}: its settings and seed are those of another run, not counted again")
        else:
            group.runs.append(run)
    for group in groups.values():
        group.runs.sort(key=lambda run: _natural(run.seed))
    return list(groups.values())


def compared_config(run: Run) -> dict[str, Any]:
    """The settings of config.yaml in which repetitions of one another agree, by path."""
    config = {}
    for path, value in run.config.items():
        free = path.split(".")[0] in _FREE or path.startswith(_FREE_PATHS)
        if not free and not (path in FIRST_VALUES and value == FIRST_VALUES[path]):
            config[path] = value
    if isinstance(config.get("trainer.init_from"), str):  # of seed 3 from seed 3: a repetition all the same
        name = Path(config["trainer.init_from"]).name
        config["trainer.init_from"] = re.sub(r"-s\d+-[0-9a-f]{10}$", "", name)
    return config


def _label(groups: list[Group]) -> None:
    for dataset in {group.dataset for group in groups}:
        members = [group for group in groups if group.dataset == dataset]
        named = [key for key in _keys(members) if _differs(members, key)]
        taken: dict[str, int] = {}
        for group in members:
            words = [_word(key, group.properties[key]) for key in named if key in group.properties]
            label = ", ".join([group.method, *words])
            taken[label] = taken.get(label, 0) + 1
            group.label = label if taken[label] == 1 else f"{label} ({taken[label]})"


def common_settings(groups: Sequence[Group]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that all these groups share, and those that are equal in all that have them, by key."""
    everywhere, somewhere = {}, {}
    for key in _keys(groups):
        values = [group.properties[key] for group in groups if key in group.properties]
        if not _differs(groups, key):
            (everywhere if len(values) == len(groups) else somewhere)[key] = values[0]
    return everywhere, somewhere


def _keys(groups: Sequence[Group]) -> list[str]:
    """Settings in the order in which a label names them; sampler and objective make the method's name."""
    present = dict.fromkeys(key for group in groups for key in group.properties)
    rest = [key for key in present if key not in (*ORDER, "sampler", "objective", "dataset")]
    return [key for key in ORDER if key in present] + rest


def _differs(groups: Sequence[Group], key: str) -> bool:
    return len({repr(group.properties[key]) for group in groups if key in group.properties}) > 1


def _word(key: str, value: Any) -> str:
    if key == "num_epochs":
        return f"{value} epoch" if value == 1 else f"{value} epochs"
    if key in ("preconditioning", "model"):
        return "no preconditioning" if value == "none" else str(value)
    name = SYMBOLS.get(key, key.rpartition(".")[2])
    return f"no {name}" if value is None else f"{name}={show_value(value)}"


def show_value(value: Any) -> str:
    """A setting as a person would write it: 0.001, 1e-5, 64."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(value: Any) -> list[Any]:
    """Sort key in which 2 comes before 10, also inside text."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", str(value))
    return [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]


@dataclass
class Study:
    """Everything a report shows; warnings are one line each and name their file."""

    name: str
    runs: list[Run]
    groups: list[Group]
    warnings: list[str]

    @property
    def datasets(self) -> list[str]:
        return sorted({group.dataset for group in self.groups})

    def of(self, dataset: str) -> list[Group]:
        """The groups of one dataset: only these are compared with one another."""
        return [group for group in self.groups if group.dataset == dataset]


def read_study(folder: Path) -> Study:
    """Read outputs/<study>, or one run; UserError when there is no such folder or no run in it."""
    folder = follow(Path(folder))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder{_studies_in(folder.parent)}")
    warnings: list[str] = []
    runs = list(read_runs(folder, warnings))
    if not runs:
        cause = f" ({warnings[0]})" if warnings else ""
        where = _studies_in(folder) if (folder / "runs").is_dir() else ""
        raise UserError(f"{folder} holds no runs: folders with a run.json, or links to such{where or cause}")
    return Study(folder.resolve().name, runs, group_runs(runs, warnings), warnings)


def _studies_in(folder: Path) -> str:
    studies = sorted(path.name for path in folder.glob("[!.]*/") if path.name != "runs")
    return f"; studies there: {', '.join(studies)}" if studies else ""
