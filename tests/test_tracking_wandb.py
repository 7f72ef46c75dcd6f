"""Weights & Biases, run for real and offline: it never asks, stops no run, keeps to the run's folder."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpc_runner.base.errors import UserError
from lpc_runner.store.log import MetricLog
from lpc_runner.tracking import wandb_service
from lpc_runner.tracking.tracker import Tracker
from lpc_runner.tracking.wandb_run import WandbTracker

CONFIG = {"dataset": "digits", "step_size": 0.1, "sampler": {"num_steps": 30}}


def said(caplog):
    """Our own log records: pytest also catches W&B's, which nothing outside its debug files shows."""
    return [record for record in caplog.records if record.name == "lpc_runner"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No key, no settings of whoever runs the tests; W&B's service is down before and after."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "")  # means: not set; and what a fallback leaves here is undone
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    if "wandb" in sys.modules:
        wandb_service.tear_down()
    yield home
    if "wandb" in sys.modules:
        wandb_service.tear_down()


def start(folder, mode="auto", tags=(), **more):
    folder.mkdir(exist_ok=True)
    arguments = {
        "run_id": "digits-1a2b",
        "name": "digits",
        "group": "fig4",
        "config": CONFIG,
        "folder": folder,
    }
    return WandbTracker(mode=mode, project="lpc_test", entity=None, tags=list(tags), **(arguments | more))


def leet(*arguments):
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", "--json", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def records(folder, kind):
    rows = map(json.loads, leet(folder).splitlines())
    return [row[kind] for row in rows if row["type"] == kind]


def test_offline_run_holds_the_values_steps_config_and_pictures(home, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "lpc_runner")
    before = dict(os.environ)
    sink = start(tmp_path / "run", "offline", tags=["a"], more_tags=("a", "table1"), resume_step=10)
    tracker = Tracker(MetricLog(tmp_path / "run" / "metrics.jsonl"), [sink])
    picture = tmp_path / "run" / "samples.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(picture)
    for update in (10, 20, 30):
        tracker.log(update, update / 10, {"train/elbo": -float(update), "chain/drift_norm": math.inf})
        if update == 20:
            tracker.images(update, "samples/prior", picture)
    tracker.summary({"final/fid": 12.5})
    tracker.close("diverged")

    history = [item["item"] for item in records(sink.folder, "history")]
    assert [(row["_step"], row["epoch"], row["train/elbo"]) for row in history] == [
        (10, 1, -10),
        (20, 2, -20),
        (30, 3, -30),
    ]
    assert history[0]["chain/drift_norm"] == "Infinity"
    shown = json.dumps(history[1])
    media = list(sink.folder.glob("files/media/images/samples/prior_20_*.png"))
    assert len(media) == 1 and media[0].read_bytes() == picture.read_bytes() and media[0].name in shown

    summary = json.loads(leet("--summary", sink.folder))
    assert summary["config"] == CONFIG
    assert (summary["run_id"], summary["name"], summary["project"]) == ("digits-1a2b", "digits", "lpc_test")
    assert summary["tags"] == ["a", "table1"] and summary["exit_code"] == 0
    expected = {"final/fid": 12.5, "status": "diverged", "resumed_at": 10, "train/elbo": -30}
    assert summary["summary"].items() >= expected.items()
    assert records(sink.folder, "run")[0]["run_group"] == "fig4"

    assert capfd.readouterr() == ("", "")
    sessions = f"{sink.folder.parent}/offline-run-*"
    assert [record.getMessage() for record in said(caplog)] == [f"W&B offline: upload with `wandb sync {sessions}`"]
    changed = {name for name in os.environ if os.environ[name] != before.get(name)} - {"PYTEST_CURRENT_TEST"}
    assert changed <= {"WANDB_SERVICE"}


def test_auto_without_key_goes_offline_at_once_and_two_runs_share_a_process(home, tmp_path, caplog, capfd, monkeypatch):
    """At once: nobody is asked, neither at the terminal nor over the network."""
    import wandb  # noqa: F401 (whose import would count otherwise)

    nobody = socket.create_server(("127.0.0.1", 0))
    nobody.setblocking(False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    caplog.set_level(logging.INFO, "lpc_runner")
    folders = []
    for name, status in [("first", "failed"), ("second", "interrupted")]:
        began = time.monotonic()
        sink = start(tmp_path / name)
        assert time.monotonic() - began < 5
        assert sink.mode == "offline" and sink.folder.is_relative_to(tmp_path / name / "wandb")
        sink.log(1, 0.0, {"train/elbo": 1.0})
        sink.close(status)
        folders.append(sink.folder)
    with nobody, pytest.raises(BlockingIOError):
        nobody.accept()
    assert ["no API key" in record.getMessage() for record in said(caplog)] == [True, True]
    assert capfd.readouterr() == ("", "")
    assert [records(folder, "exit")[0]["exit_code"] for folder in folders] == [1, 1]


def test_online_without_key_is_one_line_and_leaves_the_environment(home, tmp_path, capfd):
    with pytest.raises(UserError, match=r"tracker\.mode=online: no W&B API key.*wandb login") as error:
        start(tmp_path / "run", "online")
    assert "\n" not in str(error.value)
    assert "WANDB_DIR" not in os.environ
    assert capfd.readouterr() == ("", "")


KEY = "0123456789" * 4


@pytest.fixture
def unreachable(home, monkeypatch):
    """A key, and a server that nobody runs: what a machine without network sees, but at once."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")


def test_auto_with_key_but_no_network_falls_back_and_tells_the_jobs_that_follow(unreachable, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lpc_runner")
    sink = start(tmp_path / "run")
    sink.log(3, 0.0, {"train/elbo": 1.0})
    sink.close("finished")
    assert sink.mode == "offline" and os.environ["WANDB_MODE"] == "offline"
    assert len(said(caplog)) == 1 and "wandb sync" in said(caplog)[0].getMessage()
    assert KEY not in caplog.text
    assert records(sink.folder, "history")[0]["item"]["_step"] == 3


def test_a_wandb_service_that_does_not_end_delays_the_fallback_only_so_long(home, tmp_path, monkeypatch):
    import wandb

    def refuse(**arguments):
        raise wandb.errors.CommError("the service process is busy")

    released, real = threading.Event(), wandb.teardown
    monkeypatch.setattr(wandb, "login", refuse)
    monkeypatch.setattr(wandb, "teardown", lambda: (real(), released.wait(30)))
    monkeypatch.setattr(wandb_service, "_TEARDOWN_SECONDS", 1)
    try:
        began = time.monotonic()
        sink = start(tmp_path / "run")
        assert sink.mode == "offline" and time.monotonic() - began < 10
        sink.close("finished")
    finally:
        released.set()
        monkeypatch.setattr(wandb, "teardown", real)


def test_online_with_key_but_no_network_is_one_line(unreachable, tmp_path):
    with pytest.raises(UserError, match=r"^tracker\.mode=online: ") as error:
        start(tmp_path / "run", "online")
    assert "\n" not in str(error.value) and KEY not in str(error.value)


def test_wandb_mode_goes_before_the_file(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sink = start(tmp_path / "run", "online")
    sink.log(1, 0.0, {"train/elbo": 1.0})
    sink.images(1, "samples", tmp_path / "none.png")
    sink.summary({"final/fid": 1.0})
    sink.close("finished")
    assert (sink.mode, sink.folder, list((tmp_path / "run").iterdir())) == ("disabled", None, [])
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE must be one of online, offline, disabled, got 'onlin'"):
        start(tmp_path / "run")


def test_auto_with_a_server_goes_online_and_leaves_no_service_behind(home, tmp_path, monkeypatch):
    import wandb

    asked, init = [], wandb.init
    monkeypatch.setattr(wandb, "login", lambda prompt: not prompt)
    monkeypatch.setattr(wandb, "init", lambda mode, **rest: (asked.append(mode), init(mode="offline", **rest))[1])
    sink = start(tmp_path / "run")
    sink.log(1, 0.0, {"train/elbo": 1.0})
    sink.close("finished")
    assert (sink.mode, asked) == ("online", ["online"])
    assert "WANDB_SERVICE" not in os.environ
    assert len(records(sink.folder, "history")) == 1


def test_what_wandb_is_asked_for(home, tmp_path, monkeypatch):
    import wandb

    asked = []

    def init(**arguments):
        asked.append(arguments)
        raise wandb.errors.CommError("no more")

    monkeypatch.setattr(wandb, "init", init)
    start(tmp_path / "run", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    start(tmp_path / "run", "offline")
    alone, agent = asked
    wanted = {
        "id": "digits-1a2b",
        "resume": "allow",
        "reinit": "create_new",
        "mode": "offline",
        "group": "fig4",
    }
    assert alone.items() >= wanted.items()
    settings = alone["settings"]
    assert (settings.console, settings.init_timeout, settings.finish_timeout) == ("off", 20, 60)
    assert settings.x_transaction_log_flush_interval == 2
    assert not {"id", "resume", "project", "entity"} & set(agent)


def test_wandb_failing_in_mid_run_does_not_stop_it(home, tmp_path, monkeypatch, caplog):
    sink = start(tmp_path / "run", "offline")
    tracker = Tracker(MetricLog(tmp_path / "run" / "metrics.jsonl"), [sink])
    tracker.log(1, 0.0, {"train/elbo": 1.0})

    def fail(*args, **kwargs):
        raise BrokenPipeError("service is gone")

    monkeypatch.setattr(sink._run, "log", fail)
    for update in (2, 3):
        tracker.log(update, 0.0, {"train/elbo": 1.0})
    tracker.close("finished")
    assert len(MetricLog.read(tmp_path / "run" / "metrics.jsonl")) == 3
    assert [record.levelname for record in said(caplog)] == ["WARNING"]
    assert [row["step"]["num"] for row in records(sink.folder, "history")] == [1]  # saved up to the failure
    assert "WANDB_DIR" not in os.environ


def test_rows_that_wandb_already_has_are_not_sent_again(home, tmp_path):
    sink = start(tmp_path / "run", "offline")
    sink._first = 3  # what an online run resumed after its row 2 reports
    for update in range(5):
        sink.log(update, 0.0, {"train/elbo": float(update)})
    sink.close("finished")
    assert [row["step"]["num"] for row in records(sink.folder, "history")] == [3, 4]


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from lpc_runner.store.log import MetricLog
from lpc_runner.tracking.tracker import Tracker
from lpc_runner.tracking.wandb_run import WandbTracker

def run(name, kill=False):
    folder = Path(name).absolute()
    folder.mkdir()
    sink = WandbTracker("auto", "p", None, [], run_id="r", name="n", group=None, config={}, folder=folder)
    tracker = Tracker(MetricLog(folder / "metrics.jsonl"), [sink])
    for update in range(20):
        tracker.log(update, 0.0, {"train/elbo": 1.0})
        if kill and update == 10:
            os.kill(service(), signal.SIGKILL)
            time.sleep(0.2)
    tracker.close("finished")

def service():
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\\t{os.getpid()}\\n" in status.read_text():
                return int(status.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            pass

run("killed", kill=True) if "kill" in sys.argv else None
run("run")
"""


def script(tmp_path, *arguments):
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    places = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "XDG_CACHE_HOME": "xdg",
        "XDG_CONFIG_HOME": "xdg",
        "XDG_DATA_HOME": "xdg",
    }
    environment = keep | {name: str(tmp_path / place) for name, place in places.items()}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for place in ("home", "tmp", "xdg", "work"):
        (tmp_path / place).mkdir()
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=tmp_path / "work",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_leaves_nothing_outside_the_runs_folder(tmp_path):
    done = script(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {("work", "run")}
    assert {path.name for path in (tmp_path / "work" / "run").iterdir()} == {"metrics.jsonl", "wandb"}


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds W&B's service process in /proc")
def test_wandbs_service_killed_in_mid_run_costs_only_that_runs_wandb(tmp_path):
    done = script(tmp_path, "kill")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1 and "is off for the rest of this run" in done.stderr
    for name in ("killed", "run"):
        assert len(MetricLog.read(tmp_path / "work" / name / "metrics.jsonl")) == 20
    (after,) = (tmp_path / "work" / "run" / "wandb").glob("offline-run-*")
    assert len(records(after, "history")) == 20
