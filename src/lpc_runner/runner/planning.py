"""The plan of a command: all cells checked, their state on disk, and what came of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import write_atomically
from lpc_runner.base.presentation import QUALITY
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import declared
from lpc_runner.config.compose import Cell, cell_from, cell_text, choices_of, resolved, starts_workers_here
from lpc_runner.runner.leases import gpu_slot, visible_gpus
from lpc_runner.runner.plan import Planned, plan
from lpc_runner.store.runs import DONE
from lpc_runner.tracking.progress import show_duration
from lpc_runner.tracking.tracker import Sink

logger = logging.getLogger(__name__)

_PLAN = "LPC_RUNNER_PLAN"  # environment variable with the path of the sweep's plan, which launchers pass on
_NOTE = 24  # columns that a note beside the numbers needs
_BOUND = ("elbo", "kl", "bits_per_dim", "active_units", "sigma")


@contextmanager
def frozen(cells: list[Cell], write: bool = True) -> Iterator[None]:
    """Keep a sweep's cells in a file that its jobs read, today or when a cluster starts them: what was checked is run.

    Without it a job composes its configuration again from conf/, which may have been edited meanwhile.
    """
    if len(cells) == 1:
        os.environ.pop(_PLAN, None)  # of a sweep whose job started this command
        yield
        return
    content = f"[{','.join(map(cell_text, cells))}]"
    folder = Path(cells[0].cfg.output_dir).absolute() / ".sweeps"
    path = folder / f"plan-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    os.environ[_PLAN] = str(path)
    try:
        yield
    finally:
        os.environ.pop(_PLAN, None)


def cell_of_job(cfg: DictConfig, hydra_cfg: DictConfig) -> Cell:
    """The cell that Hydra hands to a job: of a sweep, as it was planned. Raises UserError if the plan is lost."""
    path = os.environ.get(_PLAN)
    if path is None:
        return resolved(cfg, choices_of(hydra_cfg), list(hydra_cfg.overrides.task))
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))
        # Not by their number: shuffle() gives Hydra another order than it gave the plan.
        given = list(hydra_cfg.overrides.task)
        return cell_from(json.dumps(next(cell for cell in cells if cell["overrides"] == given)))
    except (FileNotFoundError, ValueError, LookupError, TypeError, StopIteration):
        raise UserError(
            f"{path}, the plan of this sweep, is gone or damaged; the same command writes it anew"
        ) from None


@contextmanager
def leased(planned: Planned, hydra_cfg: DictConfig) -> Iterator[None]:
    """A GPU slot for a run that shares this machine with others of its sweep; nothing on a CPU or under a scheduler."""
    device = planned.experiment.device
    alone = not starts_workers_here(hydra_cfg.launcher._target_) or device.type != "cuda" or device.index is not None
    if alone or planned.directory.state() == "done":
        yield
        return
    with gpu_slot(visible_gpus(torch.cuda.device_count()), planned.cell.cfg.runs_per_gpu) as index:
        logger.info("%s takes GPU %d", planned.directory.name, index)
        torch.cuda.set_device(index)
        planned.experiment.device = torch.device("cuda", index)
        yield


def check_plan(cells: list[Cell], ranks: Ranks = SINGLE, proposed: bool = False) -> list[Planned]:
    """Every cell built and checked, data and weights there or fetched. Raises UserError for the first wrong one.

    proposed: by a sweeper, which will propose others.
    """
    from lpc_runner.runner.sweepers import require_metric

    planned = []
    for cell in cells:
        try:
            found = plan(cell, ranks)
            planned.append(found)
            require_metric(found, proposed)
            if (proposed or len(cells) > 1) and (
                reason := declared(found.experiment.tracker.func, Sink, "refuses_sweeps")()
            ):
                raise UserError(reason)
            if not cell.cfg.check:
                found.directory.require_linkable(Path(cell.cfg.output_dir), cell.cfg.study)
                if found.directory.state() != "done":
                    found.require()
        except UserError as error:
            where = f" (in the cell {' '.join(cell.overrides)})" if len(cells) > 1 else ""
            raise UserError(f"{error}{where}") from None
    names = [run.directory.name for run in planned]
    return [run for number, run in enumerate(planned) if run.directory.name not in names[:number]]


def unfinished(planned: list[Planned]) -> list[str]:
    """What is not done, one line each."""
    lines = []
    for run in planned:
        result = run.directory.result()
        if result is None or result["status"] not in DONE:
            owner = run.directory.owner()
            why = f"is being run by {owner}" if owner else (result.get("error") if result else "no result")
            lines.append(f"{run.directory.path}: {why}")
    return lines


def print_plan(planned: list[Planned], chosen: Sequence[str] = ()) -> None:
    """What a command would do, run by run, what it would download, and how long the rest of it will train.

    chosen: lines on what the datasets chose.
    """
    from lpc_runner.runner.pace import Pace

    console, pace = Console(), Pace()
    shared = set.intersection(*(set(run.cell.overrides) for run in planned))
    left = [pace.seconds_left(run) for run in planned]
    console.print("[bold]state    updates   training left   run[/bold]", highlight=False)
    for run, seconds in zip(planned, left):
        cell = " ".join(item for item in run.cell.overrides if item not in shared)
        for line in filter(None, (cell, run.directory.name)):
            facts = f"{run.directory.state():<6}{_updates(run):>10,}{show_duration(seconds):>16}"
            first = line is cell or not cell
            console.print(f"{facts if first else '':<32}   {line}", highlight=False, soft_wrap=True)
    states = [run.directory.state() for run in planned]
    fetched = dict.fromkeys(what for run, state in zip(planned, states) if state != "done" for what in run.to_fetch())
    for line in chosen:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in dict.fromkeys(line for run in planned for line in run.experiment.dataset.account()):
        console.print(f"data: {line}", markup=False, highlight=False, soft_wrap=True)
    if fetched:
        console.print(f"to download first: {', '.join(fetched)}", highlight=False, soft_wrap=True)
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "resume", "new"))
    study, device = planned[0].cell.cfg.study, planned[0].experiment.device
    console.print(
        f"{len(planned)} runs ({counts}) in {planned[0].cell.cfg.output_dir}/{study}; {show_duration(sum(left))} of "
        f"training left, one after the other on {device}, measuring not counted; nothing was started",
        soft_wrap=True,
    )
    if caution := pace.caution():
        console.print(caution, soft_wrap=True)


def _updates(run: Planned) -> int:
    """Updates of the whole run."""
    trainer = run.experiment.trainer
    return trainer.total_updates(run.experiment.dataset.num_train // trainer.batch_size)


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
        note = facts["notes"].get(metric, "")
        rows.append((metric, number.format(metrics[metric]), *((truth,) if known else ()), note))
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
