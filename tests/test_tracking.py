"""Tracking: the log survives what a run survives; a person sees how far it is."""

from __future__ import annotations

import io
import json
import logging
import math
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import hints_of
from lpc_runner.store.log import MetricLog
from lpc_runner.tracking import progress as progress_module
from lpc_runner.tracking.progress import Progress
from lpc_runner.tracking.tracker import NoTracker, Tracker
from lpc_runner.tracking.wandb_run import WandbTracker

CONF = Path(__file__).parents[1] / "conf" / "tracker"
CONFIG = {"dataset": "digits", "step_size": 0.1, "sampler": {"num_steps": 30}}


def same(rows, expected):
    """Equality in which nan equals nan."""
    return repr(rows) == repr(expected)


def said(caplog):
    """Our own log records: pytest also catches W&B's, which nothing outside its debug files shows."""
    return [record for record in caplog.records if record.name == "lpc_runner"]


@pytest.fixture
def open_log(tmp_path):
    """MetricLog by file name, closed when the test ends."""
    logs = []

    def open_log(name="metrics.jsonl"):
        logs.append(MetricLog(tmp_path / name))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


# The metric log -------------------------------------------------------------------------------------------


def test_rows_come_back_as_written_with_nan_and_infinities(open_log):
    log = open_log()
    log.append(1, 0.5, {"train/elbo": -612.25, "chain/drift_norm": math.inf, "chain/z": -math.inf, "a/b": 1e-300})
    log.append(2, 1.0, {"train/elbo": math.nan, "eval/σ": np.float32(0.25)})
    log.close()
    expected = [
        {"update": 1, "epoch": 0.5, "train/elbo": -612.25, "chain/drift_norm": math.inf}
        | {"chain/z": -math.inf, "a/b": 1e-300},
        {"update": 2, "epoch": 1.0, "train/elbo": math.nan, "eval/σ": 0.25},
    ]
    assert same(MetricLog.read(log.path), expected)
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON: other languages read it too


def test_each_line_is_in_the_file_when_append_returns(open_log):
    log = open_log()
    for update in range(3):
        log.append(update, 0.0, {"train/elbo": 1.0})
        assert log.offset == log.path.stat().st_size
        assert len(MetricLog.read(log.path)) == update + 1
    log.sync()


@pytest.mark.parametrize("tail", ['{"update": 3, "epo', '{"update": 3, "epoch": 0.0}', "\0" * 200_000])
def test_a_torn_last_line_is_left_out_and_cut_off_before_the_next_append(open_log, tail):
    log = open_log()
    log.append(1, 0.0, {})
    whole = log.offset
    log.close()
    with open(log.path, "a") as file:
        file.write(tail)
    assert [row["update"] for row in MetricLog.read(log.path)] == [1]
    log = open_log()
    assert log.offset == whole
    log.append(2, 0.0, {})
    assert [row["update"] for row in MetricLog.read(log.path)] == [1, 2]


