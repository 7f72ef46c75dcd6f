"""The training loop: batches in order, one update each, what happens between updates, and signals that end it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from lpc_runner.base.ranks import Ranks
from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lpc_runner.data.dataset import Batches
from lpc_runner.store.checkpoints import load_checkpoint, save_checkpoint
from lpc_runner.training.learner import Learner
from lpc_runner.training.traces import Traces

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interrupted(BaseException):
    """Training stopped on a signal, after saving; no Exception, so that no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interrupts:
    """While active, the first signal sets `received`; the same signal again acts as without this class, at once.

    A handler that was there before (a cluster launcher's, which asks for its job again and leaves) is called by
    `leave`, that is after the state was saved.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._waiting: list[tuple[Any, int, FrameType | None]] = []

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            # nohup ignores SIGHUP, a script's background job SIGINT: they stay ignored.
            wanted = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        previous = self._previous.pop(number)
        signal.signal(number, previous)
        logger.info("%s: saving after this update (again: stop at once)", signal.Signals(number).name)
        if callable(previous) and previous is not signal.default_int_handler:
            self._waiting.append((previous, number, frame))

    def turn(self) -> float:
        """An update's work is launched, and the host would wait: seconds for which others of a fleet worked."""
        return 0.0

    def leave(self) -> NoReturn:
        """Saved: raise Interrupted, unless a handler that was there before leaves in its own way."""
        logger.info("saved: the same command goes on from here")
        for handler, number, frame in self._waiting:
            handler(number, frame)
        raise Interrupted(self.received or signal.SIGTERM)  # another rank's signal counts as SIGTERM


@dataclass
class Counters:
    """Where a run stands: updates made, seconds of training (measuring excluded), decoder-gradient evaluations.

    One evaluation is ∇ log p(x, z) of one example. log_offset: bytes of metrics.jsonl that belong to these updates.
    """

    update: int = 0
    train_seconds: float = 0.0
    gradient_evaluations: int = 0
    log_offset: int = 0

    def row(self) -> dict[str, float]:
        """What of it is logged."""
        return {
            "train/gradient_evaluations": float(self.gradient_evaluations),
            "time/train_seconds": self.train_seconds,
            "time/ms_per_update": 1e3 * self.train_seconds / self.update,
        }


@dataclass(frozen=True)
class Outcome:
    """How training ended: `diverged` means that update number `counters.update` would not have been finite."""

    status: Literal["finished", "diverged"]
    counters: Counters
    epoch: float


