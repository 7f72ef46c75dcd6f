"""Arrays in an HDF5 file: as h5py and PyTables write it, or MATLAB with -v7.3."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.data.files import Header, damage_named

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Registered HDF5 filters (https://github.com/HDFGroup/hdf5_plugins) that people's files use.
_FILTERS = {
    4: "szip",
    305: "LZO",
    307: "bzip2",
    32000: "LZF",
    32001: "Blosc",
    32004: "LZ4",
    32008: "bitshuffle",
    32013: "ZFP",
    32015: "Zstandard",
    32017: "SZ",
    32026: "Blosc2",
}
_IN_NO_PACKAGE = (4, 305)  # not in hdf5plugin
_MAX_DEPTH = 4  # groups below one another that are looked into


def is_hdf5(path: Path) -> bool:
    """Whether HDF5's signature stands at the start, or behind a header of 512, 1024, 2048, ... bytes as MATLAB's."""
    size, offset = path.stat().st_size, 0
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            if file.read(len(_SIGNATURE)) == _SIGNATURE:
                return True
            offset = max(512, 2 * offset)
    return False


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The h5py.File, for reading. Raises UserError: open elsewhere for writing, refused by the system, or damaged."""
    with damage_named(path), _open(path) as file:
        yield file


def _open(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        text = str(error)
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # the file system has no locks
            return h5py.File(path, "r", locking=False)
        if "unable to lock file" in text:
            raise UserError(f"{path}: open for writing in another program, which locks it: close it there") from error
        if "already open for write" in text or "SWMR" in text:
            raise UserError(
                f"{path}: marked as open for writing: close it in the program that writes it; if that ended without "
                f"doing so, h5clear -s {path.name} clears the mark"
            ) from error
        raise


def headers(file: Any) -> dict[str, Header]:
    """Of every dataset below the root or, where that holds nothing but one group, below that, by path."""
    by_path: dict[str, Header] = {}
    _collect(_root(file), "", by_path, _MAX_DEPTH)
    return by_path


def read(file: Any, key: str) -> np.ndarray:
    """One dataset, in C order; MATLAB's axes reversed."""
    dataset = _root(file)[key]
    values = dataset[...]
    return np.ascontiguousarray(values.transpose()) if _by_matlab(dataset) else np.asarray(values)


def _root(group: Any, depth: int = _MAX_DEPTH) -> Any:
    """Down through groups that hold nothing but one group. MATLAB's #refs# and the like do not count."""
    import h5py

    names = [name for name in group if not name.startswith("#")]
    if len(names) == 1 and group.get(names[0], getclass=True, getlink=True) is h5py.HardLink:
        member = group[names[0]]
        if isinstance(member, h5py.Group) and depth:
            return _root(member, depth - 1)
    return group


def _by_matlab(dataset: Any) -> bool:
    return "MATLAB_class" in dataset.attrs


def _collect(group: Any, prefix: str, by_path: dict[str, Header], depth: int) -> None:
    import h5py

    no_number = np.dtype(object)
    for name in group:
        if name.startswith("#"):
            continue
        key = prefix + name
        if group.get(name, getclass=True, getlink=True) is not h5py.HardLink:
            by_path[key] = Header(no_number, (), "is a link to elsewhere, only arrays in the file itself are read")
            continue
        item = group[name]
        if isinstance(item, h5py.Group):
            if depth > 1:
                _collect(item, f"{key}/", by_path, depth - 1)
        elif isinstance(item, h5py.Dataset) and item.shape is not None:
            by_path[key] = _header(item)


def _header(item: Any) -> Header:
    if item.is_virtual or item.external:
        return Header(item.dtype, item.shape, "lies in another file, only arrays in the file itself are read")
    if _by_matlab(item):
        if item.attrs.get("MATLAB_class") == b"cell":
            return Header(item.dtype, item.shape[::-1], "is a cell array, expected one array (trials, time, neurons)")
        note = "axes reversed, as MATLAB stores them" if item.ndim > 1 else ""
        return Header(item.dtype, item.shape[::-1], _lacking(item), note)
    return Header(item.dtype, item.shape, _lacking(item))


def _lacking(item: Any) -> str:
    """The first filter of a dataset that this HDF5 does not have, with the package that has it."""
    from h5py import h5z  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

    properties = item.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(number)
        if h5z.filter_avail(code):
            continue
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")  # importing it registers its filters
        if not h5z.filter_avail(code):
            known = _FILTERS.get(code) or name.decode(errors="replace") or "an unknown one"
            remedy = "write it without, or with gzip" if code in _IN_NO_PACKAGE else "pip install hdf5plugin adds it"
            return f"is compressed with {known} (HDF5 filter {code}), which is not installed: {remedy}"
    return ""
