"""Sample quality of a study beside the paper's Table 1: every number is a mean over seeds, of one way of measuring."""

from __future__ import annotations

from collections.abc import Sequence

from lpc_runner.paper import numbers as paper
from lpc_runner.study.runs import Measurement, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.tables import (
    DASH,
    DIVERGED,
    Table,
    describe_setting,
    main_metrics,
    mean_of,
    metric_order,
    show,
    spread,
)


def quality_table(dataset: str, groups: Sequence[Group], setting: Setting) -> Table:
    """Sample quality of every group measured in this setting, the paper's values beside it where they fit."""
    found = {group.label: [run.measured(setting) for run in group.counted] for group in groups}
    shown = [group for group in groups if any(found[group.label])]
    present = [measured for group in shown for measured in found[group.label] if measured]
    names = sorted({name for measured in present for name in measured.values}, key=metric_order)
    papers = {group.label: _paper_row(group, setting) for group in shown}
    compared = paper.METRICS if any(papers.values()) else ()
    columns, hidden = ["method", "seeds"], main_metrics(names)
    rows = [[group.marked_label, str(len(list(filter(None, found[group.label]))))] for group in shown]
    for name in names:
        columns += [name] + ([f"paper {name}", f"{name} − paper"] if name in compared else [])
        for row, group in zip(rows, shown):
            values = [measured.values.get(name) for measured in found[group.label] if measured]
            row.append(spread(values, len(values)))
            if name in compared:
                theirs = getattr(papers[group.label], name, None)
                ours = mean_of(values)
                row += [_printed(theirs), DASH if theirs is None or ours is None else f"{ours - theirs:+.2f}"]
    hidden |= {name for name in columns if name.endswith("− paper")}
    notes = [f"Measured with {describe_setting(setting)}."]
    notes += _facts(present) + _comparison(dataset, setting, bool(compared))
    notes += [DIVERGED] * any(group.diverged for group in shown)
    return Table(f"{dataset}: sample quality, {setting.extractor}", columns, rows, notes, hidden, setting.extractor)


def _printed(value: float | None) -> str:
    """As the paper prints it: two decimals."""
    return DASH if value is None else f"{value:.2f}"


def _paper_row(group: Group, setting: Setting) -> paper.Row | None:
    """The row of Table 1 made as these runs were, if they did reach its epochs under its extractor."""
    if setting.extractor != paper.EXTRACTOR or group.diverged:
        return None
    row = paper.find_row(group.dataset, group.method, group.properties)
    reached = [run.cost("num_epochs") for run in group.counted]
    done = row is not None and all(value is None or abs(value - row.num_epochs) < 0.5 for value in reached)
    return row if done else None


def _facts(measurements: Sequence[Measurement]) -> list[str]:
    """The best coverage to expect and the distance of real images from real ones, where recorded."""
    notes = []
    ceilings = {show(found.facts.get("coverage_ceiling")) for found in measurements} - {DASH}
    if ceilings:
        notes.append(f"Coverage of a perfect model at these counts: {', '.join(sorted(ceilings))}.")
    for found in measurements[:1]:
        for name, value in found.facts.items():
            if name.startswith("f") and name.endswith("_floor") and isinstance(value, int | float):
                count = found.facts.get("num_floor")
                kind = f"{count:,} real images" if isinstance(count, int) else "real images"
                notes.append(f"{name.removesuffix('_floor')} of {kind} of the other split: {show(value)}.")
    return notes


def _comparison(dataset: str, setting: Setting, compared: bool) -> list[str]:
    if setting.extractor != paper.EXTRACTOR:
        return [f"Distances between {setting.extractor} features: not comparable with the paper's FID."]
    if compared and setting.num_samples != paper.NUM_SAMPLES:
        return [f"The paper used {paper.NUM_SAMPLES:,} samples; FID is larger with fewer."]
    if not compared and dataset in paper.DATASETS:
        return ["No group has the settings of the paper's Table 1: its values stand in their own table."]
    return []


def paper_table(dataset: str) -> Table:
    """The paper's Table 1 for one of its datasets."""
    rows = [
        [row.method, str(row.num_epochs), *(_printed(getattr(row, name)) for name in paper.METRICS)]
        for row in paper.TABLE_1
        if row.dataset == dataset
    ]
    note = f"{paper.EXTRACTOR} features, N = {paper.NUM_SAMPLES:,}; LPC is preconditioned or not as in Table 3."
    title = f"{dataset}: the paper's Table 1 ({paper.DATASETS[dataset]})"
    return Table(title, ["method", "epochs", *paper.METRICS], rows, [note])