class Trainer:
    """Settings of the loop.

    num_epochs: passes over the training split. batch_size: examples per update. num_prior_batches: first updates
    whose chains start at z(0) ~ p(z), but for those that go on from a kept z. max_updates: stop after that many, null
    for num_epochs alone. log_every: updates between rows of metrics.jsonl. checkpoint_seconds: time between checkpoints
    (one also at every measurement, at the end, and on a signal). init_from: a run directory to take the first weights
    from. frozen: they stay as they are, and only step size and preconditioner learn from the chains.

    On several ranks batch_size is that of all together; every rank runs this loop, and only rank 0 logs and saves.
    """

    @checked
    def __init__(
        self,
        num_epochs: PositiveInt,
        batch_size: PositiveInt,
        num_prior_batches: NonNegativeInt,
        max_updates: PositiveInt | None,
        log_every: PositiveInt,
        checkpoint_seconds: PositiveFloat,
        init_from: str | None,
        frozen: bool = False,
    ) -> None:
        if frozen and init_from is None:
            raise ValueError("trainer.frozen=true needs trainer.init_from=RUN: a run that trained the weights")
        self.num_epochs, self.batch_size, self.num_prior_batches = num_epochs, batch_size, num_prior_batches
        self.max_updates, self.log_every = max_updates, log_every
        self.checkpoint_seconds, self.init_from, self.frozen = checkpoint_seconds, init_from, frozen

    def total_updates(self, batches_per_epoch: int) -> int:
        """Updates of a whole run."""
        total = self.num_epochs * batches_per_epoch
        return total if self.max_updates is None else min(total, self.max_updates)

    def fit(
        self,
        learner: Learner,
        batches: Batches,
        *,
        seed: int,
        folder: Path,
        counters: Counters,
        tracker: Any,
        progress: Any,
        traces: Traces,
        measure: Callable[[Counters], dict[str, float]],
        measure_every: int,
        member: Interrupts | None = None,
    ) -> Outcome:
        """Train to the end, from where `restore` found the run.

        folder: of the run; its checkpoints/ and traces/ are written. counters: what `restore` returned. tracker: its
        `log` takes rows of numbers, its metric log ends where the counters say. progress: told after every update.
        traces: which chains are kept, of several ranks rank 0's rows. measure: called after every `measure_every`
        epochs (0: never) but the last. member: of a fleet, in the place of signals of this run's own. Raises
        Interrupted on a signal, after saving.
        """
        ranks, checkpoints, kept = learner.ranks, folder / "checkpoints", folder / "traces"
        total = self.total_updates(batches.num_batches)
        with member or Interrupts() as interrupts:
            saved_at = time.monotonic()
            while counters.update < total:
                started = time.perf_counter()
                epoch, position = divmod(counters.update, batches.num_batches)
                batch = batches.batch(epoch, position)
                from_prior = counters.update < self.num_prior_batches
                number = counters.update + 1
                logged = number in (1, total) or number % self.log_every == 0
                # A trace on every rank: what is logged of a chain must not differ between them.
                trace, signalled = traces.watch(number), interrupts.received is not None
                gradients = learner.gradients(
                    batch, seed, counters.update, from_prior, trace, logged, signalled, first_epoch=epoch == 0
                )
                started += interrupts.turn()
                if gradients.verdict():
                    learner.apply(batch, gradients)
                elif not learner.pass_over(gradients):
                    logger.warning("diverged at update %d (epoch %d)", number, epoch + 1)
                    self._save(learner, checkpoints, counters, tracker.metrics)
                    self._leave_if_told(interrupts, ranks)
                    return Outcome("diverged", counters, counters.update / batches.num_batches)
                counters.update += 1
                counters.gradient_evaluations += gradients.num_evaluations
                counters.train_seconds += time.perf_counter() - started

                if ranks.is_main:
                    traces.keep(kept, counters.update, trace)
                done, rest = divmod(counters.update, batches.num_batches)
                values = {"epoch": counters.update / batches.num_batches}
                last = counters.update == total
                if logged:
                    row = gradients.read() | counters.row()
                    tracker.log(counters.update, values["epoch"], row)
                    values |= row
                due = measure_every > 0 and rest == 0 and done % measure_every == 0 and not last
                if due:
                    measured = measure(counters)
                    tracker.log(counters.update, values["epoch"], measured)
                    values |= measured
                progress.update(counters.update, total, values)
                # Also after the last update: measuring may take longer than the time that a signal leaves.
                stop = interrupts.received is not None
                if ranks.size > 1:  # summed over the ranks with the gradients: all must exit after the same update
                    stop = bool(gradients.stop)
                if due or last or stop or time.monotonic() - saved_at > self.checkpoint_seconds:
                    self._save(learner, checkpoints, counters, tracker.metrics)
                    saved_at = time.monotonic()
                if stop:
                    ranks.agree(True)  # torchrun kills the others when one rank exits: wait until rank 0 has saved
                    interrupts.leave()
            self._leave_if_told(interrupts, ranks)  # a signal during the last save
        return Outcome("finished", counters, counters.update / batches.num_batches)

    @staticmethod
    def _leave_if_told(interrupts: Interrupts, ranks: Ranks) -> None:
        """Exit where a signal came, after saving; all ranks do what rank 0 does."""
        if ranks.agree(interrupts.received is not None):
            interrupts.leave()

    @staticmethod
    def restore(learner: Learner, folder: Path) -> Counters:
        """The newest whole checkpoint of the run in `folder`, or rank 0's initial state, on every rank."""
        state = load_checkpoint(folder / "checkpoints") if learner.ranks.is_main else None
        counters = Counters(**state["counters"]) if state else Counters()
        if learner.ranks.size > 1:
            state = learner.ranks.share((state or learner.state_dict()) | {"counters": vars(counters)})
            counters = Counters(**state["counters"])
        if state is not None:
            learner.load_state_dict(state)
        if counters.update:
            logger.info("resuming after update %d", counters.update)
        return counters

    @staticmethod
    def _save(learner: Learner, folder: Path, counters: Counters, metrics: Any) -> None:
        if not learner.ranks.is_main:
            return
        metrics.sync()  # the log must not be shorter than the checkpoint says
        counters.log_offset = metrics.offset
        save_checkpoint(folder, counters.update, {**learner.state_dict(), "counters": vars(counters).copy()})
