"""Signals become a flag: the update in progress ends, the state is saved, the process leaves with 128 + signal."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interrupted(BaseException):
    """Training stopped on a signal, after saving; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interrupts:
    """While active, the first signal sets `received`; the same one again acts at once, as it did before.

    A handler that was there before (a cluster launcher's, which asks for its job again and leaves) is called by
    `leave`, that is after the state was saved.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._waiting: list[tuple[Any, int, FrameType | None]] = []

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            # nohup has SIGHUP ignored, a script's background SIGINT: then neither is a reason to stop.
            wanted = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        previous = self._previous.pop(number)
        signal.signal(number, previous)
        logger.info("%s: saving after this update (again: stop at once)", signal.Signals(number).name)
        if callable(previous) and previous is not signal.default_int_handler:
            self._waiting.append((previous, number, frame))

    def leave(self) -> NoReturn:
        """Saved: raise Interrupted, unless a handler that was there before leaves in its own way."""
        logger.info("saved: the same command goes on from here")
        for handler, number, frame in self._waiting:
            handler(number, frame)
        raise Interrupted(self.received or signal.SIGTERM)  # another rank's signal counts as SIGTERM

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
