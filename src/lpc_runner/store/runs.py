"""Run directories: where they are, what state they are in, which process runs them. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import Timeout

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import LACKING, is_held, lock_on, remove_temporary, say_once, sha256_of, write_atomically

State = Literal["new", "resume", "done"]
DONE = ("finished", "diverged")
# Top-level settings of places, tracking and speed. They change no result beyond rounding, in which numbers of threads
# and engines differ (`precision` does change results). The device is one of them: CPU and CUDA draw different numbers
# from one seed, of the same distribution, and every session records the kind of its device.
CHANGES_NO_RESULT = (
    "study",
    "optimized_metric",
    "tracker",
    "device",
    "engine",
    "check",
    "rerun",
    "output_dir",
    "data_dir",
    "num_threads",
    "runs_per_gpu",
    "tuned",
)
# Keys that options got later, with the value of the runs before them: a key of this value counts like no key.
FIRST_VALUES = {
    "model.activation": "silu",
    "dataset.binarise": "none",
    "dataset.binarise_seed": 0,
    "sampler.start": "encoder",
    "sampler.first_start": "encoder",
    "sampler.first_steps": None,
    "sampler.noise": "independent",
    "sampler.stop": "never",
    "objective.num_kept_states": None,
    "trainer.frozen": False,
    "metrics.num_reference_steps": 0,
}
# What every record holds, by type.
_RECORDS = {
    "result.json": {"status": str, "metrics": dict},
    "run.json": {"hash": str, "studies": list, "choices": dict, "keys": dict},
}
# What result.json holds besides once a run is done.
_RESULT = {
    "measurement": dict,
    "num_updates": int,
    "train_seconds": float | int,
    "gradient_evaluations": int,
    "device": str,
    "state_measured": str,
    "diverged_at": dict | None,
}
# Written only by the process that has the run's lock: a temporary file of these was left by one that was killed.
_LOCKED = ("result.json", "run.json", "config.yaml", "trajectories.npz", "checkpoints/*", "traces/*")
_WRITTEN_AGAIN = {
    "result.json": "the run's command measures again, from its last checkpoint",
    "run.json": "the run's command writes it again",
    "config.yaml": "the run's command writes it again",
}
START_AGAIN = "move the folder away, and its command starts it again"
_LONGEST_LINK = 4096  # bytes, the longest path
_TAIL = 65536  # bytes of a log that are read from its end


class CheckpointFile(NamedTuple):
    """A checkpoint by its name, update-<updates>-<SHA-256 of its content>.pt, unread."""

    update: int
    digest: str
    path: Path

    def is_whole(self) -> bool:
        """Whether the content still has the hash in the name."""
        return sha256_of(self.path) == self.digest


_CHECKPOINT = re.compile(r"update-(\d{9})-([0-9a-f]{64})\.pt")


def checkpoint_files(folder: Path) -> list[CheckpointFile]:
    """The checkpoints in a folder, newest first. OSError where it cannot be listed: a run would start again."""
    matches = map(_CHECKPOINT.fullmatch, os.listdir(folder) if folder.is_dir() else ())
    return sorted((CheckpointFile(int(m[1]), m[2], folder / m[0]) for m in matches if m), reverse=True)


def follow(entry: Path) -> Path:
    """The run that an entry of outputs/<study> stands for: a folder, or a symbolic link to one, is returned as it is.

    Where the file system has no symbolic links, a small file that holds the relative path stands for one, as archives
    and version control write it there too.
    """
    try:
        if entry.is_dir() or not entry.is_file() or entry.stat().st_size > _LONGEST_LINK:
            return entry
        target = Path(entry.read_text(encoding="utf-8").removesuffix("\n"))
    except (OSError, ValueError):  # unreadable, or no text: whatever it is, it is no link
        return entry
    return entry.parent / target if target.name == entry.name else entry


def entries_of(folder: Path) -> list[Path]:
    """What lies in an output folder or a study, hidden files apart, by name; of a run's folder, itself alone.

    Raises OSError where it cannot be listed, which is not the same as empty.
    """
    if (folder / "run.json").is_file():
        return [folder]
    return [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]


def last_row(path: Path) -> dict[str, Any]:
    """The last whole line of a .jsonl file, {} if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            row = json.loads(file.read().split(b"\n")[:-1][-1])
        return row if isinstance(row, dict) else {}
    except (OSError, ValueError, LookupError):
        return {}


class Occupied(UserError):
    """Another process runs this run."""


