"""Which arrays of a user's file of sequences are the splits and what is known beside them, and whether they fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lpc_runner.base.errors import UserError
from lpc_runner.data.files import Header

# Keys of what is known beside the values, by part; the second spelling is that of the Neural Latents Benchmark.
_KNOWN = {
    "rates": (("train_rates", "valid_rates"),),
    "behaviour": (("train_behaviour", "valid_behaviour"), ("train_behavior", "eval_behavior")),
}
OPTIONAL = ("behaviour",)  # left out, with a line, where it does not fit the values


@dataclass(frozen=True)
class Layout:
    """Checked headers of a file. parts: keys of both splits. extras: keys by name. left_out: optional keys, why."""

    headers: dict[str, Header]
    parts: tuple[tuple[str, ...], tuple[str, ...]]
    extras: dict[str, tuple[str, str]]
    left_out: dict[tuple[str, ...], str]

    def shape(self, split: int) -> tuple[int, int, int]:
        """(trials, T, N) of the training (0) or validation (1) split."""
        first, *rest = (self.headers[key].shape for key in self.parts[split])
        return first[0], first[1], first[2] + sum(shape[2] for shape in rest)


def layout_of(
    path: Path, headers: dict[str, Header], columns: str, plain: tuple[str, str], held_out_keys: tuple
) -> Layout:
    """Headers checked against one another.

    columns: the last axis in words. plain, held_out_keys: the keys of both splits, or of their (held-in, held-out)
    neurons. Raises UserError naming file and key; an optional part that does not fit is left out.
    """
    try:
        parts = _parts(headers, plain, held_out_keys)
        for train, valid in zip(*parts):
            _require(_fault(train, headers[train], columns) or _fault(valid, headers[valid], columns))
            left, right = headers[train].shape, headers[valid].shape
            if left[1:] != right[1:]:
                hint = _trials_elsewhere(left, right)
                raise UserError(f"{valid} of shape {right} does not fit {train} of shape {left}{hint}")
        for first, *rest in parts:
            for key in rest:
                _require(_misfit(key, headers[key], headers[first]))
        return Layout(headers, parts, *_extras(headers, parts, columns))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _require(fault: str) -> None:
    if fault:
        raise UserError(fault)


def _parts(
    headers: dict[str, Header], plain: tuple[str, str], held_out_keys: tuple
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of the training and of the validation split: one each, or held-in and held-out neurons."""
    found = ", ".join(sorted(headers)) or "none"
    if plain[0] in headers:
        parts = ((plain[0],), (plain[1],))
    elif held_out_keys and held_out_keys[0][0] in headers:
        parts = held_out_keys
    else:
        known = ", ".join(plain)
        if held_out_keys:
            known += " or " + ", ".join(key for keys in held_out_keys for key in keys)
        raise UserError(f"no key '{plain[0]}', found {found}; expected {known}")
    for key in (key for keys in parts for key in keys):
        if key not in headers:
            raise UserError(f"no key '{key}' beside '{parts[0][0]}', found {found}")
    return parts


def _extras(
    headers: dict[str, Header], parts: tuple, columns: str
) -> tuple[dict[str, tuple[str, str]], dict[tuple[str, ...], str]]:
    """Keys by name of what is known beside the values; optional keys that do not fit, with the reason."""
    found, left_out = {}, {}
    num_columns = sum(headers[key].shape[2] for key in parts[0])
    for name, spellings in _KNOWN.items():
        for pair in spellings:
            present = [key for key in pair if key in headers]
            if len(present) == 1:
                missing = next(key for key in pair if key not in headers)
                faults = [f"'{present[0]}' without '{missing}': give both or none"]
            else:
                faults = [
                    _fault(key, headers[key], columns)
                    or _misfit(key, headers[key], headers[keys[0]])
                    or (_narrow(key, headers[key], num_columns, columns) if name == "rates" else "")
                    for key, keys in zip(present, parts)
                ]
            fault = next(filter(None, faults), "")
            if fault and name not in OPTIONAL:
                raise UserError(fault)
            if fault:
                left_out[tuple(present)] = fault
            elif present:
                found[name] = pair
    return found, left_out


def _fault(key: str, header: Header, columns: str) -> str:
    if header.fault:
        return f"{key} {header.fault}"
    if len(header.shape) != 3:
        hint = f": x.reshape(trials, time, {columns}) cuts one recording into trials" if len(header.shape) == 2 else ""
        return f"{key} must have shape (trials, time, {columns}), got {header.shape}{hint}"
    if 0 in header.shape:
        axis = ("trials", "time bins", columns)[header.shape.index(0)]
        return f"{key} has no {axis}, its shape is {header.shape}"
    return ""


def _misfit(key: str, header: Header, values: Header) -> str:
    """Whether trials and bins differ from those of the values."""
    if header.shape[:2] == values.shape[:2]:
        return ""
    return f"{key} must have {values.shape[0]} trials of {values.shape[1]} bins, got {header.shape}"


def _narrow(key: str, header: Header, num_columns: int, columns: str) -> str:
    return "" if header.shape[2] == num_columns else f"{key} has {header.shape[2]} {columns}, the data {num_columns}"


def _trials_elsewhere(left: tuple[int, ...], right: tuple[int, ...]) -> str:
    """A hint where the two splits differ in the length of another axis than the first."""
    differing = [axis for axis in range(3) if left[axis] != right[axis]]
    if len(differing) != 1:
        return ""
    return f" (if axis {differing[0]} is that of trials, np.moveaxis(x, {differing[0]}, 0) makes it the first)"
