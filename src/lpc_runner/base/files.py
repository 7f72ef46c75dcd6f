"""Atomic writes, content hashes and file locks, with substitutes for file systems that lack them."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import tempfile
import uuid
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

from lpc_runner.base.errors import UserError

_logger = logging.getLogger(__name__)
# Errors of file systems without links, locks or flushing of folders: FUSE, SMB, exFAT, NFS without its lock service.
# (Linux raises EPERM for links on FAT.)
LACKING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EPERM)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_name(text: str) -> str:
    """`text` as one file name that stays in its folder: letters, digits, '_', '-' and '.', the first no dot."""
    return re.sub(r"^\.", "_", re.sub(r"[^A-Za-z0-9_.-]", "_", text)) or "_"


def require_folder(folder: Path, key: str) -> Path:
    """`folder` or its nearest parent that exists. Raises UserError, naming the setting `key`, if that is a file."""
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
    """A name in the same folder, unique over processes and machines, for a file that will be renamed to `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside `path`, flush, rename over it, flush the folder: a reader sees old or new, never half."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            flush_to_disk(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_cache(path: Path, content: bytes) -> None:
    """Write what can be computed again, and its folder; where that is refused, say so once and go on without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        say_once(f"{path.parent}: nothing is kept there for later runs ({error.strerror})")


def is_refusal(error: BaseException) -> bool:
    """Whether the system refused access (rights, disk fault, memory), which says nothing about the file's content."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and bool(error.errno))


def remove_temporary(path: Path) -> None:
    """Remove what a killed `write_atomically` left beside `path` (its name may be a pattern); no process may write."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    """Make what was written to a file or folder survive a power cut, where its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*LACKING, errno.EROFS):
            raise


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` durable, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (*LACKING, errno.EACCES, errno.EISDIR):  # a folder may be written and not be read
            raise
        return
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def say_once(text: str) -> None:
    """A warning that this process gives once."""
    _logger.warning("%s", text)


class _Unlocked(nullcontext):
    """In the place of a lock on a machine that has none."""

    def acquire(self, timeout: float = 0) -> _Unlocked:
        del timeout
        return self

    def release(self) -> None:
        pass


def lock_on(path: Path) -> FileLock | _Unlocked:
    """A lock on the file `path`, whose folder must exist; the system releases it when its process ends, even if killed.

    Where the file system has no locks, one of this machine takes its place, with a single warning. Raises OSError.
    """
    if _has_locks(path.parent):
        return FileLock(path)
    local = _local_lock(path)
    local.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    here = _has_locks(local.parent)
    apart = "processes of this machine keep apart, those of others" if here else "two processes"
    say_once(f"{path.parent}: no file locks on this file system: {apart} must not be started on the same run at once")
    return FileLock(local) if here else _Unlocked()


def is_held(path: Path) -> bool:
    """Whether another process holds `lock_on(path)`; writes nothing. Raises OSError if this cannot be determined."""
    for place in (path, _local_lock(path)):
        try:
            with open(place, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in LACKING:
                raise
    return False


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder, prefix=".") as file:  # not the lock itself: that may be held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LACKING:
                raise
            return False
    return True


def _local_lock(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return _local_folder() / f"lpc_runner-locks-{os.getuid()}" / f"{name}.lock"


def _local_folder() -> Path:
    """A folder of this machine that is the same for all its processes; TMPDIR may differ between them."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