class RunDirectory:
    """One run on disk: outputs/runs/<name>, linked from every study that uses it.

    config.yaml, run.json, sessions.jsonl (one line per start), metrics.jsonl, result.json, samples/, checkpoints/,
    evaluations/, wandb/.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def locate(cls, output_dir: Path, name: str, rerun: int) -> RunDirectory:
        """The directory of a run of that name, or of its repetition number `rerun`, from 1 on."""
        return cls(Path(output_dir) / "runs" / (f"{name}-rerun{rerun}" if rerun else name))

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """An existing run directory. Raises UserError if `path` is none."""
        run = cls(follow(Path(path)).resolve())
        if not (run.path / "run.json").is_file():
            raise UserError(f"{path} is no run directory (it has no run.json); runs lie in outputs/<study>/<run>")
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint_files(self) -> list[CheckpointFile]:
        """Its checkpoints, newest first."""
        return checkpoint_files(self.checkpoints)

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def state(self) -> State:
        """done: finished or diverged. resume: begun, interrupted or failed. new: nothing there."""
        result = self.result()
        if result is not None and result["status"] in DONE:
            return "done"
        return "new" if self._read("run.json") is None else "resume"

    def result(self) -> dict[str, Any] | None:
        """result.json, None while there is none."""
        return self._read("result.json")

    def description(self) -> dict[str, Any]:
        """run.json: name, hash, choices, keys, studies, data_shape."""
        description = self._read("run.json")
        if description is None:
            raise UserError(f"{self.path} has no run.json; the command that made the run writes it again")
        return description

    def studies(self) -> list[str]:
        """The studies that use this run, the first of them first; none before it is described."""
        return (self._read("run.json") or {}).get("studies", [])

    def require_hash(self, digest: str) -> None:
        """Raises UserError if the directory was begun by a run of another hash: it was renamed or edited."""
        description = self._read("run.json")
        if description is not None and description["hash"] != digest:
            raise UserError(
                f"{self.path} belongs to another configuration (hash {description['hash'][:10]} in run.json, "
                f"{digest[:10]} of this run): renamed or edited; {START_AGAIN}"
            )

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError):
            content = None
        required = _RECORDS[name]
        if name == "result.json" and isinstance(content, dict) and content.get("status") in DONE:
            required = required | _RESULT
        for key, kind in required.items():
            if not isinstance(content, dict) or key not in content or not isinstance(content[key], kind):
                raise self.damaged(name, f"no {key}")
        return content

    def damaged(self, name: str, how: str) -> UserError:
        """The error for a record that is there and cannot be read."""
        return UserError(f"{self.path / name} is damaged ({how}); restore it, or remove it: {_WRITTEN_AGAIN[name]}")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of this run atomically."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")

    def discard_failure(self) -> None:
        """Remove the result.json of a run that failed and is tried again; of one that is done, nothing."""
        if self.state() != "done":
            (self.path / "result.json").unlink(missing_ok=True)

    def append_session(self, session: dict[str, Any]) -> None:
        """One line about this start: command, versions, device; a line that a crash tore before it stays alone."""
        with open(self.path / "sessions.jsonl", "a+b") as file:
            size = file.tell()
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(b"\n" * torn + json.dumps(session, default=str).encode() + b"\n")

    def last_session(self) -> dict[str, Any]:
        """What the latest start wrote of itself, {} before the first."""
        return last_row(self.path / "sessions.jsonl")

    def link_into(self, output_dir: Path, study: str) -> Path:
        """outputs/<study>/<run>, a relative link, so that studies share runs; returns its path."""
        self.require_linkable(output_dir, study)
        folder = Path(output_dir) / study
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / self.name
        if _is_link(link):
            return link
        target = os.path.relpath(self.path, folder.resolve())
        try:
            link.symlink_to(target)
        except FileExistsError:  # another run of the study was faster
            pass
        except OSError as error:
            if error.errno not in LACKING:
                raise
            say_once(f"{folder}: no symbolic links on this file system, small files stand for them ({error.strerror})")
            write_atomically(link, target + "\n")
        return link

    def require_linkable(self, output_dir: Path, study: str) -> None:
        """Raises UserError if something else has the place of the run, or of the link in a study's folder."""
        folder = Path(output_dir) / study
        link = folder / self.name
        for path, fits in ((self.path, self.path.is_dir()), (folder, folder.is_dir()), (link, _is_link(link))):
            if _is_there(path) and not fits:
                raise UserError(
                    f"{path} is in the way: it is no {'link to a run' if path == link else 'folder'}; move it"
                )

    def owner(self) -> str | None:
        """pid and host of the process that runs this run now, None if there is none (one that was killed is none)."""
        try:
            who = (self.path / ".owner").read_text(encoding="utf-8").strip() or "another process"
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return who if is_held(self.path / ".lock") else None
        except OSError as error:
            return f"{who} (whether it still works cannot be told: {error.strerror})"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Sole use of the directory. Raises Occupied with pid and host of the process that has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = lock_on(self.path / ".lock")
        owner = self.path / ".owner"
        try:
            lock.acquire(timeout=0.2)  # `owner` of another process holds it for an instant
        except Timeout:
            who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
            raise Occupied(f"{self.path} is being run by {who}") from None
        try:
            owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            for name in _LOCKED:
                remove_temporary(self.path / name)
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def _is_link(path: Path) -> bool:
    return path.is_symlink() or follow(path) != path


def _is_there(path: Path) -> bool:
    """Whether anything has this name, a link into nothing too. Raises UserError for a name that no file can have."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # too long, or in a folder that may not be searched
        raise UserError(f"{path}: {error.strerror}") from None
    return True
