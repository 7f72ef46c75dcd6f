"""Streams, environment and threads of a process, whoever started it: a shell, a notebook, a batch system, a command."""

from __future__ import annotations

import errno
import getpass
import io
import json
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from lpc_runner.base.errors import UserError, masked, one_line

_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # `| head` has ended, a terminal was closed


class _Printed(io.FileIO):
    """Standard output or error whose failure ends no run: what has no reader is dropped; other errors are kept."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        """All of `data`, or the system's refusal is noted and the rest dropped."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # another process has made the pipe non-blocking
                    select.select([], [self], [])
                else:
                    left = left[written:]
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                self.refused = self.refused or error
        return size


def settle() -> None:
    """Make this process's streams, environment and home such that no library fails on them. Safe to repeat.

    Characters that the output encoding lacks are printed as escapes; files have encodings of their own.
    """
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook's backend may not even be installed here
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = _opened(number)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        if number and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _lasting(stream))
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS", "").strip("0") == "":  # a terminal without a size: rich would print nothing at all
        os.environ.pop("COLUMNS", None)
    _name_user()


def _opened(number: int) -> io.TextIOWrapper:
    """The null device in place of a closed stream, whose descriptor the next opened file would otherwise get."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)
    return open(number, "w" if number else "r", encoding="utf-8", closefd=False)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _Printed(stream.fileno(), "wb", closefd=False)
    unbuffered = stream.write_through  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )


def _name_user() -> None:
    """A name and a home for a user id without them, as in a container: torch and W&B ask for both."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A UserError, or a system error, becomes one line on standard error and exit code 1.

    LPC_TRACEBACK=1 shows the traceback too. The streams and the environment are settled before.
    """
    settle()
    try:
        yield
        _require_printed()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        _leave_with(error, str(error))
    except OSError as error:  # a full disk, a folder without permission
        _leave_with(error, error_text(error))


def error_text(error: OSError) -> str:
    """A system error in one line: the file, where there is one, and the system's text."""
    if error.strerror is None:
        return one_line(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _require_printed() -> None:
    """Raise OSError if standard output lost something although it has a reader, as on a full disk."""
    sys.stdout.flush()
    raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer) if hasattr(sys.stdout, "buffer") else None
    if isinstance(raw, _Printed) and raw.refused is not None:
        raise OSError(raw.refused.errno, raw.refused.strerror, "standard output")


def _leave_with(error: Exception, text: str) -> NoReturn:
    if os.environ.get("LPC_TRACEBACK"):
        traceback.print_exception(error)
    sys.stderr.write(f"lpc_runner: {masked(text)}\n")
    sys.stderr.flush()
    raise SystemExit(1) from None


# By which a user sets how threads wait: of GNU's OpenMP, and of LLVM's and Intel's.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def load_average() -> float:
    """Processes that want a core: the mean of the last minute, or the other ones now, whichever is larger."""
    now = 0
    with suppress(OSError):  # only Linux says how many there are now; the mean lags behind a new process
        now = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0]) - 1
    return max(os.getloadavg()[0], float(now))


def is_busy(load: float) -> bool:
    """Whether a load of this size takes half of the machine's cores or more."""
    return load >= (os.cpu_count() or 1) / 2


def wait_passively(shared: bool = False) -> bool:
    """Make torch's threads sleep between parallel loops where other processes want the cores; whether they will sleep.

    shared: other processes will want them, whatever the load is now: those of a launcher or of torchrun. OpenMP reads
    its variables when torch is loaded, so a command calls this before; workers inherit them. After that, or where the
    user has set one of these variables, nothing changes. Costs and gains: docs/benchmarks.md.
    """
    if "torch" in sys.modules or any(name in os.environ for name in VARIABLES):
        return False
    if not (shared or os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" or is_busy(load_average())):
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Within it these environment variables have these values, None: are not set; afterwards what they had before."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# What a command tells the workers that a launcher starts for it.
_WORDS, _PROCESS = "LPC_RUNNER_COMMAND", "LPC_RUNNER_MAIN"


@contextmanager
def words_for_workers(words: list[str]) -> Iterator[None]:
    """The runs within it, and the workers started for them, know the command's words and its process."""
    said = json.dumps([masked(word) for word in words])
    with environment({_WORDS: said, _PROCESS: str(os.getpid())}):
        yield


def command_words() -> list[str]:
    """What the user typed, without secrets: in a worker, the words of the command that had it started."""
    if _WORDS in os.environ:
        return json.loads(os.environ[_WORDS])
    return [masked(word) for word in sys.argv]


def main_process() -> int | None:
    """Process id of the command that had this worker started; None in the command itself."""
    process = int(os.environ.get(_PROCESS, os.getpid()))
    return None if process == os.getpid() else process
