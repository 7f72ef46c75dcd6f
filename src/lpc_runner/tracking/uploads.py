"""Finished runs replayed into W&B from their folders, once each: metrics.jsonl is the log, W&B a copy of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import sha256_of
from lpc_runner.store.log import Row, final_numbers, rows_of
from lpc_runner.store.runs import DONE, RunDirectory, follow
from lpc_runner.tracking.wandb_run import SETTINGS, WandbTracker
from lpc_runner.tracking.wandb_service import (
    destination,
    note_published,
    one_line,
    online,
    read_published,
    tear_down,
    under_agent,
)

_PATIENCE = 15  # seconds until a server must show what it has taken
_PAUSE = 1.0


@dataclass(frozen=True)
class Place:
    """A project on a W&B server."""

    server: str
    entity: str
    project: str

    @property
    def key(self) -> str:
        return destination(self.server, self.entity, self.project)


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
        self._folders.restore()

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
    study = Path(study)
    if (follow(study) / "run.json").is_file():
        return [RunDirectory.open(study)]
    entries = sorted(study.glob("[!.]*"))
    folders = [path for path in entries if (follow(path) / "run.json").is_file()]
    if not folders:
        raise UserError(f"{study} holds no runs: give outputs/<study> or outputs/<study>/<run>")
    return [RunDirectory.open(path) for path in folders]


def picture_file(name: str, update: int, path: Path) -> str:
    """Where W&B keeps the picture that a row at `update` names: by the SHA-256 of its content."""
    return f"media/images/{name}_{update}_{sha256_of(path)[:20]}.png"


def settings_of(run: RunDirectory) -> dict[str, Any]:
    """config.yaml of a run. Raises UserError if it is missing or damaged."""
    import yaml

    path = run.path / "config.yaml"
    try:
        content = yaml.safe_load(path.read_bytes())
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is missing or damaged; without it, the run's own command writes it anew")
    return content


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
    description = run.description()
    mark = read_published(run.path).get(place.key)
    new_studies = set(description["studies"]) - set(mark["studies"] if mark else ())
    if mark is not None and mark["complete"] and not new_studies:
        return "already there"
    run_id = mark["run_id"] if mark else run.name[-64:]
    rows = rows_of(run)
    path = f"{place.entity}/{place.project}/{run_id}"
    if mark is not None and not new_studies and _is_complete(path, rows, result, patience=0):
        note_published(run.path, place.key, run_id, description["studies"], complete=True)
        return "already there"
    sent = _replay(run, run_id, place, rows, config, result)
    if not _is_complete(path, rows, result, patience=_PATIENCE):
        raise UserError(f"W&B does not show all of {run.name} yet: run this again, nothing is sent twice")
    note_published(run.path, place.key, run_id, description["studies"], complete=True)
    pictures = sum(len(row.pictures) for row in rows.values())
    return f"published: {sent} of {len(rows)} rows were missing, {pictures} pictures"


def _replay(
    run: RunDirectory,
    run_id: str,
    place: Place,
    rows: dict[int, Row],
    config: dict[str, Any],
    result: dict[str, Any],
) -> int:
    description = run.description()
    studies = description["studies"]
    sink = _Replay(
        "online",
        place.project,
        place.entity,
        list(config["tracker"].get("tags") or []),
        run_id=run_id,
        name=run.name,
        group=studies[0],
        config={**description["keys"], "config": config},
        folder=run.path,
        more_tags=tuple(studies[1:]),
    )
    try:
        sent = sum(sink.row(update, row) for update, row in rows.items())
        sink.summary(final_numbers(result))
        sink.close(result["status"])
    except BaseException:
        sink.abandon()
        raise
    return sent


def _is_complete(path: str, rows: dict[int, Row], result: dict[str, Any], patience: float) -> bool:
    """Whether the server shows the last row, the ending and every picture, asked anew for `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (complete := _shows_all(path, rows, result)) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return complete


def _shows_all(path: str, rows: dict[int, Row], result: dict[str, Any]) -> bool:
    import wandb.errors

    try:
        shown = wandb.Api().run(path)
    except (wandb.errors.CommError, ValueError):
        return False
    ended = shown.summary.get("status") == result["status"]
    if not ended or shown.lastHistoryStep < max(rows, default=-1):
        return False
    wanted = {picture_file(name, update, file) for update, row in rows.items() for name, file in row.pictures.items()}
    return not wanted or wanted <= {file.name for file in shown.files(list(wanted))}
