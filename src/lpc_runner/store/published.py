"""published.json of a run directory: which W&B projects hold this run, under which id, and whether all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import write_atomically

NAME = "published.json"


def destination(server: str, entity: str, project: str) -> str:
    """The key of a W&B project in published.json."""
    return f"{server.rstrip('/')}/{entity}/{project}"


def read_published(folder: Path) -> dict[str, dict[str, Any]]:
    """By destination: `run_id` there, the `studies` that its group and tags name, `complete`. UserError if damaged."""
    path = Path(folder) / NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError):
        raise UserError(f"{path} is damaged; delete it: W&B is asked what it holds before anything is sent") from None


def note_published(folder: Path, place: str, run_id: str, studies: Sequence[str], *, complete: bool) -> None:
    """Note that `place` has this run under `run_id`; complete: the server says it holds everything. OSError."""
    marks = read_published(folder) | {place: {"run_id": run_id, "studies": list(studies), "complete": complete}}
    write_atomically(Path(folder) / NAME, json.dumps(marks, indent=2) + "\n")
