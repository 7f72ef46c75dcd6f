"""Files that are whole or not there: atomic writes and content hashes."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path

from lpc_runner.errors import UserError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_name(text: str) -> str:
    """`text` as one file name that stays in its folder: letters, digits, '_', '-' and '.', the first no dot."""
    return re.sub(r"^\.", "_", re.sub(r"[^A-Za-z0-9_.-]", "_", text)) or "_"


def require_folder(folder: Path, key: str) -> Path:
    """What of `folder`, named by the setting `key`, exists. Raises UserError (one line) if that is a file."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{key}: {nearest} is a file; give a folder, {key}=...")
    return nearest


def require_writable(folder: Path, key: str) -> None:
    """Raise UserError (one line) if `folder`, named by the setting `key`, cannot be made or written."""
    nearest = require_folder(folder, key)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {nearest} is read-only; give a folder that can be written, {key}=...")


def temporary_beside(path: Path) -> Path:
    """A name in the same folder for what will be renamed to `path`, no other process's, on whichever machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside `path`, flush, rename over it, flush the folder: a reader sees old or new, never half."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_temporary(path: Path) -> None:
    """Remove what a killed `write_atomically` left beside `path` (its name may be a pattern); nobody may be writing."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
