"""Tables 1, 3 and 4 of the paper beside this study's numbers, and where runs diverged."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from lpc_runner.paper import numbers as paper
from lpc_runner.paper.evidence import UNKNOWN, devices_of, epochs_of
from lpc_runner.paper.quality_figures import frechet_name
from lpc_runner.study.runs import Measurement, Run, Setting
from lpc_runner.study.study import STEP, Group, equal_but
from lpc_runner.study.tables import (
    DASH,
    Table,
    describe_setting,
    group_table,
    main_metrics,
    mean_of,
    measured_names,
    metric_order,
    settings_of,
    show,
    spread,
)


def quality_table(dataset: str, groups: Sequence[Group], setting: Setting) -> Table:
    """Sample quality of every group measured in this setting, the paper's values beside it where they fit."""
    measured = {g.label: [m for run in g.counted if (m := run.measured(setting)) is not None] for g in groups}
    shown = [group for group in groups if measured[group.label]]
    names = sorted(measured_names(shown, setting), key=metric_order)
    papers = [_paper_row(group, setting) for group in shown]
    compared = paper.METRICS if any(papers) else ()
    columns = {"seeds": [str(len(measured[group.label])) for group in shown]}
    hidden = main_metrics(names)
    for name in names:
        values = [group.values(name, setting).values() for group in shown]
        columns[name] = [spread(own, len(measured[group.label])) for own, group in zip(values, shown)]
        if name in compared:
            theirs = [getattr(row, name, None) for row in papers]
            columns[f"paper {name}"] = [_printed(printed) for printed in theirs]
            columns[f"{name} − paper"] = [_difference(mean_of(own), printed) for own, printed in zip(values, theirs)]
            hidden |= {f"{name} − paper"}
    notes = [f"Measured with {describe_setting(setting)}."]
    notes += _facts([measurement for group in shown for measurement in measured[group.label]])
    notes += _comparison(dataset, setting, bool(compared))
    title = f"{dataset}: sample quality, {setting.extractor}"
    return group_table(title, shown, columns, notes, hidden, setting.extractor)


