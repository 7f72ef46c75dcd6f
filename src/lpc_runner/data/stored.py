"""Files whose content is known: hashes computed once, image arrays written whole and verified when read."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import flush_to_disk, remove_temporary, sha256_of, sync_folder, temporary_beside


def file_state(path: Path) -> tuple[Path, int, int]:
    """Path, size and time of change: what is known of a file stays true as long as these are the same."""
    state = path.stat()
    return path.resolve(), state.st_size, state.st_mtime_ns


def content_hash(path: Path) -> str:
    """SHA-256 of a file, computed once per state of it: each cell of a sweep asks for it."""
    return _content_hash(*file_state(path))


@functools.cache
def _content_hash(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)


def intact(path: Path, md5: str | None) -> bool:
    """Whether a file exists and, where an MD5 is given, has it; computed once like `content_hash`."""
    return path.is_file() and (md5 is None or _md5(*file_state(path)) == md5)


@functools.cache
def _md5(path: Path, size: int, modified: int) -> str:
    from torchvision.datasets.utils import calculate_md5

    return calculate_md5(path)


def save_images(folder: Path, stem: str, count: int, chunks: Iterator[np.ndarray]) -> Path:
    """Write chunks uint8 (n, C, H, W), `count` images in all, to folder/<stem>-<hash>.npy, wholly or not.

    One chunk is in memory at a time. <hash>: the first 16 hex digits of the file's SHA-256. Callers hold the folder's
    lock.
    """
    remove_temporary(folder / stem)
    temporary = temporary_beside(folder / stem)
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for position, chunk in enumerate(chunks):
                header = _npy_header((count, *chunk.shape[1:])) if position == 0 else b""
                for data in (header, np.ascontiguousarray(chunk).data):
                    file.write(data)
                    digest.update(data)
            file.flush()
            flush_to_disk(file.fileno())
        path = folder / f"{stem}-{digest.hexdigest()[:16]}.npy"
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return path


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def load_images(path: Path) -> np.ndarray:
    """Read what `save_images` wrote. Raises UserError if the content no longer fits the hash in the name."""
    if not path.stem.endswith(f"-{sha256_of(path)[:16]}"):
        raise UserError(f"{path}: content differs from the hash in its name, delete this file")
    return np.load(path, allow_pickle=False)
