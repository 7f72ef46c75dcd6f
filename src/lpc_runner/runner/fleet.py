"""A fleet: several runs of a sweep trained together by one process, so that small steps fill a GPU (on a CPU, in turn).

Each run has a thread and a CUDA stream of its own. One thread at a time is at work, in a fixed order: it gives the
others their turn where an update's work is launched and it would wait for the device. So no run sees a setting of the
process that another has made for a while, and each makes the numbers that it makes alone.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from ctypes import c_ulong, py_object, pythonapi
from types import FrameType

import torch

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import declared
from lpc_runner.config.options import as_dict
from lpc_runner.inference.engine import Compiled
from lpc_runner.runner.pace import total_updates
from lpc_runner.runner.plan import Planned, plan
from lpc_runner.runner.run import execute
from lpc_runner.tracking.progress import Progress
from lpc_runner.tracking.tracker import Sink
from lpc_runner.training.trainer import Interrupted, Interrupts

logger = logging.getLogger(__name__)
Failed = Callable[[Planned, Exception], None]


def require_fleet(planned: Sequence[Planned]) -> None:
    """Raises UserError (one line) for runs that one process cannot train together."""
    if all(run.cell.cfg.runs_per_gpu == 1 for run in planned):
        raise UserError("hydra/launcher=fleet trains runs_per_gpu runs together, which is 1: runs_per_gpu=4")
    for run in planned:
        if run.ranks.size > 1:
            raise UserError("hydra/launcher=fleet is one process on one GPU: not under torchrun")
        if isinstance(run.experiment.engine, Compiled):  # torch's compiled forms are those of one run of a process
            raise UserError("hydra/launcher=fleet: engine=compiled is for one run at a time; engine=auto is not")
        tracker = run.experiment.tracker
        if reason := declared(tracker.func, Sink, "refuses_fleets")(**tracker.keywords):
            raise UserError(f"hydra/launcher=fleet: {reason}")


def execute_fleets(planned: Sequence[Planned], failed: Failed) -> None:
    """Execute every run, runs_per_gpu of one kind at a time; `failed` is told of what raised, and the rest goes on.

    Raises UserError before any of them (`require_fleet`), and Interrupted on a signal, after all under way have saved.
    """
    require_fleet(planned)
    for members in fleets_of(planned):
        if len(members) > 1:
            Fleet(members, failed).run()
            continue
        try:
            execute(plan(members[0].cell))
        except Exception as error:
            failed(members[0], error)


def fleets_of(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Runs of equal model, dataset, batch size and T, runs_per_gpu at most; what is done, alone.

    Equal T keeps their updates equally long. Device, threads and determinism are settings of the whole process.
    """
    alike = defaultdict(list)
    for run in planned:
        cfg, made = as_dict(run.cell.cfg, resolve=True), run.experiment
        facts = [cfg[key] for key in ("model", "dataset", "deterministic", "num_threads", "runs_per_gpu")]
        facts += [made.trainer.batch_size, made.sampler.num_steps, str(made.device), run.directory.state() == "done"]
        alike[json.dumps(facts, sort_keys=True, default=str)].append(run)
    for runs in alike.values():
        size = 1 if runs[0].directory.state() == "done" else runs[0].cell.cfg.runs_per_gpu
        yield from (runs[first : first + size] for first in range(0, len(runs), size))


def who_goes_together(planned: Sequence[Planned]) -> str:
    """The fleets of what is not done, in words."""
    sizes = [len(runs) for runs in fleets_of(planned) if runs[0].directory.state() != "done"]
    return f"hydra/launcher=fleet: runs that train together: {', '.join(map(str, sizes)) or 'none is left'}"


class Fleet(Interrupts):
    """Runs of one kind: the caller's thread starts theirs, receives signals for all of them and waits."""

    def __init__(self, planned: Sequence[Planned], failed: Failed) -> None:
        super().__init__()
        self.failed, self.abandoned = failed, False
        self.members = [Member(self, run) for run in planned]
        self.order, self.turns = deque(self.members), threading.Condition()
        self.total = sum(member.left for member in self.members)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        for member in self.members:
            member.received = self.received

    def run(self) -> None:
        """Until every member has left. Raises Interrupted on a signal, after all have saved."""
        told, started = 0, lambda member: member.ident is not None
        with self, Progress(unit=f"update of {len(self.members)} runs") as progress, _lines_named():
            try:
                for member in self.members:
                    member.start()
                # No join: in Python 3.11, left by an exception, it takes a thread that works on for one that ended.
                while self.order:
                    if (made := self.total - sum(member.left for member in self.members)) != told:
                        progress.update(made, self.total, {})
                        told = made
                    time.sleep(0.05)
            except BaseException:  # the signal again: at once
                with self.turns:
                    self.abandoned = True
                    self.turns.notify_all()
                time.sleep(0.2)
                for member in filter(started, tuple(self.order)):  # it measures, and asks for no turn
                    pythonapi.PyThreadState_SetAsyncExc(c_ulong(member.ident or 0), py_object(SystemExit))
                raise
            finally:
                for member in filter(started, self.members):
                    member.join()
        for member in self.members:
            if member.ended_by is not None:
                raise member.ended_by
        if self.received is not None:
            self.leave()

    def wait(self, member: Member, passing: bool = False) -> None:
        """For this member's turn; passing: it is, and the next one's comes first."""
        with self.turns:
            if passing:
                self.order.rotate(-1)
                self.turns.notify_all()
            self.turns.wait_for(lambda: self.order[0] is member or self.abandoned)
        if self.abandoned:
            raise SystemExit


class Member(Interrupts, threading.Thread):
    """One run of a fleet; to its trainer, the signals that the fleet receives and the turns of the others."""

    def __init__(self, fleet: Fleet, planned: Planned) -> None:
        Interrupts.__init__(self)
        threading.Thread.__init__(self, name=planned.directory.name, daemon=True)
        self.fleet, self.planned = fleet, planned
        self.ended_by: BaseException | None = None
        saved = planned.directory.checkpoint_files()
        self.left = total_updates(planned) - (saved[0].update if saved else 0)

    def turn(self) -> float:
        """Launched: the others work while the device does; returns their seconds."""
        started = time.perf_counter()
        self.left -= 1
        self.fleet.wait(self, passing=True)
        return time.perf_counter() - started

    def run(self) -> None:
        """In its thread."""
        fleet, device = self.fleet, self.planned.experiment.device
        try:
            fleet.wait(self)
            if self.received is None:
                on_cuda = device.type == "cuda"
                with torch.cuda.stream(torch.cuda.Stream(device)) if on_cuda else nullcontext():
                    execute(plan(self.planned.cell), self)  # planned anew: what lies on the device goes with the thread
        except Interrupted:
            pass  # the fleet leaves
        except Exception as error:
            fleet.failed(self.planned, error)
            for raised in filter(None, (error, error.__cause__, error.__context__)):
                traceback.clear_frames(raised.__traceback__)  # which hold what lies on the device
        except BaseException as error:
            self.ended_by = None if fleet.abandoned else error
        finally:
            self.left = 0
            with fleet.turns:
                fleet.order.remove(self)
                fleet.turns.notify_all()


@contextmanager
def _lines_named() -> Iterator[None]:
    """Lines of the log begin with the run that they are of."""
    make = logging.getLogRecordFactory()

    def named(*given, **more) -> logging.LogRecord:
        record = make(*given, **more)
        thread = threading.current_thread()
        if isinstance(thread, Member):
            record.msg, record.args = f"{thread.name}: {record.getMessage()}", ()
        return record

    logging.setLogRecordFactory(named)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
