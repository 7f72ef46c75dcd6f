"""Run folders read into plain objects: settings, state, what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import yaml
from yaml import YAMLError

from lpc_runner.base.files import is_refusal
from lpc_runner.base.presentation import IS_QUALITY
from lpc_runner.store.log import MetricLog
from lpc_runner.store.runs import entries_of, follow

T = TypeVar("T")
NOT_FINITE = ("nan", "inf", "-inf")
STATUSES = ("finished", "diverged", "failed", "unfinished", "damaged")
# What training spends, as result.json and as a row of metrics.jsonl calls it.
SPENT = {
    "update": ("num_updates", "update"),
    "epoch": ("num_epochs", "epoch"),
    "seconds": ("train_seconds", "time/train_seconds"),
    "gradient_evaluations": ("gradient_evaluations", "train/gradient_evaluations"),
}

_AIS = ("num_chains", "num_temperatures")
ESTIMATES = {
    "likelihood": ("split", "num_examples", "num_levels", *_AIS, "num_leapfrog"),
    "posterior": ("split", "num_examples", "num_simulated", *_AIS, "num_chain_steps", "num_reference_steps"),
}


class Setting(NamedTuple):
    """How sample quality was measured: one column holds numbers of one setting; None: not recorded."""

    extractor: str
    num_samples: int | None = None
    num_references: int | None = None
    k: int | None = None
    reference: str | None = None
    extractor_hash: str | None = None

    def fits(self, other: Setting) -> bool:
        """Whether two measurements can be compared; without a recorded number of samples they cannot."""
        if self.num_samples is None or self[:2] != other[:2]:
            return False
        return all(mine == theirs or None in (mine, theirs) for mine, theirs in zip(self[2:], other[2:]))


@dataclass(frozen=True)
class Measurement:
    """Numbers by name, and what stands beside them; source: the file they were read from.

    setting: what has to be the same where two are compared, of sample quality a Setting, of metrics=likelihood or
    posterior the kind and its facts named in ESTIMATES.
    """

    setting: Any
    values: dict[str, float]
    facts: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Point:
    """Numbers at one moment of training; spent: what was spent until then, by the names of SPENT, None: not recorded.

    setting: how sample quality was measured; None: a row of the training log.
    """

    spent: dict[str, float | None]
    setting: Setting | None
    values: dict[str, float]

    @property
    def update(self) -> int:
        return int(self.spent["update"] or 0)

    def fits(self, setting: Setting) -> bool:
        """Whether it is a measurement of sample quality that can be compared with those of `setting`."""
        return self.setting is not None and self.setting.fits(setting)


@dataclass
class Run:
    """One run: its settings, its state (one of STATUSES), what it cost and what it reached.

    shape: of one example, () where it is not recorded; devices: the names of the processors it ran on, session by
    session, each once; () where a session does not say its own.
    """

    name: str
    path: Path
    choices: dict[str, Any]
    keys: dict[str, Any]
    config: dict[str, Any]
    shape: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    status: str = "unfinished"
    result: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    estimates: list[Measurement] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    number_facts: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    training: list[Point] = field(default_factory=list)
    last_update: int | None = None

    @property
    def seed(self) -> Any:
        return self.keys.get("seed")

    @property
    def diverged_at(self) -> dict[str, Any]:
        """Update and epoch of the divergence, as far as they are recorded."""
        place = self.result.get("diverged_at")
        return place if isinstance(place, dict) else {}

    def cost(self, name: str) -> float | None:
        """num_updates, num_epochs, train_seconds, total_seconds or gradient_evaluations of the whole run."""
        return as_number(self.result.get(name))

    def curve(self, setting: Setting) -> list[Point]:
        """Measurements during training that fit `setting`, then the final one if it fits too."""
        points = [point for point in self.points if point.fits(setting)]
        spent = {name: self.cost(total) for name, (total, _) in SPENT.items()}
        if spent["update"] is not None:
            final = [each for each in self.measurements if each.source == "result.json" and each.setting.fits(setting)]
            points += [Point(spent, each.setting, each.values) for each in final]
        by_update = {point.update: point for point in points}
        return [by_update[update] for update in sorted(by_update)]

    def measured(self, setting: tuple[Any, ...]) -> Measurement | None:
        """The first measurement in exactly this setting, result.json's before later evaluations; of log p(x), which may
        be annealed from elsewhere, that of the smallest gap."""
        found = [each for each in (*self.measurements, *self.estimates) if each.setting == setting]
        return min(found, key=lambda each: each.values.get("bdmc_gap", math.inf), default=None)

    def values(self, setting: tuple[Any, ...] | None) -> dict[str, float]:
        """Numbers measured in exactly this setting; None: those that no setting enters, bounds for example."""
        if setting is None:
            return self.numbers
        measurement = self.measured(setting)
        return {} if measurement is None else measurement.values


def read_runs(folder: Path, warnings: list[str]) -> Iterator[Run]:
    for entry in entries_of(folder):
        if entry.name == "report":
            continue
        path = follow(entry)
        if (entry.is_symlink() or path != entry) and not path.exists():
            warnings.append(f"{path.name}: a link to a run that is not there")
        elif path.is_dir():
            run = read_run(path, warnings)
            if run is not None:
                yield run


def read_run(path: Path, warnings: list[str]) -> Run | None:
    """One run directory, None when run.json is missing or damaged; whatever else is damaged is left out."""
    described = _read_json(path, "run.json", warnings)
    if described is None:
        if not (path / "run.json").exists():
            warnings.append(f"{path.name}: no run (it has no run.json)")
        return None
    choices, keys = (described.get(part) for part in ("choices", "keys"))
    if not isinstance(choices, dict) or not isinstance(keys, dict):
        warnings.append(f"{path.name}/run.json is damaged (no choices or no keys)")
        return None
    keys = {key: value for key, value in keys.items() if value is not None}
    run = Run(path.name, path, choices, keys, _read_config(path, warnings))
    if (path / "result.json").exists():
        run.result = _read_json(path, "result.json", warnings) or {}
        run.status = run.result.get("status", "damaged")
        if run.result and run.status not in STATUSES:
            warnings.append(f"{path.name}/result.json is damaged (status {run.status!r})")
            run.status = "damaged"
        _add_measurement(run, run.result, "result.json")
    for file in sorted((path / "evaluations").glob("*.json")):
        name = f"evaluations/{file.name}"
        content = _read_json(path, name, warnings) or {}
        update, final = as_number(content.get("update")), run.cost("num_updates")
        if None in (update, final) or update == final:
            _add_measurement(run, content, name)
        else:
            warnings.append(f"{path.name}/{name} measured update {update:.0f} of {final:.0f}: left out")
    shape = described.get("data_shape")
    run.shape = tuple(shape) if isinstance(shape, list) and all(isinstance(size, int) for size in shape) else ()
    run.devices = _devices(path)
    _add_curves(run, warnings)
    return run


def _devices(path: Path) -> tuple[str, ...]:
    """The processors of all sessions; () where one does not say it: its share of the times is of an unknown one."""
    try:
        lines = (path / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
        return tuple(dict.fromkeys(str(json.loads(line)["device"]) for line in lines))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def read_file(
    folder: Path, name: str, read: Callable[[Path], T], warnings: list[str], lack: str = "", then: str = ""
) -> T | None:
    """What `read` makes of a file of a run, None where it is missing; None and one warning where it cannot be read.

    lack: what damage is called; then: what is done about it.
    """
    try:
        return read(folder / name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, RecursionError, SyntaxError, BadZipFile, YAMLError) as error:
        what = f"is damaged{lack}"
        if isinstance(error, OSError) and is_refusal(error):
            what = f"cannot be read ({error.strerror})"
        warnings.append(f"{folder.name}/{name} {what}{then}")
        return None


def _read_json(folder: Path, name: str, warnings: list[str]) -> dict[str, Any] | None:
    def read(path: Path) -> dict[str, Any]:
        return _mapping(json.loads(path.read_bytes()))

    return read_file(folder, name, read, warnings, " (no JSON object)")


def _read_config(folder: Path, warnings: list[str]) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def read(path: Path) -> dict[str, Any]:
        content = yaml.load(path.read_bytes(), loader)
        return {} if content is None else _mapping(content)

    return dict(_flat(read_file(folder, "config.yaml", read, warnings, " (no settings)") or {}))


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("it holds no names with values")
    return content


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_number(value: Any) -> float | None:
    """A number as JSON holds it ("nan" and "inf" as text), None for anything else."""
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(content: Any) -> dict[str, float]:
    pairs = content.items() if isinstance(content, dict) else ()
    return {key: number for key, value in pairs if (number := as_number(value)) is not None}


def by_extractor(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Metrics of sample quality by extractor: those without a suffix are inception's."""
    grouped: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        if match := IS_QUALITY.fullmatch(name):
            grouped.setdefault(match[2] or "inception", {})[name] = value
    return grouped


