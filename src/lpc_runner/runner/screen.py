"""What a command prints: the plan of its runs, and the results of those that are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lpc_runner.base.presentation import QUALITY
from lpc_runner.runner.pace import Pace, total_updates
from lpc_runner.runner.plan import Planned
from lpc_runner.store.runs import DONE
from lpc_runner.tracking.progress import show_duration

_NOTE = 24  # columns that a note beside the numbers needs
_BOUND = ("elbo", "kl", "bits_per_dim", "active_units", "sigma")


def print_plan(planned: list[Planned], chosen: Sequence[str] = ()) -> None:
    """What a command would do, run by run, what it would download, and how long the rest of it will train.

    chosen: lines on what the datasets chose.
    """
    console, pace = Console(), Pace()
    shared = set.intersection(*(set(run.cell.overrides) for run in planned))
    left = [pace.seconds_left(run) for run in planned]
    console.print("[bold]state    updates   training left   run[/bold]", highlight=False)
    for run, seconds in zip(planned, left):
        cell = " ".join(item for item in run.cell.overrides if item not in shared)
        for line in filter(None, (cell, run.directory.name)):
            facts = f"{run.directory.state():<6}{total_updates(run):>10,}{show_duration(seconds):>16}"
            first = line is cell or not cell
            console.print(f"{facts if first else '':<32}   {line}", highlight=False, soft_wrap=True)
    states = [run.directory.state() for run in planned]
    fetched = dict.fromkeys(what for run, state in zip(planned, states) if state != "done" for what in run.to_fetch())
    lines = [*chosen, *dict.fromkeys(f"data: {line}" for run in planned for line in run.experiment.dataset.account())]
    for line in [*lines, *([f"to download first: {', '.join(fetched)}"] if fetched else [])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "resume", "new"))
    study, device = planned[0].cell.cfg.study, planned[0].experiment.device
    console.print(
        f"{len(planned)} runs ({counts}) in {planned[0].cell.cfg.output_dir}/{study}; {show_duration(sum(left))} of "
        f"training left, one after the other on {device}, measuring not counted; nothing was started",
        soft_wrap=True,
    )
    if caution := pace.caution():
        console.print(caution, soft_wrap=True)


def print_results(planned: list[Planned]) -> None:
    """The closing table of every run that is done: metrics with what they were measured on, and the paths.

    Raises UserError for a result whose measurement is not one.
    """
    console = Console()
    for run in planned:
        result = run.directory.result()
        if result is None or result["status"] not in DONE:
            continue
        try:
            measured = _measured(result["metrics"], result["measurement"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # edited by hand
            raise run.directory.damaged("result.json", "its measurement has lost something") from error
        _print_measured(console, run.directory.name, measured)
        seconds, updates = result["train_seconds"], result["num_updates"]
        ending = f" at update {result['diverged_at'].get('update')}" if result["diverged_at"] else ""
        console.print(
            f"  {result['status']}{ending}: {updates:,} updates, {result['gradient_evaluations']:,} decoder gradients, "
            f"{seconds:.1f} s of training on {result['device']}; metrics of the {result['state_measured']}",
            soft_wrap=True,
        )
        link = Path(run.cell.cfg.output_dir) / run.cell.cfg.study / run.directory.name
        link = link if link.is_symlink() else run.directory.path  # no links on this file system: not through a file
        if (run.directory.samples / "final.png").exists():
            console.print(f"  samples  {link}/samples/final.png", soft_wrap=True)
        console.print(f"  result   {link}/result.json", soft_wrap=True)


def print_measurement(name: str, metrics: dict[str, float], facts: dict[str, Any]) -> None:
    """Metrics as a table, with what they were measured on."""
    _print_measured(Console(), name, _measured(metrics, facts))


class _Measured(NamedTuple):
    """Rows of name, numbers and a note; the numbers' headings; and, in words, what all was measured on."""

    rows: list[tuple[str, ...]]
    headings: tuple[str, ...]
    sources: str


