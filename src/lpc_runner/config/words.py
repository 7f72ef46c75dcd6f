"""The words of the command line: Hydra's flags, and overrides with the quoting that makes a refused one text."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from lpc_runner.base.errors import UserError

_KEY = r"(~|\+{0,2})[\w$][\w$.@:/-]*"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Hydra's own command line, flags in any place. Raises UserError (one line) for an unknown flag."""

    def refuse(message: str) -> NoReturn:
        dashed = [word for word in argv if re.match(r"--[\w./]+=", word) and word.partition("=")[0] in message]
        remedy = f"settings have no dashes: {dashed[0][2:]}" if dashed else "--help lists what there is"
        raise UserError(f"{message} ({remedy})")

    parser = get_args_parser()
    parser.error = refuse
    return parser.parse_intermixed_args(argv)


def refuse_flags(args: argparse.Namespace) -> None:
    """Hydra's flags that would go around the check of the configuration. Raises UserError."""
    if args.experimental_rerun:  # it unpickles the file
        raise UserError("--experimental-rerun runs code from a file: the same command resumes a run")
    one_of = ("run", "multirun", "cfg", "info", "shell_completion")
    if len(given := [f"--{flag.replace('_', '-')}" for flag in one_of if getattr(args, flag)]) > 1:
        raise UserError(f"{' and '.join(given)} do not go together; check=true lists the runs of a sweep")
    for flag in ("config_name", "config_path", "package"):
        if getattr(args, flag):
            name = flag.replace("_", "-")
            raise UserError(f"--{name} would replace the checked configuration: --config-dir adds options of your own")


def flags_of(args: argparse.Namespace) -> set[str]:
    """Hydra's flags that were given, by their names in `args`."""
    return {name for name, value in vars(args).items() if name != "overrides" and value not in (None, False)}


def parsed(lines: Iterable[str]) -> list[Override]:
    """Overrides as Hydra reads them, in a context that it was initialised in. Raises UserError (one line)."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides = []
    for line in lines:
        if line.startswith("="):  # Hydra takes it for a setting of the root
            raise UserError(_refusal(line, ""))
        try:
            overrides += parser.parse_overrides([line])
        except HydraException as error:
            raise UserError(_refusal(line, str(error))) from None
    return overrides


def values_of(sweep: Override) -> list[str]:
    """The values of a sweep as words. Raises UserError for one that cannot be listed or has none."""
    key = sweep.get_key_element()
    if not sweep.is_discrete_sweep():
        raise UserError(
            f"{sweep.input_line}: an interval has no list of values, as range(start,stop,step) and a,b,c have; only a "
            "sweeper that searches (hydra/sweeper=) chooses from it"
        )
    if getattr(sweep.value(), "shuffle", False) and "WORLD_SIZE" in os.environ:
        raise UserError(f"{sweep.input_line}: ranks would each have an order of their own: no shuffle under torchrun")
    try:
        values = list(sweep.sweep_string_iterator())
    except (HydraException, ValueError) as error:
        raise UserError(f"{sweep.input_line}: {str(error).splitlines()[0]}") from None
    if not values:
        raise UserError(f"{key}: the sweep names no value")
    return values


def as_text(key: str, value: str) -> str:
    """A word for a shell that gives `key` the value as text, whatever characters it has."""
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")


def _refusal(line: str, said: str) -> str:
    """One line for an override that Hydra does not read."""
    key, equals, value = line.partition("=")
    shown = " ".join(line.split())
    if not equals:
        return f"{shown}: not of the form key=value"
    if not re.fullmatch(_KEY, key, re.ASCII):
        return f"{shown}: {' '.join(key.split())!r} is no key of a setting: key=value, without spaces"
    if value.startswith("~"):
        return f"{shown}: a character that Hydra does not read; no shell expands this ~: $HOME is your folder"
    reason = "Hydra does not read this value"
    if function := re.search(r"while evaluating '.*", said):
        reason = f"an error {function[0]}"
    remedy = f"if it is text, quote it twice: {as_text(key, value)}" if value.isprintable() else "write it on one line"
    return f"{shown}: {reason}; {remedy}"
