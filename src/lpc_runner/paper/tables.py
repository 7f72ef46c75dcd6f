"""Tables 1, 3 and 4 of the paper beside this study's numbers, and where runs diverged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lpc_runner.paper import numbers as paper
from lpc_runner.paper.evidence import UNKNOWN, devices_of, epochs_of
from lpc_runner.paper.quality_figures import frechet_name
from lpc_runner.study.runs import Measurement, Run, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.tables import (
    DASH,
    DIVERGED,
    Table,
    describe_setting,
    main_metrics,
    mean_of,
    metric_order,
    settings_of,
    show,
    spread,
)


def quality_table(dataset: str, groups: Sequence[Group], setting: Setting) -> Table:
    """Sample quality of every group measured in this setting, the paper's values beside it where they fit."""
    by_group = {group.label: [run.measured(setting) for run in group.counted] for group in groups}
    shown = [group for group in groups if any(by_group[group.label])]
    present = [measured for group in shown for measured in by_group[group.label] if measured]
    names = sorted({name for measured in present for name in measured.values}, key=metric_order)
    papers = {group.label: _paper_row(group, setting) for group in shown}
    compared = paper.METRICS if any(papers.values()) else ()
    columns, hidden = ["method", "seeds"], main_metrics(names)
    rows = [[group.marked_label, str(len(list(filter(None, by_group[group.label]))))] for group in shown]
    for name in names:
        columns += [name] + ([f"paper {name}", f"{name} − paper"] if name in compared else [])
        for row, group in zip(rows, shown):
            values = [measured.values.get(name) for measured in by_group[group.label] if measured]
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
    ceilings = {show(measurement.facts.get("coverage_ceiling")) for measurement in measurements} - {DASH}
    if ceilings:
        notes.append(f"Coverage of a perfect model at these counts: {', '.join(sorted(ceilings))}.")
    for measurement in measurements[:1]:
        for name, value in measurement.facts.items():
            if name.startswith("f") and name.endswith("_floor") and isinstance(value, int | float):
                count = measurement.facts.get("num_floor")
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


CHAIN = ("step_size", "preconditioning", "beta")


def tuning_tables(dataset: str, groups: Sequence[Group]) -> list[Table]:
    """A table per family and way of measuring: cells that differ in nothing but what the paper tunes."""
    tables = []
    for family in families(groups):
        for setting in settings_of(family):
            table = _table(dataset, family, setting)
            tables += [table] if table is not None else []
    return tables


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """VAEs equal but for the learning rate, chains equal but for step size and preconditioning; two or more."""
    by_settings: dict[str, list[Group]] = {}
    for group in groups:
        varied = ("learning_rate",) if group.method == "VAE" else CHAIN
        if group.method == "VAE" or group.properties.get("sampler") == "langevin":
            rest = sorted((key, repr(value)) for key, value in group.properties.items() if key not in varied)
            by_settings.setdefault(repr((group.method, rest)), []).append(group)
    return [family for family in by_settings.values() if len(family) > 1]


def tuning_seed(family: Sequence[Group]) -> int | None:
    """The lowest seed of the family: the one that chooses."""
    return min((run.seed for group in family for run in group.runs if isinstance(run.seed, int)), default=None)


def value_of(run: Run | None, setting: Setting, metric: str) -> float | None:
    """What a run that finished reached, None where it did not, or not with a finite value."""
    measurement = run.measured(setting) if run is not None and run.status == "finished" else None
    value = math.nan if measurement is None else measurement.values.get(metric, math.nan)
    return value if math.isfinite(value) else None


def chosen(family: Sequence[Group], setting: Setting) -> Group | None:
    """The group with the smallest Fréchet distance on the tuning seed; a diverged run is never chosen."""
    metric, seed = frechet_name(family, setting), tuning_seed(family)
    if metric is None:
        return None
    cells = [(value_of(_run_of(group, seed), setting, metric), group) for group in family]
    finite = [(value, group) for value, group in cells if value is not None]
    return min(finite, key=lambda cell: cell[0])[1] if finite else None


def _run_of(group: Group, seed: int | None) -> Run | None:
    return next((run for run in group.runs if run.seed == seed), None)


def _table(dataset: str, family: Sequence[Group], setting: Setting) -> Table | None:
    metric, seed = frechet_name(family, setting), tuning_seed(family)
    best = chosen(family, setting)
    cells = [(group, run) for group in family if (run := _run_of(group, seed)) is not None and run.status in STATES]
    if metric is None or best is None or len(cells) < 2:
        return None
    rows = []
    for group, run in cells:
        rest = [other for other in group.runs if other is not run]
        others = [value for other in rest if (value := value_of(other, setting, metric)) is not None]
        lost = f", {len(others)} of {len(rest)} finished with a number" if len(others) < len(rest) else ""
        rows.append(
            [
                group.label,
                show(value_of(run, setting, metric)) if run.status == "finished" else "diverged",
                "chosen" if group is best else "",
                f"{spread(others)} (n={len(others)}{lost})" if group is best and rest else DASH,
                "paper's choice" if _is_papers(dataset, group) else "",
            ]
        )
    vae = best.method == "VAE"
    what = "VAE, learning rate" if vae else f"{best.method}, step size and preconditioning"
    notes = [
        f"Chosen by the lowest {metric} of seed {seed} among {len(cells)} cells; "
        "its other seeds, which did not take part in the choice, are averaged beside it.",
        f"Measured with {describe_setting(setting)}.",
        _papers_choice(dataset, vae),
    ]
    columns = ["cell", f"{metric} of seed {seed}", "choice", "other seeds", "the paper"]
    title = f"{dataset}: tuning, {what}, {setting.extractor}"
    return Table(title, columns, rows, [note for note in notes if note], extractor=setting.extractor)