def _measured(metrics: dict[str, float], facts: dict[str, Any]) -> _Measured:
    return (_noted if "notes" in facts else _images)(metrics, facts)


def _print_measured(console: Console, name: str, measured: _Measured) -> None:
    """The numbers as a table; where it is too wide for the terminal, the notes follow it: no name or number is cut."""
    console.print(f"\n[bold]{name}[/bold]", highlight=False, soft_wrap=True)
    table = _table(measured, noted=False)
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    fits = needed + _NOTE <= console.width
    width, console.width = console.width, max(console.width, needed)
    console.print(_table(measured, noted=True) if fits else table)
    console.width = width
    for row in () if fits else filter(lambda row: row[-1], measured.rows):
        console.print(f"  {row[0]}: {row[-1]}", highlight=False, soft_wrap=True)
    console.print(f"  {measured.sources}", highlight=False, soft_wrap=True)


def _table(measured: _Measured, noted: bool) -> Table:
    titled = any(measured.headings)
    table = Table(show_header=titled, box=None, padding=(0, 1 if titled else 2))
    table.add_column("", no_wrap=True)
    for heading in measured.headings:
        table.add_column(heading, justify="right" if titled else "left", header_style="dim", no_wrap=True)
    for row in measured.rows:
        table.add_row(*(row if noted else row[:-1]))
    return table


def _noted(metrics: dict[str, float], facts: dict[str, Any]) -> _Measured:
    """Every number with its unit, and beside it, where something is known of it, that of the truth."""
    rows, known = [], facts["ceilings"] or facts["kind"] == "sequences"
    number = "{:.4g}" if facts["kind"] == "sequences" else "{:.6g}"  # of log p(x), hundredths count
    for metric in _ordered(metrics):
        ceiling = facts["ceilings"].get(metric)
        truth = "" if ceiling is None else number.format(ceiling)
        rows.append((metric, number.format(metrics[metric]), *([truth] * bool(known)), facts["notes"].get(metric, "")))
    heading = "true rates" if facts["kind"] == "sequences" else "truth"
    return _Measured(rows, ("model", heading) if known else ("",), facts["sources"])


def _images(metrics: dict[str, float], facts: dict[str, Any]) -> _Measured:
    """Sample quality first, with N, k, extractor and split of those it belongs to."""
    suffix = "_" + facts["extractor"]
    quality = [metric for metric in _ordered(metrics) if metric.removesuffix(suffix) in QUALITY]
    rows = []
    for metric in quality:
        note = ""
        if metric.startswith("coverage"):
            note = f"{facts['coverage_ceiling']:.3f} at best with these N"
        elif facts.get(f"{metric}_floor") is not None:
            note = f"{facts[f'{metric}_floor']:.3g} between the references and {facts['num_floor']:,} other real images"
        rows.append((metric, f"{metrics[metric]:.4g}", note))
    for metric in (metric for metric in _ordered(metrics) if metric not in quality):
        note = {"elbo": "nats per image", "bits_per_dim": "from the ELBO"}.get(metric, "")
        note = "nats per image" if metric == "kl" or metric.startswith("kl_") else note
        rows.append((metric, f"{metrics[metric]:.4g}", note))
    sources = (
        f"N = {facts['num_samples']:,} samples against {facts['num_references']:,} {facts['reference']} images, "
        f"k = {facts['k']}, extractor {facts['extractor']} {facts['extractor_hash'][:8]}"
    )
    if "num_bound" in facts:
        sources += f"; elbo to active_units: {facts['num_bound']:,} {facts['bound_split']} images"
    return _Measured(rows, ("",), sources)


def _ordered(metrics: dict[str, float]) -> list[str]:
    order = [*QUALITY, *_BOUND]

    def place(metric: str) -> int:
        return next((number for number, name in enumerate(order) if metric.startswith(name)), len(order))

    return sorted(metrics, key=place)
