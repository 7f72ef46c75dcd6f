"""Tables of a study: means over seeds, of one dataset and one way of measuring; and a flat one with a row per run."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lpc_runner.base.presentation import QUALITY, base_name
from lpc_runner.study.runs import STATUSES, Run, Setting
from lpc_runner.study.study import Group, Study, common_settings, show_value

LIKELIHOOD = ("elbo", "bits_per_dim", "kl", "active_units", "sigma")
UNITS = {"elbo": "nats per example", "kl": "nats per example", "bits_per_dim": "bits per dimension"}
DASH = "–"
LONG = 40
TINY = 0.001  # below it a number is written with an exponent
DIVERGED = "† no seed finished: the last finite states of diverged runs."


@dataclass
class Table:
    """Text in rows and columns, the first of which names the row.

    On a terminal `hidden` columns are left out, and `extractor`, which the title says, off the ends of names.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    hidden: frozenset[str] = frozenset()
    extractor: str = ""

    @property
    def prose(self) -> set[int]:
        """The columns of text, aligned left: the first, and those with a cell of more than LONG letters."""
        return {0} | {i for i in range(len(self.columns)) if any(len(row[i]) > LONG for row in self.rows)}

    def markdown(self) -> str:
        """A heading, the table, and the notes as a list."""
        lines = [f"## {self.title}", "", *_markdown_rows([self.columns, *self.rows], self.prose)]
        return "\n".join([*lines, "", *[f"- {_escape(note)}" for note in self.notes]]).rstrip() + "\n"


def _markdown_rows(rows: Sequence[Sequence[str]], prose: Collection[int]) -> list[str]:
    text = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    alignment = "".join("|---" if index in prose else "|--:" for index in range(len(rows[0])))
    return [text[0], f"{alignment}|", *text[1:]]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# Numbers --------------------------------------------------------------------------------------------------


def show(value: float | None, decimals: int | None = None) -> str:
    """A number with as many decimals as its size deserves, – for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    if decimals is None and value != 0 and abs(value) < TINY:
        return f"{value:.2g}"
    return f"{value:,.{decimals_of(value) if decimals is None else decimals}f}"


def decimals_of(value: float) -> int:
    """Digits after the point for a number of this size."""
    if abs(value) >= 1000:
        return 0
    if 0 < abs(value) < 0.01:
        return 5
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3


def spread(values: Iterable[float | None], expected: int | None = None) -> str:
    """mean ± standard deviation (over n - 1, – for one value); n is said where it is not `expected`."""
    present = [value for value in values if value is not None]
    if not present:
        return DASH
    count = "" if expected in (None, len(present)) else f" (n={len(present)})"
    odd = sum(not math.isfinite(value) for value in present)
    if odd:
        return f"not finite{f' in {odd} of {len(present)}' if len(present) > 1 else ''}{count}"
    return f"{mean_and_spread(present)}{count}"


def mean_and_spread(values: Sequence[float], alone: str = f" ± {DASH}") -> str:
    """mean ± standard deviation over n - 1, to the same decimals; `alone` after a single value, nothing for none."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return show(mean) + alone
    decimals = decimals_of(mean) if abs(mean) >= TINY or mean == 0 else None
    return f"{show(mean)} ± {show(statistics.stdev(values), decimals)}"


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what is there, None where nothing is."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


# Sample quality -------------------------------------------------------------------------------------------


def metric_order(metric: str) -> tuple[int, str]:
    """Sort key: the Fréchet distance first, recall last."""
    return QUALITY.index(base_name(metric)), metric


def main_metrics(names: Iterable[str]) -> frozenset[str]:
    """Those that a terminal has no room for."""
    return frozenset(name for name in names if base_name(name) in ("kid", "precision", "recall"))


def describe_setting(setting: Setting) -> str:
    """Extractor, N, references and k in words."""
    known = [f"{setting.extractor} features" + (f" ({setting.extractor_hash[:8]})" if setting.extractor_hash else "")]
    count = setting.num_samples
    known.append("number of samples not recorded" if count is None else f"N = {count:,}")
    if setting.num_references is not None:
        split = f" ({setting.reference})" if setting.reference else ""
        known.append(f"{setting.num_references:,} references{split}")
    if setting.k is not None:
        known.append(f"k = {setting.k}")
    return ", ".join(known)


def settings_of(groups: Sequence[Group]) -> list[Setting]:
    """The ways in which these runs were measured, published weights first."""
    settings = {measured.setting for group in groups for run in group.counted for measured in run.measurements}
    return sorted(settings, key=lambda setting: (setting.extractor != "inception", str(setting)))


# Likelihood, cost, state ----------------------------------------------------------------------------------