STATES = ("finished", "diverged")


def papers_cell(dataset: str, method: str) -> dict[str, Any] | None:
    """The values of Table 3 for one of the paper's datasets, None for others."""
    tuned = paper.TABLE_3.get(dataset)
    if tuned is None:
        return None
    if method == "VAE":
        return {"learning_rate": tuned.vae_learning_rate}
    if tuned.beta is None:
        return {"step_size": tuned.step_size, "preconditioning": "none"}
    return {"step_size": tuned.step_size, "preconditioning": "adam", "beta": tuned.beta}


def _is_papers(dataset: str, group: Group) -> bool:
    cell = papers_cell(dataset, group.method)
    return cell is not None and all(paper.same(group.properties.get(key), value) for key, value in cell.items())


def _papers_choice(dataset: str, vae: bool) -> str:
    tuned = paper.TABLE_3.get(dataset)
    if tuned is None:
        return ""
    if vae:
        return f"The paper's choice (Table 3): learning rate {tuned.vae_learning_rate:g}."
    beta = "no preconditioning" if tuned.beta is None else f"β = {tuned.beta:g}"
    return f"The paper's choice (Table 3): γ = {tuned.step_size:g}, {beta}."


def ms_per_batch(run: Run) -> float | None:
    """Milliseconds of training per update, measuring left out; None where a run does not record both."""
    seconds, updates = run.cost("train_seconds"), run.cost("num_updates")
    return None if seconds is None or not updates else 1e3 * seconds / updates


def reference_vae(groups: Sequence[Group]) -> Group | None:
    """The finished VAE that trained longest: 50 epochs in the paper."""
    vaes = [group for group in groups if group.method == "VAE" and mean_of(map(ms_per_batch, group.finished))]
    return max(vaes, key=epochs_of, default=None)


def ratios(group: Group, reference: Group) -> tuple[float, float] | None:
    """Time per batch and of the whole training, in multiples of the reference's means.

    None where either has no times, or where they were not all taken on one device that is recorded.
    """
    pairs = []
    for cost in (ms_per_batch, lambda run: run.cost("train_seconds")):
        ours, theirs = (mean_of(map(cost, each.finished)) for each in (group, reference))
        if ours is None or not theirs:
            return None
        pairs.append(ours / theirs)
    devices = devices_of(group) | devices_of(reference)
    return (pairs[0], pairs[1]) if len(devices) == 1 and UNKNOWN not in devices else None


def time_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Table 4: ours and the paper's ratios; None without a finished VAE and something to set beside it."""
    reference = reference_vae(groups)
    shown = [group for group in groups if mean_of(map(ms_per_batch, group.finished))]
    if reference is None or len(shown) < 2:
        return None
    theirs = {cost.method: cost for cost in paper.TABLE_4}
    columns = ["method", "seeds", "epochs", "T", "ms per batch", "× VAE's batch", "paper ×"]
    columns += ["training s", "× VAE end to end", "paper × end to end", "device"]
    rows = []
    for group in shown:
        multiples, printed = ratios(group, reference), theirs.get(group.method)
        per_batch, whole = multiples if multiples is not None else (None, None)
        steps = group.properties.get("num_steps")
        rows.append(
            [
                group.marked_label,
                str(len(group.finished)),
                show(epochs_of(group), 0),
                DASH if steps is None else str(steps),
                spread(map(ms_per_batch, group.finished)),
                show(per_batch),
                DASH if printed is None else f"{printed.per_batch:g}",
                spread(run.cost("train_seconds") for run in group.finished),
                show(whole),
                DASH if printed is None else f"{printed.end_to_end:g}",
                ", ".join(sorted(devices_of(group))),
            ]
        )
    devices = sorted({device for group in shown for device in devices_of(group)})
    notes = [
        f"Ratios to {reference.label}, the VAE that trained longest; training time without measuring.",
        f"Ours on {', '.join(devices)}; the paper's: T = 300, 15 epochs against the VAE's 50, "
        f"on {paper.TABLE_4_HARDWARE}.",
    ]
    notes += [f"{DASH} for a ratio: not on one recorded device with the VAE."] * any(
        ratios(g, reference) is None for g in shown
    )
    hidden = frozenset({"epochs", "T", "device", "training s"})
    return Table(f"{dataset}: times (Table 4)", columns, rows, notes, hidden)


def divergence_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Every diverged run: when, and which state its numbers are of; None where none diverged."""
    rows = []
    for group in groups:
        for run in group.runs:
            if run.status == "diverged":
                place = run.result.get("diverged_at")
                epoch, update = (place.get(key) if isinstance(place, dict) else None for key in ("epoch", "update"))
                state = str(run.result.get("state_measured") or DASH)
                when = [DASH if value is None else f"{value:,.6g}" for value in (epoch, update)]
                rows.append([group.label, str(run.seed), *when, state, run.name])
    if not rows:
        return None
    epochs = [float(row[2].replace(",", "")) for row in rows if row[2] != DASH]
    notes = [f"First at epoch {min(epochs):g}, median {statistics.median(epochs):g}."] if epochs else []
    columns = ["method", "seed", "epoch", "update", "state measured", "run"]
    return Table(f"{dataset}: where runs diverged", columns, rows, notes, frozenset({"run"}))
