"""Curves during training, and what every group reaches for the same updates, seconds or gradients."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lpc_runner.study.runs import SPENT, Point, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.tables import (
    DASH,
    Table,
    describe_setting,
    group_table,
    main_metrics,
    metric_order,
    show,
    spread,
)


class Budget(NamedTuple):
    """Something a run spends, by its name among SPENT."""

    name: str
    spent: str
    unit: str


BUDGETS = (
    Budget("updates", "update", "updates"),
    Budget("seconds", "seconds", "s of training"),
    Budget("gradient evaluations", "gradient_evaluations", "gradient evaluations"),
)


@dataclass(frozen=True)
class BudgetCurve:
    """Mean and standard deviation (0 for one run) over the runs of a group, at the same updates.

    spent: means by the names of SPENT, None: not recorded.
    """

    updates: list[int]
    spent: dict[str, list[float | None]]
    mean: list[float]
    std: list[float]
    num_runs: int


def curve_settings(groups: Sequence[Group]) -> list[Setting]:
    """For each extractor the one setting with most measurements during training, else that of final ones."""
    counts: dict[str, Counter[Setting]] = {}
    for group in groups:
        for run in group.followed:
            during = [point.setting for point in run.points if point.setting is not None]
            final = [measurement.setting for measurement in run.measurements if measurement.source == "result.json"]
            for setting in during or final:
                if setting.num_samples is not None:
                    counts.setdefault(setting.extractor, Counter())[setting] += 1
    best = {name: max(count, key=lambda key: (count[key], str(key))) for name, count in counts.items()}
    return [best[extractor] for extractor in sorted(best)]


def mean_curve(runs: Sequence[list[Point]], metric: str) -> BudgetCurve:
    """Averages at the updates that all runs have, so that every mean is over the same seeds; finite values only."""
    by_run = []
    for points in runs:
        by_update = {p.update: p for p in points if math.isfinite(p.values.get(metric, math.nan))}
        by_run += [by_update] if by_update else []
    shared = sorted(set.intersection(*map(set, by_run))) if by_run else []
    values = [[points[update].values[metric] for points in by_run] for update in shared]
    std = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in values]
    spent = {name: [_mean([points[update].spent[name] for points in by_run]) for update in shared] for name in SPENT}
    return BudgetCurve(shared, spent, [statistics.fmean(column) for column in values], std, len(by_run))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def last_within(points: Sequence[Point], budget: Budget, limit: float) -> Point | None:
    """The last measurement that had spent no more than `limit`."""
    spent = [(cost, point) for point in points if (cost := point.spent[budget.spent]) is not None and cost <= limit]
    return max(spent, key=lambda pair: pair[0])[1] if spent else None


def budget_table(dataset: str, groups: Sequence[Group], setting: Setting, budget: Budget) -> Table | None:
    """Every group at the smallest final budget of them all; None where nothing was measured during training."""
    measured = {group.label: [run.curve(setting) for run in group.counted] for group in groups}
    shown = [group for group in groups if any(measured[group.label])]
    during = any(point.fits(setting) for group in shown for run in group.counted for point in run.points)
    total, _ = SPENT[budget.spent]
    totals = [(run.cost(total), group.label) for group in groups for run in group.finished]
    recorded = [(cost, label) for cost, label in totals if cost is not None]
    if not recorded or not during or len(shown) < 2:
        return None
    limit, owner = min(recorded)
    points = {group.label: [last_within(curve, budget, limit) for curve in measured[group.label]] for group in shown}
    reached = [[point for point in points[group.label] if point is not None] for group in shown]
    names = sorted({name for own in reached for point in own for name in point.values}, key=metric_order)
    if not names:
        return None
    columns = {
        "seeds": [str(len(own)) for own in reached],
        "measured at": [_range([point.spent[budget.spent] or 0 for point in own], budget) for own in reached],
    }
    for name in names:
        columns[name] = [spread((point.values.get(name) for point in own), len(own)) for own in reached]
    notes = [
        f"Budget: {_amount(limit, budget)} {budget.unit}, the smallest total of a finished run ({owner}); "
        "each run at its last measurement within it.",
        f"Measured with {describe_setting(setting)}.",
    ]
    finals = {
        measurement.setting.num_samples
        for group in groups
        for run in group.counted
        for measurement in run.measurements
        if measurement.setting.extractor == setting.extractor and not measurement.setting.fits(setting)
    }
    if finals:
        counts = ", ".join(sorted(f"N = {count:,}" if count else "N not recorded" for count in finals))
        notes.append(f"Measurements made otherwise ({counts}) are left out here: they cannot be compared.")
    if any(None in own for own in points.values()):
        notes.append(f"{DASH}: not measured so early; metrics.every_epochs measures during training.")
    title = f"{dataset}: at equal {budget.name}, {setting.extractor}"
    return group_table(title, shown, columns, notes, main_metrics(names), setting.extractor)


def _range(used: Sequence[float], budget: Budget) -> str:
    if not used:
        return DASH
    low, high = _amount(min(used), budget), _amount(max(used), budget)
    return low if low == high else f"{low} to {high}"


def _amount(value: float, budget: Budget) -> str:
    return show(value) if budget.name == "seconds" else f"{value:,.0f}"