def test_a_bad_line_inside_the_log_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "epoch": 0.0}\n{"update": 2, "ep\n{"update": 3, "epoch": 0.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        MetricLog.read(path)


def test_rewind_then_repeat_gives_the_same_bytes_as_never_having_stopped(open_log):
    straight, resumed = map(open_log, ("straight", "resumed"))
    for update in range(10):
        straight.append(update, update / 4, {"train/elbo": -1.5 * update})
    for update in range(7):
        resumed.append(update, update / 4, {"train/elbo": -1.5 * update})
        if update == 3:
            checkpoint = resumed.offset
    resumed.close()
    with open(resumed.path, "a") as file:
        file.write('{"update": 7, "train/el')
    again = open_log("resumed")
    again.rewind(checkpoint)
    assert again.offset == again.path.stat().st_size == checkpoint
    for update in range(4, 10):
        again.append(update, update / 4, {"train/elbo": -1.5 * update})
    assert again.path.read_bytes() == straight.path.read_bytes()
    again.rewind(0)
    assert again.path.read_bytes() == b""


def test_rewind_refuses_a_log_that_is_not_the_checkpoints(open_log):
    log = open_log()
    log.append(1, 0.0, {"train/elbo": 1.0})
    before = log.path.read_bytes()
    for offset in (log.offset + 1, log.offset - 1):
        with pytest.raises(UserError, match=rf"{offset}\b") as error:
            log.rewind(offset)
        assert "\n" not in str(error.value)
    assert log.path.read_bytes() == before


def test_a_full_disk_raises_with_the_files_name_and_keeps_whole_lines(open_log):
    log = open_log()
    log.append(1, 0.0, {"train/elbo": 1.0})
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))  # the next line fits in part only
    try:
        with pytest.raises(OSError, match=r"cannot write metrics.*metrics\.jsonl"):
            Tracker(log).log(2, 0.0, {"train/elbo": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before
    log.append(2, 0.0, {})
    assert [row["update"] for row in MetricLog.read(log.path)] == [1, 2]


# The tracker ----------------------------------------------------------------------------------------------


class Recorder:
    """A sink that remembers its calls and fails from the `fails_at`-th on."""

    def __init__(self, fails_at=10**9):
        self.calls, self.fails_at = [], fails_at

    def _call(self, *call):
        self.calls.append(call)
        if len(self.calls) >= self.fails_at:
            raise ConnectionResetError("network\nis gone")

    def log(self, update, epoch, values):
        self._call("log", update, epoch, dict(values))

    def images(self, update, name, path):
        self._call("images", update, name, path)

    def summary(self, values):
        self._call("summary", dict(values))

    def close(self, status):
        self._call("close", status)


def test_a_failing_sink_is_dropped_with_one_warning_and_the_rest_goes_on(open_log, tmp_path, caplog):
    bad, good = Recorder(fails_at=2), Recorder()
    tracker = Tracker(open_log(), [bad, good])
    for update in range(4):
        tracker.log(update, 0.0, {"train/elbo": 1.0})
    tracker.images(4, "samples", tmp_path / "x.png")
    tracker.summary({"final/fid": 1.0})
    tracker.close("finished")
    assert [call[0] for call in bad.calls] == ["log", "log", "close"]
    assert [call[0] for call in good.calls] == ["log"] * 4 + ["images", "summary", "close"]
    assert len(MetricLog.read(tmp_path / "metrics.jsonl")) == 4
    warnings = [record.getMessage() for record in said(caplog) if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "network is gone" in warnings[0]


def test_a_rank_without_a_log_and_tracker_none_record_nothing(tmp_path):
    sink = NoTracker()
    tracker = Tracker(None, [sink])
    tracker.log(1, 0.0, {"train/elbo": 1.0})
    tracker.images(1, "samples", tmp_path / "none.png")
    tracker.summary({})
    tracker.close("finished")
    assert list(tmp_path.iterdir()) == []


def test_the_options_hold_exactly_the_constructors_values():
    run_time = {"run_id", "name", "group", "config", "folder", "resume_step", "more_tags"}
    for option, target, given in [("wandb", WandbTracker, run_time), ("none", NoTracker, set())]:
        values = yaml.safe_load((CONF / f"{option}.yaml").read_text())
        assert values.pop("_target_") == f"{target.__module__}.{target.__qualname__}"
        assert values.pop("_partial_") is True
        assert set(hints_of(target)) == set(values) | given


# Progress -------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for `time`: every reading is the hand's."""

    def __init__(self):
        self.hand = 1000.0

    def monotonic(self):
        return self.hand


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


VALUES = {
    "epoch": 1.5,
    "train/log_joint": -1234.5,
    "chain/delta_log_joint": 12.345,
    "chain/drift_norm_last": 0.5,
    "train/sigma": 0.125,
}


def test_lines_every_ten_seconds_with_the_speed_of_this_session(clock, caplog):
    caplog.set_level(logging.INFO, "lpc_runner")
    with Progress(console=Console(file=io.StringIO())) as progress:
        clock.hand += 60  # compilation: not part of the speed
        progress.update(901, 1000, {"eval/fd_random_conv": 3.25})
        for done in range(902, 1001):
            clock.hand += 0.5
            progress.update(done, 1000, VALUES)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "update 901/1000  -- ms/update  ETA --  fd_random_conv 3.25"
    assert lines[1] == (
        "epoch 1.50  update 921/1000  500 ms/update  ETA 0:00:40  "
        "log p(x, z) -1234  Δ log p 12.35  drift 0.5  σ 0.125  fd_random_conv 3.25"
    )
    assert len(lines) == 1 + 5 and lines[-1].startswith("epoch 1.50  update 1000/1000  500 ms/update  ETA 0:00:00")


def test_a_terminal_shows_bar_counters_and_values_within_80_columns(clock):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("lpc_runner").addHandler(handler)
    try:
        with Progress(console=console) as progress:
            for done in range(123_001, 123_005):
                clock.hand += 4.0
                progress.update(done, 200_000, VALUES | {"eval/fid": 39.64})
            assert handler.stream is sys.stderr  # rich's stand-in, so that a log line goes above the bar
            inner = io.StringIO()
            with Progress(console=Console(file=inner, force_terminal=True), unit="example"):
                assert inner.getvalue() == ""  # two bars would overwrite each other
        assert handler.stream is sys.stderr
    finally:
        logging.getLogger("lpc_runner").removeHandler(handler)
    text = screen.getvalue()
    assert "epoch 1.50  update 123004/200000  4e+03 ms/update  ETA 85:33:04" in text.replace("4000", "4e+03")
    assert "log p(x, z) -1234  Δ log p 12.35  drift 0.5  σ 0.125  fid 39.64" in text
    assert "…" not in text


def test_silent_and_unfinished_bars_say_nothing_and_break_nothing(clock, caplog):
    caplog.set_level(logging.INFO, "lpc_runner")
    screen = io.StringIO()
    with Progress(silent=True, console=Console(file=screen, force_terminal=True)) as progress:
        clock.hand += 100
        progress.update(1, 2, VALUES)
    with pytest.raises(KeyError), Progress(console=Console(file=io.StringIO(), force_terminal=True)):
        raise KeyError
    assert screen.getvalue() == "" and caplog.records == []
