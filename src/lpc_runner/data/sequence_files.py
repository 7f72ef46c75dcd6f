"""Arrays in a user's NPZ, HDF5 or MATLAB file: headers first, then the content, with every fault in one line.

HDF5 is read as h5py and PyTables write it, or MATLAB with -v7.3.
"""

from __future__ import annotations

import errno
import importlib
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.data.files import Header, damage_named, no_npz, npz_header

_MAX_COMPRESSION = 1100  # deflate, the usual filter of these formats, cannot exceed 1032
_MAX_INT = np.iinfo(np.int32).max
_MAX_FLOAT = float(np.finfo(np.float32).max)
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
_MAX_DEPTH = 4  # groups below one another that are looked into


def read_headers(path: Path) -> dict[str, Header]:
    """dtype and shape of every array in the file, by key; no array is read.

    In an HDF5 file the keys are those of the root or, where it holds nothing but one group, of that group. Raises
    UserError for a missing, alien or damaged file. An array that cannot be used carries its `fault`.
    """
    kind, size = _format(path), path.stat().st_size
    with damage_named(path):
        headers = {"npz": _npz_headers, "hdf5": _hdf5_headers, "matlab": _matlab_headers}[kind](path)
    return {key: replace(header, fault=header.fault or _fault(header, size)) for key, header in headers.items()}


def read_array(path: Path, key: str) -> np.ndarray:
    """One array in C order, after `read_headers` has found it sound. Raises UserError naming a damaged file."""
    kind = _format(path)
    with damage_named(path):
        if kind == "hdf5":
            with opened(path) as file:
                dataset = _root(file)[key]
                values = dataset[...]
                return np.ascontiguousarray(values.transpose() if _by_matlab(dataset) else values)
        if kind == "matlab":
            from scipy.io import loadmat

            return np.ascontiguousarray(loadmat(path, variable_names=[key])[key])
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key]