def _add_measurement(run: Run, content: dict[str, Any], source: str) -> None:
    """Quality goes to one measurement per extractor, a kind of ESTIMATES to `estimates`, all else to `numbers`."""
    values = _numbers(content.get("metrics"))
    facts = content.get("measurement")
    facts = facts if isinstance(facts, dict) else {}
    kind = facts.get("kind")
    if kind in ESTIMATES:
        setting = (kind, *(facts.get(name) for name in ESTIMATES[kind]))
        run.estimates.append(Measurement(setting, values, facts, source))
        return
    for extractor, quality in by_extractor(values).items():
        own = facts if facts.get("extractor", extractor) == extractor else {}
        setting = Setting(extractor, *(own.get(name) for name in Setting._fields[1:]))
        run.measurements.append(Measurement(setting, quality, own, source))
    others = {name: value for name, value in values.items() if not IS_QUALITY.fullmatch(name)}
    for name, value in others.items():
        run.numbers.setdefault(name, value)
    if others:
        bound = {name: fact for name, fact in facts.items() if name in ("bound_split", "num_bound")}
        run.number_facts |= {name: fact for name, fact in bound.items() if name not in run.number_facts}


def _add_curves(run: Run, warnings: list[str]) -> None:
    finals = {measurement.setting.extractor: measurement.setting for measurement in reversed(run.measurements)}
    rows = read_file(run.path, "metrics.jsonl", MetricLog.read, warnings, then=": no curves of this run")
    for row in rows or ():
        spent = {name: as_number(row.get(key)) for name, (_, key) in SPENT.items()}
        if spent["update"] is None:
            continue
        run.last_update = int(spent["update"])
        elbo = as_number(row.get("train/elbo"))
        if elbo is not None:
            run.training.append(Point(spent, None, {"train/elbo": elbo}))
        values = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        samples = as_number(values.pop("num_samples", None))
        count = None if samples is None else int(samples)
        for extractor, quality in by_extractor(_numbers(values)).items():
            setting = finals.get(extractor, Setting(extractor))._replace(num_samples=count)
            run.points.append(Point(spent, setting, quality))
