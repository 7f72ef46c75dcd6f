"""`lpc_runner.run`: the runs of a command, made in the caller's own process, which is left as it was."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lpc_runner.base.errors import UserError, masked
from lpc_runner.config.compose import Composed, compose_command, runs_in_this_process
from lpc_runner.config.words import flags_of, parse_arguments, refuse_flags
from lpc_runner.runner.commands import words_for_workers
from lpc_runner.runner.loading import LoadedRun, load
from lpc_runner.runner.planning import check_plan, unfinished
from lpc_runner.runner.run import execute
from lpc_runner.store.runs import RunDirectory
from lpc_runner.training.trainer import Interrupted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletedRun:
    """A run that is done. path: its folder. result: the content of result.json; `status` is finished or diverged."""

    path: Path
    result: dict[str, Any] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """The run's final numbers by name."""
        return self.result["metrics"]

    def load(self, *overrides: str, device: str = "auto") -> LoadedRun:
        """Its model and encoder; see `lpc_runner.load`."""
        return load(self.path, overrides, device)


def run(words: Sequence[str]) -> CompletedRun | list[CompletedRun]:
    """What `python -m lpc_runner WORDS` would run, made here one after the other, or taken as it is where it is done.

    words: `["dataset=digits", "model=mlp"]`. With `-m`, or an experiment that is a sweep, the answer is a list, each
    run once. Everything is checked before anything starts. Raises UserError (one line) for a mistake, and at the end of
    a sweep of which a run failed; what a single run raises is raised as it is. An interrupted run is saved, and
    the same words resume it.

    Environment, logging, signal handlers, Hydra's state, threads and determinism of the process are the caller's
    again afterwards. How its threads wait is left alone, and freed memory stays with the process.
    """
    if isinstance(words, str):
        raise UserError(f"lpc_runner.run takes a list of words, got {words!r}: run({words.split()})")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("lpc_runner.run works in one process: several ranks are `torchrun -m lpc_runner ...`")
    words = [str(word) for word in words]
    try:
        args, _ = parse_arguments(words)
    except SystemExit:
        raise UserError("--version shows something and runs nothing: it is the command's") from None
    refuse_flags(args)
    if flags := flags_of(args) - {"run", "multirun", "config_dir"}:
        raise UserError(f"--{min(flags).replace('_', '-')} shows something and runs nothing: it is the command's")
    with _left_as_it_was(), words_for_workers(["lpc_runner.run", *words]):
        composed = compose_command(args)
        _require_runs_here(composed)
        planned = check_plan(composed.cells)
        failure = None
        for planned_run in planned:
            try:
                execute(planned_run)
            except Interrupted as interrupted:
                if interrupted.exit_code == 128 + signal.SIGINT:
                    raise KeyboardInterrupt from None
                raise SystemExit(interrupted.exit_code) from None
            except Exception as error:
                if not composed.is_sweep:
                    raise
                failure = failure or error
                logger.error("%s: %s", planned_run.directory.path, masked(str(error)))
        if left := unfinished(planned):
            raise UserError(f"{len(left)} of {len(planned)} runs did not finish: {left[0]}") from failure
        completed = [_completed(planned_run.directory) for planned_run in planned]
    return completed if composed.is_sweep else completed[0]


def _completed(directory: RunDirectory) -> CompletedRun:
    result = directory.result()
    assert result is not None  # nothing is unfinished
    return CompletedRun(directory.path.absolute(), result)


def _require_runs_here(composed: Composed) -> None:
    """Raises UserError for what is the command line's to do."""
    if composed.cells[0].cfg.check:
        raise UserError("check=true prints a plan and runs nothing: it is the command's")
    if composed.sweeper is not None:
        raise UserError(f"hydra/sweeper={composed.sweeper} proposes its runs one by one: that is the command's to do")
    if not runs_in_this_process(composed.launcher):
        raise UserError("hydra/launcher: lpc_runner.run makes its runs in this process: the command starts others")


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """What a run sets for its whole process is undone."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
