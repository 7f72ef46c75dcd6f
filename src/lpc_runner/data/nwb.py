"""Spike counts from a Neurodata Without Borders file: units binned within the trials of its table (extra: nwb)."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.data.files import file_state
from lpc_runner.data.images import hold_out
from lpc_runner.data.sequence_files import opened

VERSION = 1  # of binning and split: raise it when one changes, for runs then see other data
_SPLITS = (("train", "training"), ("val", "valid", "validation"), ("test",))


@dataclass(frozen=True)
class Tables:
    """What of the file is used. starts, stops: seconds (trials,). times: of each unit, ascending seconds.

    observed: of each unit, seconds (intervals, 2) in which it was recorded, where the file says so. split, held_out: of
    each trial, unit.
    """

    starts: np.ndarray
    stops: np.ndarray
    times: list[np.ndarray]
    observed: list[np.ndarray]
    split: np.ndarray | None
    held_out: np.ndarray


def read_nwb(
    path: Path, bin_seconds: float, trial_seconds: float | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Counts (trials, T, N) by the keys of `Spikes`, and what was taken and passed over, one line each.

    Trials begin at start_time and are all of one length, or of their first trial_seconds. The table's column `split`
    (train, val) says what is trained on, else a tenth is held out; the units' column `heldout` which neurons are.
    Raises UserError for what is missing, and for trials of unequal length.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _binned(path, file_state(path), bin_seconds, trial_seconds)


@functools.lru_cache(maxsize=2)
def _binned(path: Path, state: tuple, bin_seconds: float, trial_seconds: float | None):
    del state  # a part of the cache's key
    tables = _tables(path)
    notes = []
    sound = np.isfinite(tables.starts) & np.isfinite(tables.stops) & (tables.stops > tables.starts)
    length, whole = _length(path, tables, sound, bin_seconds, trial_seconds)
    edges = tables.starts[:, None] + np.arange(length + 1) * bin_seconds
    recorded = _recorded(tables, edges, 1e-3 * bin_seconds)
    for reason, kept in (
        ("without start or end", sound),
        ("shorter than trial_seconds", whole | ~sound),
        ("not wholly recorded (obs_intervals)", recorded | ~(sound & whole)),
    ):
        if not kept.all():
            notes.append(f"{path}: {np.sum(~kept):,} trials passed over: {reason}")
    usable = np.flatnonzero(sound & whole & recorded)
    train, valid = _split(path, tables, usable, notes)
    counts = [np.diff(np.searchsorted(times, edges), axis=1).astype(np.int32) for times in tables.times]
    counts = np.stack(counts, axis=2)  # spikes in [edge, next edge)
    held_out = tables.held_out
    heard = counts[train].any((0, 1))
    if not heard.all():
        notes.append(f"{path}: {np.sum(~heard):,} units passed over: no spike in any training trial")
    if not (heard & ~held_out).any():
        raise UserError(f"{path}: no unit has a spike in any training trial")
    arrays = {}
    for plain, name, rows in (("train", "train", train), ("valid", "eval", valid)):
        if held_out.any():
            arrays[f"{name}_spikes_heldin"] = counts[rows][:, :, heard & ~held_out]
            arrays[f"{name}_spikes_heldout"] = counts[rows][:, :, heard & held_out]
        else:
            arrays[f"{plain}_spikes"] = counts[rows][:, :, heard]
    return arrays, tuple(notes)


def _length(path: Path, tables: Tables, sound: np.ndarray, bin_seconds: float, trial_seconds: float | None):
    """Bins of a trial, and which trials have as many. Raises UserError if they differ and no length was chosen."""
    if not sound.any():
        raise UserError(f"{path}: no trial has a start_time and a later stop_time")
    seconds = np.where(sound, tables.stops - tables.starts, 0)
    bins = np.floor(seconds / bin_seconds + 1e-6).astype(np.int64)
    if trial_seconds is None:
        length, longest = bins[sound].min(), bins[sound].max()
        if length != longest:
            raise UserError(
                f"{path}: trials last from {seconds[sound].min():.4g} to {seconds[sound].max():.4g} s, all need one "
                "length: dataset.trial_seconds=... takes the first so many seconds of each and leaves out the shorter"
            )
    else:
        length = int(np.floor(trial_seconds / bin_seconds + 1e-6))
    if length < 1:
        raise UserError(f"{path}: trials are shorter than one bin, dataset.bin_seconds={bin_seconds:g}")
    return int(length), bins >= length


def _recorded(tables: Tables, edges: np.ndarray, tolerance: float) -> np.ndarray:
    """Which trials lie, for every unit, within one of its observation intervals."""
    within = np.ones(len(edges), bool)
    starts, stops = edges[:, 0] + tolerance, edges[:, -1] - tolerance
    for intervals in tables.observed:
        ordered = intervals[np.argsort(intervals[:, 0])]
        last = np.searchsorted(ordered[:, 0], starts, side="right") - 1
        within &= (last >= 0) & (ordered[last, 1] >= stops) if len(ordered) else False
    return within


def _split(path: Path, tables: Tables, usable: np.ndarray, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to measure on."""
    if tables.split is not None:
        names = np.array([str(name).strip().casefold() for name in tables.split])
        parts = [usable[np.isin(names[usable], words)] for words in _SPLITS]
        train, valid = parts[0], parts[1] if len(parts[1]) else parts[2]
        if len(train) and len(valid):
            if others := len(usable) - len(train) - len(valid):
                notes.append(f"{path}: {others:,} trials passed over: of another split")
            return train, valid
    if len(usable) < 2:
        raise UserError(f"{path}: {len(usable)} usable trials, at least 2 are needed; {'; '.join(notes) or 'no more'}")
    notes.append(f"{path}: no column split with train and val: a tenth of the trials is held out to measure on")
    train, valid = hold_out(path, len(usable))
    return usable[train], usable[valid]


def _tables(path: Path) -> Tables:
    try:
        from pynwb import NWBHDF5IO
    except ModuleNotFoundError:
        raise UserError(f"{path}: NWB is read through pynwb: pip install 'lpc-runner[nwb]'") from None
    with opened(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # namespaces that are loaded already
        try:
            with NWBHDF5IO(file=file, mode="r") as io:
                return _used(path, io.read())
        except UserError:
            raise
        except Exception as error:  # hdmf raises errors of many kinds on unexpected content
            raise UserError(f"{path}: cannot be read as NWB ({one_line(error)})") from error


def _used(path: Path, content: Any) -> Tables:
    units, trials = content.units, content.trials
    if units is None or "spike_times" not in units.colnames:
        raise UserError(f"{path}: has no units with spike_times")
    if trials is None:
        raise UserError(f"{path}: has no table of trials, which says where they begin and end")
    count = range(len(units))
    observed = []
    if "obs_intervals" in units.colnames:
        observed = [np.asarray(units["obs_intervals"][i], np.float64).reshape(-1, 2) for i in count]
    return Tables(
        np.asarray(trials["start_time"][:], np.float64),
        np.asarray(trials["stop_time"][:], np.float64),
        [np.sort(np.asarray(units["spike_times"][i], np.float64)) for i in count],
        observed,
        np.asarray(trials["split"][:]) if "split" in trials.colnames else None,
        np.asarray(units["heldout"][:], bool) if "heldout" in units.colnames else np.zeros(len(units), bool),
    )
