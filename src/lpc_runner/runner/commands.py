"""What a command tells the workers that a launcher starts for it, through the environment: its words, its process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lpc_runner.base.errors import masked

_WORDS, _PROCESS = "LPC_RUNNER_COMMAND", "LPC_RUNNER_MAIN"


@contextmanager
def words_for_workers(words: list[str]) -> Iterator[None]:
    """The runs within it, and the workers started for them, know the command's words and its process."""
    os.environ |= {_WORDS: json.dumps([masked(word) for word in words]), _PROCESS: str(os.getpid())}
    try:
        yield
    finally:
        for name in (_WORDS, _PROCESS):
            os.environ.pop(name, None)


def command_words() -> list[str]:
    """What the user typed, without secrets: in a worker, the words of the command that had it started."""
    if _WORDS in os.environ:
        return json.loads(os.environ[_WORDS])
    return [masked(word) for word in sys.argv]


def main_process() -> int | None:
    """Process id of the command that had this worker started; None in the command itself."""
    process = int(os.environ.get(_PROCESS, os.getpid()))
    return None if process == os.getpid() else process