def likelihood_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Numbers that no extractor enters: bounds, KL, active units; None where there are none."""
    measured = {name for group in groups for run in group.counted for name in run.numbers}
    names = [name for name in LIKELIHOOD if name in measured] + sorted(measured.difference(LIKELIHOOD))
    shown = [group for group in groups if any(run.numbers for run in group.counted)]
    if not names:
        return None
    rows = []
    for group in shown:
        cells = [spread((run.numbers.get(name) for run in group.counted), len(group.counted)) for name in names]
        rows.append([group.marked_label, str(len(group.counted)), *cells])
    notes = ["; ".join(f"{name}: {UNITS[name]}" for name in names if name in UNITS)]
    facts = {f"{key} {value}" for group in shown for run in group.counted for key, value in run.number_facts.items()}
    notes += [f"Bounds over: {', '.join(sorted(facts))}."] * bool(facts)
    notes += [DIVERGED] * any(group.diverged for group in shown)
    hidden = frozenset(names[len(LIKELIHOOD) :])
    title = f"{dataset}: likelihood and latents"
    return Table(title, ["method", "seeds", *names], rows, [note for note in notes if note], hidden)


def cost_table(dataset: str, groups: Sequence[Group]) -> Table:
    """State of every group's runs and what its averaged runs cost."""
    columns = ["method", "runs", "updates", "epochs", "train s", "gradient evaluations", "total s"]
    names = ("num_updates", "num_epochs", "train_seconds", "gradient_evaluations", "total_seconds")
    rows = []
    for group in groups:
        costs = [_cost([run.cost(name) for run in group.counted]) for name in names]
        rows.append([group.marked_label, count_statuses(group.runs), *costs])
    notes = ["Train seconds leave measuring out; a gradient evaluation is one ∇ log p(x, z) of one example."]
    for name, shared in zip(("Shared by all", "Shared where it applies"), common_settings(groups)):
        settings = ", ".join(f"{key} {show_value(value)}" for key, value in shared.items())
        notes += [f"{name}: {settings}."] * bool(shared)
    notes += [DIVERGED] * any(group.diverged for group in groups)
    return Table(f"{dataset}: runs", columns, rows, notes, frozenset({"total s"}))


def _cost(values: Sequence[float | None]) -> str:
    """One number where all seeds agree (a count), else mean ± standard deviation."""
    present = {value for value in values if value is not None}
    if len(present) == 1:
        value = present.pop()
        return f"{value:,.0f}" if value == int(value) else show(value)
    return spread(values)


def count_statuses(runs: Sequence[Run]) -> str:
    """'2 finished, 1 diverged'."""
    counts = Counter(run.status for run in runs)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def state_notes(study: Study) -> list[str]:
    """One line for each run that did not finish, naming it and where it stands."""
    describe: dict[str, Callable[[Run], str]] = {
        "diverged": lambda run: f"diverged{_where(run.result.get('diverged_at'))}",
        "failed": lambda run: f"failed: {' '.join(str(run.result.get('error') or 'no reason recorded').split())}",
        "unfinished": lambda run: (
            "unfinished"
            + (", nothing logged yet" if run.last_update is None else f", last logged at update {run.last_update:,}")
        ),
        "damaged": lambda run: "its result is damaged",
    }
    return [f"{run.name}: {describe[run.status](run)}" for run in study.runs if run.status in describe]


def _where(place: Any) -> str:
    if not isinstance(place, dict):
        return ""
    parts = [f"{name} {place[name]:,.6g}" for name in ("update", "epoch") if isinstance(place.get(name), int | float)]
    return f" at {', '.join(parts)}" if parts else ""


def study_csv(study: Study) -> str:
    """One row per run: its settings, state, cost and every number, in full precision."""
    records = []
    group_of = {id(run): group for group in study.groups for run in [*group.runs, *group.repeated]}
    for run in study.runs:
        group = group_of[id(run)]
        counted = any(run is other for other in group.counted)
        record = {"run": run.name, "status": run.status, "group": group.label, "counted": counted}
        record |= {f"choice.{key}": value for key, value in run.choices.items() if not isinstance(value, dict)}
        record |= {f"setting.{key}": value for key, value in (group.properties | run.keys).items()}
        cost = ("num_updates", "num_epochs", "train_seconds", "total_seconds", "gradient_evaluations")
        record |= {name: run.result.get(name) for name in cost}
        place = run.result.get("diverged_at")
        record |= {f"diverged_at.{key}": value for key, value in place.items()} if isinstance(place, dict) else {}
        record |= {"error": run.result.get("error")}
        record |= {f"metric.{name}": value for name, value in run.numbers.items()}
        for measurement in (*run.measurements, *run.estimates):
            prefix = "" if measurement.source == "result.json" else f"{measurement.source}:"
            record |= {f"{prefix}metric.{name}": value for name, value in measurement.values.items()}
            facts = {name: value for name, value in measurement.facts.items() if not isinstance(value, dict)}
            record |= {f"{prefix}measurement.{name}": value for name, value in facts.items()}
        records.append(record)
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