def _printed(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _difference(ours: float | None, theirs: float | None) -> str:
    return DASH if ours is None or theirs is None else f"{ours - theirs:+.2f}"


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
    ceilings = {show(measurement.facts.get("coverage_ceiling")) for measurement in measurements} - {DASH}
    notes = [f"Coverage of a perfect model at these counts: {', '.join(sorted(ceilings))}."] * bool(ceilings)
    first = measurements[0].facts
    count = first.get("num_floor")
    kind = f"{count:,} real images" if isinstance(count, int) else "real images"
    for name, value in first.items():
        if name.startswith("f") and name.endswith("_floor") and isinstance(value, int | float):
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


def paper_table(dataset: str) -> Table | None:
    """The paper's Table 1 for one of its datasets, None for others."""
    if dataset not in paper.DATASETS:
        return None
    rows = [
        [row.method, str(row.num_epochs), *(_printed(getattr(row, name)) for name in paper.METRICS)]
        for row in paper.TABLE_1
        if row.dataset == dataset
    ]
    note = f"{paper.EXTRACTOR} features, N = {paper.NUM_SAMPLES:,}; LPC is preconditioned or not as in Table 3."
    title = f"{dataset}: the paper's Table 1 ({paper.DATASETS[dataset]})"
    return Table(title, ["method", "epochs", *paper.METRICS], rows, [note])


def tuning_tables(dataset: str, groups: Sequence[Group]) -> list[Table]:
    """A table per family and way of measuring: cells that differ in nothing but what the paper tunes.

    That is, VAEs equal but for the learning rate, and chains equal but for step size and preconditioning.
    """
    vaes = [group for group in groups if group.method == "VAE"]
    chains = [group for group in groups if group.properties.get("sampler") == "langevin"]
    families = [*equal_but(("learning_rate",), vaes), *equal_but(STEP, chains)]
    tables = [_table(dataset, family, setting) for family in families for setting in settings_of(family)]
    return [table for table in tables if table is not None]


def _table(dataset: str, family: Sequence[Group], setting: Setting) -> Table | None:
    """The lowest seed chooses, by the smallest Fréchet distance; a diverged run is never chosen."""
    metric = frechet_name(family, setting)
    seed = min((run.seed for group in family for run in group.runs if isinstance(run.seed, int)), default=None)
    values = {g.label: {} if metric is None or g.diverged else g.finite(metric, setting) for g in family}
    ended = {g.label: run for g in family for run in g.runs if run.seed == seed and run.status in STATES}
    finite = [group for group in family if seed in values[group.label]]
    if not finite or len(ended) < 2:
        return None
    best = min(finite, key=lambda group: values[group.label][seed])
    papers, rows = paper.tuned(dataset, best.method), []
    for group in family:
        if group.label not in ended:
            continue
        own = values[group.label]
        rest = [run for run in group.runs if run.seed != seed]
        others = [value for other, value in own.items() if other != seed]
        lost = f", {len(others)} of {len(rest)} finished with a number" if len(others) < len(rest) else ""
        rows.append(
            [
                group.label,
                show(own.get(seed)) if ended[group.label].status == "finished" else "diverged",
                "chosen" if group is best else "",
                f"{spread(others)} (n={len(others)}{lost})" if group is best and rest else DASH,
                "paper's choice" if papers and paper.has(group.properties, papers) else "",
            ]
        )
    vae = best.method == "VAE"
    what = "VAE, learning rate" if vae else f"{best.method}, step size and preconditioning"
    notes = [
        f"Chosen by the lowest {metric} of seed {seed} among {len(rows)} cells; "
        "its other seeds, which did not take part in the choice, are averaged beside it.",
        f"Measured with {describe_setting(setting)}.",
    ]
    if papers:
        beta = f"β = {papers['beta']:g}" if "beta" in papers else "no preconditioning"
        choice = f"learning rate {papers['learning_rate']:g}" if vae else f"γ = {papers['step_size']:g}, {beta}"
        notes.append(f"The paper's choice (Table 3): {choice}.")
    columns = ["cell", f"{metric} of seed {seed}", "choice", "other seeds", "the paper"]
    title = f"{dataset}: tuning, {what}, {setting.extractor}"
    return Table(title, columns, rows, notes, extractor=setting.extractor)


STATES = ("finished", "diverged")


def ms_per_batch(run: Run) -> float | None:
    """Milliseconds of training per update, measuring left out; None where a run does not record both."""
    seconds, updates = run.cost("train_seconds"), run.cost("num_updates")
    return None if seconds is None or not updates else 1e3 * seconds / updates


def reference_vae(groups: Sequence[Group]) -> Group | None:
    """The finished VAE that trained longest: 50 epochs in the paper."""
    vaes = [group for group in groups if group.method == "VAE" and mean_of(map(ms_per_batch, group.finished))]
    return max(vaes, key=epochs_of, default=None)


def ratios(group: Group, reference: Group) -> tuple[float | None, float | None]:
    """Time per batch and of the whole training, in multiples of the reference's means.

    None where either has no times, or where they were not all taken on one device that is recorded.
    """

    def multiple(cost: Callable[[Run], float | None]) -> float | None:
        ours, theirs = (mean_of(map(cost, each.finished)) for each in (group, reference))
        return None if ours is None or not theirs else ours / theirs

    devices = devices_of(group) | devices_of(reference)
    if len(devices) != 1 or UNKNOWN in devices:
        return None, None
    return multiple(ms_per_batch), multiple(lambda run: run.cost("train_seconds"))


def time_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Table 4: ours and the paper's ratios; None without a finished VAE and something to set beside it."""
    reference = reference_vae(groups)
    shown = [group for group in groups if mean_of(map(ms_per_batch, group.finished))]
    if reference is None or len(shown) < 2:
        return None
    multiples = [ratios(group, reference) for group in shown]
    printed = [paper.TABLE_4.get(group.method, (None, None)) for group in shown]
    columns = {
        "seeds": [str(len(group.finished)) for group in shown],
        "epochs": [show(epochs_of(group), 0) for group in shown],
        "T": [str(group.properties.get("num_steps", DASH)) for group in shown],
        "ms per batch": [spread(map(ms_per_batch, group.finished)) for group in shown],
        "× VAE's batch": [show(ours) for ours, _ in multiples],
        "paper ×": [DASH if theirs is None else f"{theirs:g}" for theirs, _ in printed],
        "training s": [spread(run.cost("train_seconds") for run in group.finished) for group in shown],
        "× VAE end to end": [show(ours) for _, ours in multiples],
        "paper × end to end": [DASH if theirs is None else f"{theirs:g}" for _, theirs in printed],
        "device": [", ".join(sorted(devices_of(group))) for group in shown],
    }
    devices = sorted({device for group in shown for device in devices_of(group)})
    notes = [
        f"Ratios to {reference.label}, the VAE that trained longest; training time without measuring.",
        f"Ours on {', '.join(devices)}; the paper's: T = 300, 15 epochs against the VAE's 50, "
        f"on {paper.TABLE_4_HARDWARE}.",
    ]
    notes += [f"{DASH} for a ratio: not on one recorded device with the VAE."] * ((None, None) in multiples)
    return group_table(f"{dataset}: times (Table 4)", shown, columns, notes, {"epochs", "T", "device", "training s"})


def divergence_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Every diverged run: when, and which state its numbers are of; None where none diverged."""
    rows = []
    for group in groups:
        for run in group.runs:
            if run.status == "diverged":
                state = str(run.result.get("state_measured") or DASH)
                place = [run.diverged_at.get(name) for name in ("epoch", "update")]
                when = [DASH if value is None else f"{value:,.6g}" for value in place]
                rows.append([group.label, str(run.seed), *when, state, run.name])
    if not rows:
        return None
    epochs = [float(row[2].replace(",", "")) for row in rows if row[2] != DASH]
    notes = [f"First at epoch {min(epochs):g}, median {statistics.median(epochs):g}."] if epochs else []
    columns = ["method", "seed", "epoch", "update", "state measured", "run"]
    return Table(f"{dataset}: where runs diverged", columns, rows, notes, frozenset({"run"}))
