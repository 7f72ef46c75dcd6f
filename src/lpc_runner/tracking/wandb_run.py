"""Weights & Biases beside metrics.jsonl: one run object, its files in the run's folder, never a question."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.schema import NonNegativeInt, checked
from lpc_runner.store.runs import DONE, last_row
from lpc_runner.tracking.tracker import Sink, Status
from lpc_runner.tracking.wandb_service import (
    Place,
    local_folders,
    note_published,
    reachable_mode,
    requested_mode,
    require_online,
    start_service,
    tear_down,
    under_agent,
)

_logger = logging.getLogger("lpc_runner")

SETTINGS = {
    "silent": True,
    "console": "off",  # the terminal belongs to Progress and logging
    "init_timeout": 20,
    "finish_timeout": 60,  # seconds; W&B's default waits for the network without limit
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 2,  # seconds of rows that a kill may cost; W&B's default is 15
}


class WandbTracker(Sink):
    """A W&B run, started by the constructor: `mode=online` raises UserError when it cannot, others warn.

    mode, project, entity, tags come from the YAML file (WANDB_MODE, when set, overrides `mode`), the rest
    at run time: `run_id` stays the same when a run is resumed, `folder` is the run's directory, `resume_step`
    the update that training continues from (0: a new run). The attributes `mode` and `folder` (of the W&B
    files) tell the outcome: "disabled" and None when nothing is recorded.
    """

    settings: ClassVar[dict[str, Any]] = SETTINGS
    keeps_service: ClassVar[bool] = False  # whether W&B's service process may outlive a run that ended well

    @staticmethod
    def require(mode: str, **_: Any) -> None:
        """Raise UserError (one line) for a WANDB_MODE unknown to W&B, or if `online` finds no key or no server."""
        if requested_mode(mode) == "online":
            asked = "WANDB_MODE=online" if os.environ.get("WANDB_MODE") else "tracker.mode=online"
            require_online(f"{asked} (offline or auto go on without)")

    @staticmethod
    def wants_done_runs() -> bool:
        """In a sweep of W&B's: its agent has chosen values that an earlier run has had, and waits for their numbers."""
        return under_agent()

    @staticmethod
    def refuses_sweeps() -> str:
        """Under an agent, which has given an id to one run."""
        return "a W&B agent gives one run's id, this command makes several: no sweep, or tracker=none" * under_agent()

    @staticmethod
    def refuses_fleets(mode: str, **_: Any) -> str:
        """W&B itself could (reinit="create_new"); but its folders are the environment's, its service the process's."""
        if requested_mode(mode) == "disabled":
            return ""
        return "W&B records one run of a process at a time: tracker=none, and `lpc-runner publish` afterwards"

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
        self._directory, self._studies = Path(folder), [*filter(None, [group]), *more_tags]
        self.folder: Path | None = None
        self.mode = requested_mode(mode)
        if self.mode == "disabled":
            return
        what = {
            "name": name,
            "group": group,
            "config": config,
            "tags": list(dict.fromkeys([*tags, *more_tags])),
        }
        if not under_agent():  # which has chosen these three itself
            what |= {"id": run_id, "resume": "allow", "project": project, "entity": entity}
        self._repeated = self._logged_before()
        with ExitStack() as stack:
            stack.enter_context(local_folders(folder))
            self._start(what)
            if self._run is not None:
                self._folders = stack.pop_all()
                if resume_step:
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
        """Save what is left and end the run; waits up to 60 s for the network, and says so if that was too short.

        What W&B lacks then, `lpc-runner publish` adds when the run is finished.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        suspect = True
        try:
            run.summary["status"] = status
            run.finish(exit_code=0 if status in DONE else 1)
            suspect = self.mode == "online" and not self.keeps_service
        except TimeoutError:
            self._say_unfinished(run.settings.finish_timeout)
        finally:
            if suspect:  # a dead service or one that waits for a network would trip or block W&B's exit hook
                tear_down()
            self._folders.close()

    def _say_unfinished(self, seconds: float) -> None:
        _logger.warning(
            "W&B did not take everything within %.0f s (metrics.jsonl is complete): once the run is finished, "
            "`lpc-runner publish %s` uploads the rest",
            seconds,
            self._directory,
        )

    def _logged_before(self) -> int:
        """The first update that no session of this run before this one logged, 0 where W&B has no session of it.

        Offline it is unknown which rows W&B has, and a step that W&B gets twice becomes a second row of another number.
        """
        has_sessions = any((self._directory / "wandb").glob("*run-*"))
        last = last_row(self._directory / "metrics.jsonl").get("update")
        return last + 1 if has_sessions and isinstance(last, int) else 0

    def _takes(self, update: int) -> bool:
        # A run killed after its last checkpoint repeats updates whose rows W&B already has, bit for bit.
        return self._run is not None and update >= self._first

    def _start(self, what: dict[str, Any], reason: str = "") -> None:
        asked = self.mode
        try:
            start_service()
            if asked in ("auto", "online"):
                self.mode, reason = reachable_mode(asked)
            if self.mode != "disabled":
                self._open(what)
        except Exception as error:  # errors of pydantic, asyncio and the system come through W&B
            reason = one_line(error)
            if asked == "offline":
                self.mode = "disabled"
                _logger.warning("W&B is off for this run (metrics.jsonl goes on): %s", reason)
                return
            tear_down()
            if asked == "online":
                raise UserError(f"tracker.mode=online: {reason} (or tracker.mode=auto, offline)") from error
            self.mode = os.environ["WANDB_MODE"] = "offline"  # the jobs that follow need not wait for the network
            self._start(what, reason)
            return
        if self.mode == "offline" and self.folder is not None:
            why = f" ({reason})" if reason else ""
            # All sessions of this run: W&B keeps one folder for each, and its command uploads those it is given.
            sessions = f"{shlex.quote(str(self.folder.parent))}/offline-run-*"
            _logger.info("W&B offline%s: upload with `wandb sync %s`", why, sessions)
        elif self.mode == "online":
            # The id is an agent's choice in a sweep: without this note, publishing the run would double it.
            place = Place(self._run.settings.base_url, self._run.entity, self._run.project)
            note_published(self._directory, place, self._run.id, self._studies, complete=False)
            _logger.info("W&B: %s", self._run.url)

    def _open(self, what: dict[str, Any]) -> None:
        import wandb

        what = {**what, "mode": self.mode}
        settings = wandb.Settings(**self.settings)
        self._run = wandb.init(dir=os.environ["WANDB_DIR"], reinit="create_new", settings=settings, **what)
        self._first = self._run.starting_step  # not `step`: the service may not have heard yet where to go on
        if self.mode == "offline":
            self._first = max(self._first, self._repeated)
        self.folder = Path(self._run.dir).parent
