"""Finished runs replayed into W&B from their folders, once each: metrics.jsonl is the log, W&B a copy of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.files import sha256_of
from lpc_runner.store.environment import settings_of
from lpc_runner.store.log import Row, final_numbers, rows_of
from lpc_runner.store.runs import DONE, RunDirectory, entries_of, follow
from lpc_runner.tracking.tracker import facts_of_run
from lpc_runner.tracking.wandb_run import SETTINGS, WandbTracker
from lpc_runner.tracking.wandb_service import (
    Place,
    note_published,
    online,
    read_published,
    tear_down,
    under_agent,
)

_PATIENCE = 15  # seconds until a server must show what it has taken
_PAUSE = 1.0


class _Replay(WandbTracker):
    """A W&B run that is filled from a folder; system metrics of this machine would not be the training's."""

    settings: ClassVar[dict[str, Any]] = SETTINGS | {"finish_timeout": 600, "x_disable_stats": True}
    keeps_service: ClassVar[bool] = True

    def row(self, update: int, row: Row) -> int:
        """Log one row, its pictures in it; of a row that W&B has, the pictures alone. Returns rows logged, 0 or 1."""
        import wandb

        if not self._takes(update):
            # Pictures are uploaded apart from their row, which may have arrived without them.
            for name, path in row.pictures.items():
                wandb.Image(str(path)).bind_to_run(self._run, name, update)
            return 0
        epoch = {} if row.epoch is None else {"epoch": row.epoch}
        images = {name: wandb.Image(str(path)) for name, path in row.pictures.items()}
        self._run.log({}, step=update)  # wandb names pictures by the step that it is at before it takes the row
        # In one call: a kill between two would leave part of a row, which no second try could complete.
        self._run.log({**epoch, **row.values, **images}, step=update, commit=True)
        return 1

    def abandon(self) -> None:
        """Stop without waiting for uploads, which the next try makes up for."""
        self._run = None
        tear_down()
        self._folders.close()

    def _say_unfinished(self, seconds: float) -> None:
        raise UserError(f"W&B did not take all of {self._directory.name} within {seconds:.0f} s: run this again")


def publish(study: Path, entity: str | None = None, project: str | None = None) -> Iterator[tuple[str, str]]:
    """Replay what W&B lacks of a study's finished runs; yields a name and what was done, run by run.

    study: outputs/<study> or one run's folder; entity, project: default to what each run's config.yaml says. Raises
    UserError (one line) without key or network.
    """
    runs = runs_of(study)
    if under_agent():
        raise UserError("publishing inside a W&B sweep would take its runs' ids: unset WANDB_SWEEP_ID")
    with online("publishing"):
        for run in runs:
            try:
                with run.locked():
                    done = _publish_run(run, entity, project)
            except OSError as error:
                raise UserError(f"publishing {run.name}: {one_line(error)}") from error
            yield run.name, done


def runs_of(study: Path) -> list[RunDirectory]:
    """The runs that outputs/<study> links to, or the one that `study` is. Raises UserError if there is none."""
    folder = follow(Path(study))
    entries = entries_of(folder) if folder.is_dir() else []
    runs = [RunDirectory.open(path) for path in entries if (follow(path) / "run.json").is_file()]
    if not runs:
        raise UserError(f"{study} holds no runs: give outputs/<study> or outputs/<study>/<run>")
    return runs


def place_of(
    tracker: dict[str, Any], entity: str | None, project: str | None, server: str, default: str | None
) -> Place:
    """Where a run belongs: what was asked for, else what its config.yaml says, else the account's default entity.

    Raises UserError where none of them names a project or an entity.
    """
    project = project or tracker.get("project")
    if project is None:
        raise UserError("a run with tracker=none names no W&B project: give one with --project")
    entity = entity or tracker.get("entity") or default
    if entity is None:
        raise UserError("the W&B account has no default entity: give one with --entity")
    return Place(server, entity, project)


def _publish_run(run: RunDirectory, entity: str | None, project: str | None) -> str:
    import wandb

    result = run.result()
    if result is None or result["status"] not in DONE:
        return f"left out: {result['status'] if result else 'not finished'}"
    api = wandb.Api()
    config = settings_of(run)
    place = place_of(config["tracker"], entity, project, api.settings["base_url"], api.default_entity)
    told = facts_of_run(run, config)
    studies = run.studies()
    mark = read_published(run.path).get(place.key, {"run_id": told["run_id"], "studies": [], "complete": False})
    is_new = bool(set(studies) - set(mark["studies"]))
    if mark["complete"] and not is_new:
        return "already there"
    rows = rows_of(run)
    path = f"{place.entity}/{place.project}/{mark['run_id']}"
    done = "already there"
    if is_new or not _is_complete(path, rows, result, patience=0):
        tags = list(config["tracker"].get("tags") or [])
        sink = _Replay("online", place.project, place.entity, tags, **told | {"run_id": mark["run_id"]})
        try:
            sent = sum(sink.row(update, row) for update, row in rows.items())
            sink.summary(final_numbers(result))
            sink.close(result["status"])
        except BaseException:
            sink.abandon()
            raise
        if not _is_complete(path, rows, result, patience=_PATIENCE):
            raise UserError(f"W&B does not show all of {run.name} yet: run this again, nothing is sent twice")
        pictures = sum(len(row.pictures) for row in rows.values())
        done = f"published: {sent} of {len(rows)} rows were missing, {pictures} pictures"
    note_published(run.path, place, mark["run_id"], studies, complete=True)
    return done


def _is_complete(path: str, rows: dict[int, Row], result: dict[str, Any], patience: float) -> bool:
    """Whether the server shows the last row, the ending and every picture, asked anew for `patience` seconds."""
    import wandb.errors

    wanted = {
        f"media/images/{name}_{update}_{sha256_of(picture)[:20]}.png"
        for update, row in rows.items()
        for name, picture in row.pictures.items()
    }
    deadline = time.monotonic() + patience
    while True:
        with suppress(wandb.errors.CommError, ValueError):
            shown = wandb.Api().run(path)
            ended = shown.summary.get("status") == result["status"] and shown.lastHistoryStep >= max(rows, default=-1)
            if ended and (not wanted or wanted <= {file.name for file in shown.files(list(wanted))}):
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE)