def _format(path: Path) -> str:
    import h5py

    if not path.is_file():
        raise UserError(
            f"{path}: no such file, expected .npz, .h5 or .mat with arrays of shape (trials, time, neurons)"
        )
    with damage_named(path):
        if h5py.is_hdf5(path):
            return "hdf5"
        with open(path, "rb") as file:
            start = file.read(128)
        if start[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
            return "matlab"
        if zipfile.is_zipfile(path):
            return "npz"
    raise UserError(f"{path}: {no_npz(path) or 'neither .npz nor HDF5 nor MATLAB, or cut short'}")


def _npz_headers(path: Path) -> dict[str, Header]:
    with zipfile.ZipFile(path) as file:
        keys = [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]
        return {key: npz_header(file, key) for key in keys}


def _matlab_headers(path: Path) -> dict[str, Header]:
    from scipy.io import whosmat

    dtypes = np.sctypeDict | {"logical": np.uint8}  # MATLAB's classes of real numbers have NumPy's names
    return {key: Header(np.dtype(dtypes.get(kind, object)), tuple(shape)) for key, shape, kind in whosmat(path)}


def _hdf5_headers(path: Path) -> dict[str, Header]:
    import h5py

    headers: dict[str, Header] = {}

    def collect(group: Any, prefix: str, depth: int) -> None:
        for name in group:
            key = prefix + name
            if name.startswith("#"):
                continue
            if group.get(name, getclass=True, getlink=True) is not h5py.HardLink:
                fault = "is a link to elsewhere, only arrays in the file itself are read"
                headers[key] = Header(np.dtype(object), (), fault)
            elif isinstance(item := group[name], h5py.Group):
                if depth > 1:
                    collect(item, f"{key}/", depth - 1)
            elif isinstance(item, h5py.Dataset) and item.shape is not None:
                headers[key] = _hdf5_header(item)

    with opened(path) as file:
        collect(_root(file), "", _MAX_DEPTH)
    return headers


def _root(group: Any) -> Any:
    """Down through groups that hold nothing but one group. MATLAB's #refs# and the like do not count."""
    import h5py

    for _ in range(_MAX_DEPTH):
        names = [name for name in group if not name.startswith("#")]
        if len(names) != 1 or group.get(names[0], getclass=True, getlink=True) is not h5py.HardLink:
            break
        if not isinstance(group[names[0]], h5py.Group):
            break
        group = group[names[0]]
    return group


def _by_matlab(dataset: Any) -> bool:
    return "MATLAB_class" in dataset.attrs


def _hdf5_header(item: Any) -> Header:
    if item.is_virtual or item.external:
        return Header(item.dtype, item.shape, "lies in another file, only arrays in the file itself are read")
    if not _by_matlab(item):
        return Header(item.dtype, item.shape, _lacking(item))
    if item.attrs["MATLAB_class"] == b"cell":
        return Header(item.dtype, item.shape[::-1], "is a cell array, expected one array (trials, time, neurons)")
    note = "axes reversed, as MATLAB stores them" if item.ndim > 1 else ""
    return Header(item.dtype, item.shape[::-1], _lacking(item), note)


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
            return (
                f"is compressed with {known} (HDF5 filter {code}), which is not installed: pip install hdf5plugin adds "
                "all but LZO and szip; or write it with gzip"
            )
    return ""


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


def _fault(header: Header, file_size: int) -> str:
    """Why no reader should ask for such an array."""
    if header.dtype.hasobject:
        return "holds no numbers but objects (often trials of unequal length: cut them to one length and stack them)"
    if header.dtype.kind not in "biuf":
        return f"holds no numbers but {header.dtype}"
    if math.prod(header.shape) * header.dtype.itemsize > _MAX_COMPRESSION * file_size:
        return f"claims shape {header.shape}, more than a file of {file_size:,} bytes can hold"
    return ""


# Content --------------------------------------------------------------------------------------------------


def check_numbers(path: Path, key: str, values: np.ndarray) -> None:
    """Raise UserError naming trial, bin and neuron of the first value (trials, T, N) that float32 cannot hold."""
    if values.dtype.kind != "f":
        return
    finite = "every value must be finite"
    missing = np.isnan(values)
    if missing.any():
        _refuse(path, key, values, missing, finite + _padding(missing))
    _refuse(path, key, values, np.isinf(values), finite)
    if values.dtype.itemsize > 4:
        _refuse(path, key, values, np.abs(values) > _MAX_FLOAT, "float32 ends at 3.4e38: give the data in another unit")


def _padding(missing: np.ndarray) -> str:
    """What to do where missing (trials, T, N) are the ends of trials."""
    lasting = np.asarray(missing.all(2))
    lengths = np.where(lasting.any(1), lasting.argmax(1), missing.shape[1])
    is_padding = np.array_equal(lasting, np.arange(missing.shape[1]) >= lengths[:, None])
    if not is_padding or not np.array_equal(missing.any(2), lasting):
        return ""
    return (
        f" (trials of unequal length, padded: cut all to one length, [:, :{lengths.min()}] is the shortest's, "
        "or leave the short ones out)"
    )


def as_counts(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """The same values as int32 (trials, T, N). Raises UserError naming the first that is no count."""
    check_numbers(path, key, values)
    if values.dtype.kind in "if":
        _refuse(path, key, values, values < 0, "spike counts cannot be negative")
    if values.dtype.kind == "f":
        rounded = values != np.floor(values)
        _refuse(path, key, values, rounded, "spike counts must be whole numbers (real-valued data: dataset=series)")
    _refuse(path, key, values, values > _MAX_INT, f"spike counts must be at most {_MAX_INT:,}")
    return values.astype(np.int32)


def _refuse(path: Path, key: str, values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    if not wrong.any():
        return
    trial, time, neuron = (int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))
    count = int(wrong.sum())
    others = f" and {count - 1:,} more" if count > 1 else ""
    raise UserError(
        f"{path}: {key} has {values[trial, time, neuron]} at trial {trial}, bin {time}, neuron {neuron}{others}: {rule}"
    )
