"""UserError, for what the user can correct; and masking, which keeps secrets out of logs and run folders."""

from __future__ import annotations

import logging
import os
import re


class UserError(ValueError):
    """Bad input, missing data or an impossible request; its text is one line and names the remedy."""


# Names such as num_tokens count tokens of a text and hold no secret.
_NAMED = r"[\w.]*(?:api_?key|(?<!num_)(?<!max_)(?<!min_)token|secret|passw(?:or)?d|credential)\w*"
_ASSIGNED = re.compile(rf"(?i)({_NAMED}['\"]?\s*[=:]\s*)(['\"]?)[^\s'\",;&]+")
# W&B's, which need no name beside them; 40 digits after a slash are part of a path.
_KEY = re.compile(r"(?<![\w/])(?:[0-9a-f]{40}|wandb_v\d+_\w+)\b")
_SHORTEST = 8  # characters; shorter values of such variables ('true', '1') would mask ordinary words


def masked(text: str) -> str:
    """`text` without secrets: what is assigned to a name like api_key, and the values of such variables."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and re.fullmatch(rf"(?i){_NAMED}", name):
            text = text.replace(value, "***")
    return _ASSIGNED.sub(r"\1***", text)


def one_line(error: BaseException) -> str:
    """An exception's text without secrets, on one line of at most 300 characters, or its type where it has none."""
    return _KEY.sub("***", masked(" ".join(str(error).split())))[:300] or type(error).__name__


class Masking(logging.Filter):
    """A handler's filter: every line goes through `masked`, tracebacks too."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = masked(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = masked(logging.Formatter().formatException(record.exc_info))
        return True


def mask_logs() -> None:
    """Put the filter on every handler that writes a run's log."""
    for name in (None, "lpc_runner"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(entry, Masking) for entry in handler.filters):
                handler.addFilter(Masking())
