"""Tables of a study: means over seeds, of one dataset and one way of measuring; and a flat one with a row per run."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lpc_runner.base.presentation import QUALITY, base_name
from lpc_runner.study.runs import STATUSES, Run, Setting
from lpc_runner.study.study import Group, Study, common_settings, show_value

LIKELIHOOD = ("elbo", "bits_per_dim", "kl", "active_units", "sigma")
UNITS = {"elbo": "nats per example", "kl": "nats per example", "bits_per_dim": "bits per dimension"}
COSTS = {
    "num_updates": "updates",
    "num_epochs": "epochs",
    "train_seconds": "train s",
    "gradient_evaluations": "gradient evaluations",
    "total_seconds": "total s",
}
DASH = "–"
LONG = 40
TINY = 0.001  # below it a number is written with an exponent
DIVERGED = "† no seed finished: the last finite states of diverged runs."


@dataclass
class Table:
    """Text in rows and columns, the first of which names the row.

    On a terminal `hidden` columns are left out, and `extractor`, which the title says, off the ends of names; and rows
    after the first `num_main`, None for none.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    hidden: frozenset[str] = frozenset()
    extractor: str = ""
    num_main: int | None = None

    @property
    def prose(self) -> set[int]:
        """The columns of text, aligned left: the first, and those with a cell of more than LONG letters."""
        return {0} | {i for i in range(len(self.columns)) if any(len(row[i]) > LONG for row in self.rows)}

    def markdown(self) -> str:
        """A heading, the table, and the notes as a list."""
        head, *body = ["| " + " | ".join(map(_escape, row)) + " |" for row in (self.columns, *self.rows)]
        alignment = "".join("|---" if index in self.prose else "|--:" for index in range(len(self.columns)))
        lines = [f"## {self.title}", "", head, f"{alignment}|", *body]
        return "\n".join([*lines, "", *[f"- {_escape(note)}" for note in self.notes]]).rstrip() + "\n"


def group_table(
    title: str,
    groups: Sequence[Group],
    columns: Mapping[str, Sequence[str]],
    notes: Sequence[str],
    hidden: Collection[str] = (),
    extractor: str = "",
) -> Table:
    """A row for each group, named by its marked label; columns: cells in the order of the groups."""
    rows = [list(row) for row in zip([group.marked_label for group in groups], *columns.values())]
    marks = [DIVERGED] * any(group.diverged for group in groups)
    written = [note for note in notes if note]
    return Table(title, ["method", *columns], rows, written + marks, frozenset(hidden), extractor)


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


def measured_names(groups: Sequence[Group], setting: Setting | None) -> set[str]:
    """What the averaged runs of these groups measured in this setting; None: what no setting enters."""
    return {name for group in groups for run in group.counted for name in run.values(setting)}


def settings_of(groups: Sequence[Group]) -> list[Setting]:
    """The ways in which these runs were measured, published weights first."""
    settings = {measured.setting for group in groups for run in group.counted for measured in run.measurements}
    return sorted(settings, key=lambda setting: (setting.extractor != "inception", str(setting)))


# Likelihood, cost, state ----------------------------------------------------------------------------------


def likelihood_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Numbers that no extractor enters: bounds, KL, active units; None where there are none."""
    measured = measured_names(groups, None)
    names = [name for name in LIKELIHOOD if name in measured] + sorted(measured.difference(LIKELIHOOD))
    shown = [group for group in groups if measured_names([group], None)]
    if not names:
        return None
    columns = {"seeds": [str(len(group.counted)) for group in shown]}
    for name in names:
        columns[name] = [spread(group.values(name).values(), len(group.counted)) for group in shown]
    facts = {f"{key} {value}" for group in shown for run in group.counted for key, value in run.number_facts.items()}
    notes = ["; ".join(f"{name}: {UNITS[name]}" for name in names if name in UNITS)]
    notes += [f"Bounds over: {', '.join(sorted(facts))}."] * bool(facts)
    return group_table(f"{dataset}: likelihood and latents", shown, columns, notes, names[len(LIKELIHOOD) :])


def cost_table(dataset: str, groups: Sequence[Group]) -> Table:
    """State of every group's runs and what its averaged runs cost."""
    columns = {"runs": [count_statuses(group.runs) for group in groups]}
    for name, column in COSTS.items():
        columns[column] = [_cost([run.cost(name) for run in group.counted]) for group in groups]
    notes = ["Train seconds leave measuring out; a gradient evaluation is one ∇ log p(x, z) of one example."]
    for name, shared in zip(("Shared by all", "Shared where it applies"), common_settings(groups)):
        settings = ", ".join(f"{key} {show_value(value)}" for key, value in shared.items())
        notes += [f"{name}: {settings}."] * bool(shared)
    return group_table(f"{dataset}: runs", groups, columns, notes, {"total s"})


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
    return [f"{run.name}: {_state(run)}" for run in study.runs if run.status != "finished"]


def _state(run: Run) -> str:
    if run.status == "diverged":
        known = {name: run.diverged_at.get(name) for name in ("update", "epoch")}
        parts = [f"{name} {value:,.6g}" for name, value in known.items() if isinstance(value, int | float)]
        return f"diverged at {', '.join(parts)}" if parts else "diverged"
    if run.status == "failed":
        return f"failed: {' '.join(str(run.result.get('error') or 'no reason recorded').split())}"
    if run.status == "unfinished":
        logged = run.last_update
        return f"unfinished, {'nothing logged yet' if logged is None else f'last logged at update {logged:,}'}"
    return "its result is damaged"


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
        record |= {f"diverged_at.{key}": value for key, value in run.diverged_at.items()}
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
