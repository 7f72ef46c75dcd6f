"""The command line: compose and check every cell, then let Hydra run them; one clear line and exit code 1 otherwise."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

from lpc_runner.base.errors import UserError, mask_logs
from lpc_runner.base.surroundings import (
    environment,
    error_text,
    main_process,
    one_line_errors,
    settle,
    wait_passively,
    words_for_workers,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

# A first word that is one of these is a command of its own; the `main` of its module takes the words behind it.
COMMANDS = {
    "ls": "lpc_runner.ls",
    "report": "lpc_runner.report",
    "evaluate": "lpc_runner.evaluate",
    "sample": "lpc_runner.sample",
    "fetch": "lpc_runner.fetch",
    "publish": "lpc_runner.publish",
    "dashboard": "lpc_runner.dashboard",
}


def main() -> None:
    """Entry point of `python -m lpc_runner` and of the console script."""
    wait_passively()
    with one_line_errors():
        if os.getcwd() not in sys.path:  # the console script, unlike `python -m`: a user's classes may lie here
            sys.path.append(os.getcwd())
        word = sys.argv[1] if len(sys.argv) > 1 else ""
        if word in COMMANDS:
            del sys.argv[1]
            sys.exit(importlib.import_module(COMMANDS[word]).main())
        if word.isidentifier():
            raise UserError(f"{word}: not of the form key=value, and no command: there are {', '.join(COMMANDS)}")
        _run()


def _run() -> None:
    """Compose and check every cell, then have them run."""
    from lpc_runner.config.compose import compose_command, runs_in_this_process, starts_workers_here
    from lpc_runner.config.words import parse_arguments, refuse_flags

    with _connected() as ranks:
        args = parse_arguments(sys.argv[1:])
        refuse_flags(args)
        looking = args.help or args.hydra_help or args.shell_completion or args.info is not None
        with _first(ranks):
            if not looking:
                composed = compose_command(args)  # all, so that a mistake in the last is found before the first runs
                if composed.method_word is not None:
                    sys.argv.insert(1, composed.method_word)  # for the records
                    args.overrides.insert(0, composed.method_word)  # for --cfg
        if looking or args.cfg:
            _hydra(args)
            return
        cells = composed.cells
        wait_passively(shared=not runs_in_this_process(composed.launcher))
        from lpc_runner.runner.jobs import frozen, proposed_runs, proposing
        from lpc_runner.runner.plan import check_plan, unfinished
        from lpc_runner.runner.screen import print_plan, print_results

        searches = composed.sweeper is not None
        if ranks and searches:
            raise UserError(f"hydra/sweeper={composed.sweeper} proposes runs one at a time, not on several ranks")
        if composed.is_fleet and searches:
            raise UserError(f"hydra/sweeper={composed.sweeper} proposes runs one at a time: there is no fleet of one")
        with _first(ranks):
            planned = check_plan(cells, *([ranks] if ranks else []), proposed=searches)
            if composed.is_fleet:
                from lpc_runner.runner.fleet import require_fleet, who_goes_together

                require_fleet(planned)
        if ranks and not ranks.is_main:
            if not cells[0].cfg.check:
                with frozen(cells, write=False):
                    _hydra(args, composed.single)
            return
        if cells[0].cfg.check:
            print_plan(planned, [*composed.chosen, *([who_goes_together(planned)] if composed.is_fleet else [])])
            if searches:
                print(
                    f"this is a run of the first values; hydra/sweeper={composed.sweeper} proposes its own, one by one"
                )
            return
        sweep = proposing(cells[0].cfg.output_dir) if searches else frozen(cells, write=not composed.is_fleet)
        task = functools.partial(_fleets, planned) if composed.is_fleet else job
        with sweep as folder, _interruptible() if starts_workers_here(composed.launcher) else nullcontext():
            _hydra(args, composed.single, task)
            if folder is not None:
                planned = proposed_runs(folder)
        print_results(planned)
        left = unfinished(planned)
        if left:
            raise UserError(f"{len(left)} of {len(planned)} runs did not finish: {left[0]}")


@contextmanager
def _connected() -> Iterator[Any]:
    """The ranks of this run under torchrun; None without it, so that a mistake need not wait for torch."""
    if "WORLD_SIZE" not in os.environ:
        yield None
        return
    from lpc_runner.base.ranks import Ranks

    ranks = Ranks.connect()
    try:
        yield ranks
    finally:
        ranks.close()


def _first(ranks: Any) -> AbstractContextManager[None]:
    """Rank 0 goes first: it reports mistakes and fetches data for all."""
    return ranks.main_first() if ranks else nullcontext()


def _hydra(args: argparse.Namespace, single: tuple[DictConfig, Any] | None = None, task: Any = None) -> None:
    """Hand over to Hydra, which calls `job` for every cell.

    single: the composition of a single run, or of a fleet, whose job is `task`. Without it Hydra composes what the
    command line says, as `hydra.main` has it, which would parse the words again, by an argparse that takes no flags
    between the overrides.
    """
    from hydra import version
    from hydra._internal.utils import _run_hydra, get_args_parser

    from lpc_runner.config.options import CONF_DIR, CONFIG_NAME
    from lpc_runner.config.sources import variants_read

    full_error = {"HYDRA_FULL_ERROR": "1"}  # else Hydra prints the error itself and exits
    try:
        with environment(full_error), words_for_workers(sys.argv), variants_read():
            if single is not None:
                _run_single(*single, task or job)
            else:
                version.setbase("1.3")
                _run_hydra(args, get_args_parser(), job, str(CONF_DIR), CONFIG_NAME)
    except UserError:
        raise
    except KeyboardInterrupt:  # while jobs run elsewhere, or between two of them
        raise SystemExit(130) from None
    except Exception as error:  # not of a job: a worker was killed, or a logger's level is invalid
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"Hydra or the launcher failed; the same command goes on with what is left ({said})") from error


def _run_single(composition: DictConfig, loader: Any, task: Any) -> None:
    """A job under Hydra, its logging and callbacks included, as `Hydra.run` has it, which would compose twice more."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job
    from hydra.types import HydraContext, RunMode
    from omegaconf import read_write

    from lpc_runner.config.options import CONFIG_NAME

    with read_write(composition.hydra):
        composition.hydra.mode = RunMode.RUN
    callbacks = Callbacks(composition)
    callbacks.on_run_start(config=composition, config_name=CONFIG_NAME)
    context = HydraContext(config_loader=loader, callbacks=callbacks)
    done = run_job(task, composition, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=composition, config_name=CONFIG_NAME, job_return=done)
    _ = done.return_value  # raises what the job raised


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C on a parallel sweep: the command exits at once; joblib would kill its workers first.

    The workers notice (`_watch_main`), save their runs and exit.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started by a script in the background
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        os.write(2, b"lpc_runner: interrupted: the workers save their runs and leave; then the same command goes on\n")
        os._exit(128 + number)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@functools.cache  # one watch per worker, which takes many runs: a second SIGTERM would end it unsaved
