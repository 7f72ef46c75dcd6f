"""Weights & Biases beside metrics.jsonl: one run object, its files in the run's folder, never a question."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lpc_runner.errors import UserError
from lpc_runner.schema import NonNegativeInt, checked
from lpc_runner.tracking.tracker import Status

_logger = logging.getLogger("lpc_runner")

_OLD_NAMES = {"dryrun": "offline", "run": "online"}
_MODES = ("online", "offline", "disabled")
_TEARDOWN_SECONDS = 5
_SETTINGS = {
    "silent": True,
    "console": "off",  # the terminal belongs to Progress and logging
    "init_timeout": 20,
    "finish_timeout": 60,  # seconds; W&B's default waits for the network for ever
    "x_transaction_log_flush_interval": 2,  # seconds of rows that a kill may cost; W&B's default is 15
}


class WandbTracker:
    """A W&B run, started by the constructor: `mode=online` raises UserError when it cannot, others warn.

    mode, project, entity, tags come from the YAML file (WANDB_MODE, when set, goes before `mode`), the rest
    at run time: `run_id` stays the same when a run is resumed, `folder` is the run's directory, `resume_step`
    the update that training continues from (0: a new run). The attributes `mode` and `folder` (of the W&B
    files) tell what came of it: "disabled" and None when nothing is recorded.
    """

    @checked
    def __init__(
        self,
        mode: Literal["auto", "online", "offline", "disabled"],
        project: str,
        entity: str | None,
        tags: list[str],
        *,
        run_id: str,
        name: str,
        group: str | None,
        config: dict[str, Any],
        folder: Path,
        resume_step: NonNegativeInt = 0,
        more_tags: tuple[str, ...] = (),
    ) -> None:
        self._run: Any = None
        self._environment: dict[str, str | None] = {}
        self.folder: Path | None = None
        self.mode = _requested(mode)
        if self.mode == "disabled":
            return
        what = {
            "name": name,
            "group": group,
            "config": config,
            "tags": list(dict.fromkeys([*tags, *more_tags])),
        }
        if "WANDB_SWEEP_ID" not in os.environ:  # an agent has chosen these three itself
            what |= {"id": run_id, "resume": "allow", "project": project, "entity": entity}
        self._redirect(folder)
        try:
            self._start(what)
        except BaseException:
            self._restore()
            raise
        if self._run is None:
            self._restore()
        elif resume_step:
            self._run.summary["resumed_at"] = resume_step

    def log(self, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """One row at W&B step `update`; raises whatever wandb raises: `Tracker` shields the training loop."""
        if self._takes(update):
            self._run.log({"epoch": epoch, **values}, step=update)

    def images(self, update: int, name: str, path: Path) -> None:
        """The picture file at `path`, in the same row as the values of that update."""
        if self._takes(update):
            import wandb

            self._run.log({name: wandb.Image(str(path))}, step=update)

    def summary(self, values: Mapping[str, float]) -> None:
        """Numbers that describe the whole run, for tables and scatter plots."""
        if self._run is not None:
            self._run.summary.update(dict(values))

    def close(self, status: Status) -> None:
        """Save what is left and end the run; waits up to 60 s for the network."""
        if self._run is None:
            return
        run, self._run = self._run, None
        suspect = True
        try:
            run.summary["status"] = status
            run.finish(exit_code=0 if status in ("finished", "diverged") else 1)
            suspect = self.mode == "online"
        finally:
            if suspect:  # a dead service or one that waits for a network would trip or block W&B's exit hook
                _tear_down()
            self._restore()

    def _takes(self, update: int) -> bool:
        # A run killed after its last checkpoint repeats updates whose rows W&B already has, bit for bit.
        return self._run is not None and update >= self._first

    def _start(self, what: dict[str, Any]) -> None:
        import wandb

        asked, reason = self.mode, ""
        try:
            wandb.setup(settings=wandb.Settings(silent=True))
            if asked in ("auto", "online"):
                self.mode, reason = _reachable(asked)
            self._open(what)
        except Exception as error:  # pydantic's, asyncio's, the system's: W&B lets all of them through
            reason = _one_line(error)
            if asked == "online":
                _tear_down()
                raise UserError(f"tracker.mode=online: {reason} (or tracker.mode=auto, offline)") from error
            if asked != "auto":
                self._give_up(reason)
                return
            self._fall_back(what)
        if self.mode == "offline":
            why = f" ({reason})" if reason else ""
            _logger.info("W&B offline%s: upload with `wandb sync %s`", why, self.folder)
        elif self.mode == "online":
            _logger.info("W&B: %s", self._run.url)

    def _fall_back(self, what: dict[str, Any]) -> None:
        import wandb

        _tear_down()
        self.mode = os.environ["WANDB_MODE"] = "offline"  # the jobs that follow need not wait for the network
        try:
            wandb.setup(settings=wandb.Settings(silent=True))
            self._open(what)
        except Exception as error:
            self._give_up(_one_line(error))

    def _give_up(self, reason: str) -> None:
        self.mode = "disabled"
        _logger.warning("W&B is off for this run (metrics.jsonl goes on): %s", reason)

    def _open(self, what: dict[str, Any]) -> None:
        import wandb

        if self.mode == "disabled":
            return
        self._run = wandb.init(
            mode=self.mode,
            dir=os.environ["WANDB_DIR"],
            reinit="create_new",
            settings=wandb.Settings(**_SETTINGS),
            **what,
        )
        self._first = self._run.step
        self.folder = Path(self._run.dir).parent

    def _redirect(self, folder: Path) -> None:
        root = Path(folder).absolute()
        places = {
            "WANDB_DIR": root,  # W&B itself adds /wandb
            "WANDB_DATA_DIR": root / "wandb" / "data",
            "WANDB_CACHE_DIR": root / "wandb" / "cache",
        }
        for name, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            self._environment[name] = os.environ.get(name)
            os.environ[name] = str(place)

    def _restore(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment = {}


def _requested(mode: str) -> str:
    variable = os.environ.get("WANDB_MODE")
    if not variable:
        os.environ.pop("WANDB_MODE", None)  # W&B refuses to start when it is set to nothing
        return mode
    chosen = _OLD_NAMES.get(variable, variable)
    if chosen not in _MODES:
        raise UserError(f"WANDB_MODE must be one of {', '.join(_MODES)}, got {variable!r}")
    return chosen


def _reachable(asked: str) -> tuple[str, str]:
    """What `auto` or `online` comes to, and why not online; CommError or UsageError without a server."""
    import wandb

    standing = wandb.setup().settings.mode  # `wandb offline` and `wandb disabled` leave this in W&B's settings file
    if asked == "auto" and standing in ("offline", "disabled"):
        return standing, "as W&B's settings file says"
    if wandb.login(prompt=False):
        return "online", ""
    if asked == "auto":
        return "offline", "no API key found"
    raise wandb.errors.UsageError("no W&B API key found: run `wandb login` or set WANDB_API_KEY")


def _tear_down() -> None:
    """End W&B's service process, waiting 5 s at most: what does not end then goes with this process."""
    import wandb

    def call() -> None:
        try:
            wandb.teardown()
        except (Exception, SystemExit) as error:  # W&B leaves through sys.exit when its service ended badly
            _logger.debug("W&B teardown: %s", _one_line(error))

    # A few teardowns in a hundred never return (wandb 0.31) while a request to an absent network is under
    # way. W&B's exit hook would wait in the same place; teardown removes that hook before it waits.
    thread = threading.Thread(target=call, name="wandb-teardown", daemon=True)
    thread.start()
    thread.join(_TEARDOWN_SECONDS)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    key = os.environ.get("WANDB_API_KEY")
    return (text.replace(key, "***") if key else text)[:300]
