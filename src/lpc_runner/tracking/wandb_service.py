"""W&B's client and its service process: which mode applies, logging in and ending it."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.files import write_atomically
from lpc_runner.base.surroundings import environment

_logger = logging.getLogger("lpc_runner")

_MODES = ("online", "offline", "disabled")
_OLD_NAMES = {"dryrun": "offline", "run": "online"}
_TEARDOWN_SECONDS = 5


def requested_mode(mode: str) -> str:
    """WANDB_MODE where it is set, else `mode`. Raises UserError for a value that W&B does not know."""
    variable = os.environ.get("WANDB_MODE")
    if not variable:
        os.environ.pop("WANDB_MODE", None)  # W&B refuses to start when it is set to nothing
        return mode
    chosen = _OLD_NAMES.get(variable, variable)
    if chosen not in _MODES:
        raise UserError(f"WANDB_MODE must be one of {', '.join(_MODES)}, got {variable!r}")
    return chosen


def under_agent() -> bool:
    """Whether `wandb agent` has started this process, for one run of a sweep whose id it has chosen."""
    return "WANDB_SWEEP_ID" in os.environ


def start_service() -> None:
    """Start W&B's client without output on the terminal. Raises whatever wandb raises."""
    import wandb
    from wandb.analytics.opentelemetry import opentelemetry_proxy

    opentelemetry_proxy.disable()  # W&B's telemetry of itself would hold up the exit when a server hangs
    wandb.setup(settings=wandb.Settings(silent=True))


def reachable_mode(asked: str) -> tuple[str, str]:
    """What `auto` or `online` comes to, and why not online; CommError or UsageError without a server."""
    import wandb.errors

    standing = wandb.setup().settings.mode  # `wandb offline` and `wandb disabled` leave this in W&B's settings file
    if standing in ("offline", "disabled"):
        if asked == "online":
            raise wandb.errors.UsageError(f"W&B's settings file says {standing}: `wandb online` changes it")
        return standing, "as W&B's settings file says"
    if wandb.login(prompt=False):
        return "online", ""
    if asked == "auto":
        return "offline", "no API key found"
    raise wandb.errors.UsageError("no W&B API key found: run `wandb login` or set WANDB_API_KEY")


def tear_down() -> None:
    """End W&B's service process, waiting 5 s at most: what does not end then goes with this process."""
    import wandb

    def call() -> None:
        try:
            wandb.teardown()
        except (Exception, SystemExit) as error:  # W&B leaves through sys.exit when its service ended badly
            _logger.debug("W&B teardown: %s", one_line(error))

    # A few teardowns in a hundred never return (wandb 0.31) while a request to an absent network is under
    # way. W&B's exit hook would wait in the same place; teardown removes that hook before it waits.
    thread = threading.Thread(target=call, name="wandb-teardown", daemon=True)
    thread.start()
    thread.join(_TEARDOWN_SECONDS)


@contextmanager
def local_folders(folder: Path) -> Iterator[None]:
    """Within it, W&B's folders in the environment lie below `folder`."""
    root = Path(folder).absolute()
    # W&B itself adds /wandb to the first.
    places = {"WANDB_DIR": root, "WANDB_DATA_DIR": root / "wandb/data", "WANDB_CACHE_DIR": root / "wandb/cache"}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    with environment({name: str(place) for name, place in places.items()}):
        yield


@contextmanager
def online(purpose: str) -> Iterator[None]:
    """W&B's service for `purpose`, logged in, ended on the way out; what it writes itself goes to a temporary folder.

    Raises UserError (one line) without a key or a server, and for what W&B raises within.
    """
    mode = requested_mode("online")
    if mode != "online":
        raise UserError(f"{purpose} needs W&B online, but WANDB_MODE={mode}: unset it")
    with TemporaryDirectory(prefix="lpc_runner") as folder, local_folders(Path(folder)):
        started = False
        try:
            start_service()
            reachable_mode("online")
            started = True
            yield
        except Exception as error:
            if started and not type(error).__module__.startswith("wandb"):
                raise  # starting W&B raises errors of many kinds: pydantic's, the system's, W&B's
            raise UserError(f"{purpose}: {one_line(error)}") from error
        finally:
            tear_down()


@functools.cache  # a sweep asks for every cell
def require_online(purpose: str) -> None:
    """Raise UserError (one line) without a key or a server for `purpose`."""
    with online(purpose):
        pass


_PUBLISHED = "published.json"


@dataclass(frozen=True)
class Place:
    """A project on a W&B server."""

    server: str
    entity: str
    project: str

    @property
    def key(self) -> str:
        """Its key in published.json."""
        return f"{self.server.rstrip('/')}/{self.entity}/{self.project}"


def read_mapping(path: Path, afterwards: str) -> dict[str, Any]:
    """A JSON mapping, {} where there is none. Raises UserError if it is damaged; afterwards: what deleting it means."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError):
        raise UserError(f"{path} is damaged; delete it: {afterwards}") from None


def read_published(folder: Path) -> dict[str, dict[str, Any]]:
    """By place: `run_id` there, the `studies` that its group and tags name, `complete`. UserError if damaged."""
    return read_mapping(Path(folder) / _PUBLISHED, "W&B is asked what it holds before anything is sent")


def note_published(folder: Path, place: Place, run_id: str, studies: Sequence[str], *, complete: bool) -> None:
    """Note that `place` has this run under `run_id`; complete: the server says it holds everything. OSError."""
    marks = read_published(folder) | {place.key: {"run_id": run_id, "studies": list(studies), "complete": complete}}
    write_atomically(Path(folder) / _PUBLISHED, json.dumps(marks, indent=2) + "\n")