def _watch_main() -> threading.Event | None:
    """Send SIGTERM to a parallel sweep's worker, so that it saves its run, once the command that started it is gone.

    Returns an event that is set when this happens; None in the command's own process, in which joblib makes the runs of
    a single worker: there Ctrl-C saves as it does without a launcher.
    """
    parent, died = main_process(), threading.Event()
    if parent is None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the worker gets one signal, the watch's

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        died.set()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return died


def job(cfg: DictConfig) -> float | None:
    """One cell, in this process or in a launcher's worker: a failure is logged and recorded, and the sweep goes on.

    To a sweeper that chooses its runs it returns the optimised metric (`plan.value_of`), and raises what failed.
    """
    wait_passively()  # a cluster's job need not inherit the command's environment
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lpc_runner.base.ranks import Ranks
    from lpc_runner.config.compose import starts_workers_here
    from lpc_runner.runner.jobs import cell_of_job, is_proposed, leased, note_proposed
    from lpc_runner.runner.plan import check_plan, plan, value_of
    from lpc_runner.runner.run import execute
    from lpc_runner.training.trainer import Interrupted

    settle()
    mask_logs()
    hydra_cfg: Any = HydraConfig.get()  # a DictConfig of the structure that Hydra declares
    main_died = _watch_main() if starts_workers_here(hydra_cfg.launcher._target_) else None
    ranks = Ranks.connect()
    if not ranks.is_main:
        logging.getLogger("lpc_runner").setLevel(logging.WARNING)
    try:
        cell = cell_of_job(cfg, hydra_cfg)
        planned = check_plan([cell], proposed=True)[0] if is_proposed() else plan(cell, ranks)
        if is_proposed():
            note_proposed(cell, hydra_cfg.job.num)
        if hydra_cfg.mode == RunMode.MULTIRUN:
            logger.info("run %d: %s", hydra_cfg.job.num + 1, planned.directory.name)
        with leased(planned, hydra_cfg):
            result = execute(planned)
        return value_of(planned, result) if is_proposed() else None
    except Interrupted as interrupted:
        if main_died is not None and main_died.is_set():
            os._exit(interrupted.exit_code)  # no process waits for this worker
        raise SystemExit(interrupted.exit_code) from None
    except Exception as error:
        _log_failure(error, ranks)
        if ranks.size > 1:
            raise SystemExit(1) from None  # the other ranks wait for this one: torchrun ends or restarts all of them
        # Only a sweeper that searches gets the error, and decides how many it accepts. Hydra's basic sweeper would
        # report this failure alone and hide the others, which `main` names.
        if is_proposed():
            raise
        return None


def _fleets(planned: list[Any], cfg: DictConfig) -> None:
    """The one job of hydra/launcher=fleet: every run of the sweep, in this process; failures as in `job`."""
    from lpc_runner.runner.fleet import execute_fleets
    from lpc_runner.training.trainer import Interrupted

    del cfg  # of the first run
    settle()
    mask_logs()
    try:
        execute_fleets(planned, lambda run, error: _log_failure(error, run.ranks))
    except Interrupted as interrupted:
        raise SystemExit(interrupted.exit_code) from None


def _log_failure(error: Exception, ranks: Any) -> None:
    """Why a run did not end; what failed stands in its result.json too."""
    from lpc_runner.store.runs import Occupied

    what = "run failed" if ranks.size == 1 else f"rank {ranks.rank} failed"
    if isinstance(error, Occupied):
        logger.info("%s: left to it, going on with the next", error)
    elif isinstance(error, UserError):
        logger.error("%s", error)
    elif isinstance(error, OSError) and not os.environ.get("LPC_TRACEBACK"):
        logger.error("%s: %s", what, error_text(error))
    else:
        logger.error(what, exc_info=error)
