"""W&B online, over HTTP, against a local stand-in: what the server gets, and what its going away costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from wandb_server import ENTITY, KEY, StoredSweep, make_run, running_server

from lpc_runner.ls import list_runs
from lpc_runner.store.log import MetricLog
from lpc_runner.tracking.tracker import Tracker
from lpc_runner.tracking.uploads import publish
from lpc_runner.tracking.wandb_run import WandbTracker

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIG = {"dataset": "digits", "step_size": 0.1, "beta": 0.25, "config": {"sampler": {"num_steps": 30}}}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with running_server(tmp_path, monkeypatch) as server:
        yield server


def start(folder, mode="online", **more):
    folder.mkdir(exist_ok=True)
    run_time = {"run_id": "digits-1a2b", "name": "digits", "group": "fig4", "config": CONFIG, "folder": folder}
    return WandbTracker(mode, "lpc_test", None, ["mine"], **(run_time | more))


def test_the_server_gets_rows_settings_pictures_and_summary_and_a_resumed_run_goes_on(server, tmp_path, capfd):
    picture = tmp_path / "final.png"
    Image.new("RGB", (4, 4), (9, 8, 7)).save(picture)
    sink = start(tmp_path / "run", more_tags=("table1",))
    for update in (1, 10, 20):
        sink.log(update, update / 10, {"train/elbo": -float(update)})
    sink.close("interrupted")
    stored = server.runs["lpc_test/digits-1a2b"]
    assert stored.exit_code == 1

    sink = start(tmp_path / "run", more_tags=("table1",), resume_step=10)
    for update in (20, 30):  # training repeats what follows the checkpoint; the server has row 20
        sink.log(update, update / 10, {"train/elbo": -float(update)})
    sink.images(30, "samples", picture)
    sink.summary({"final/fid": 3.5})
    sink.close("finished")

    rows = [(row["_step"], row["epoch"], row["train/elbo"]) for row in stored.history]
    assert rows == [(1, 0.1, -1), (10, 1, -10), (20, 2, -20), (30, 3, -30)]
    assert stored.lines_sent == 4
    assert stored.config.items() >= CONFIG.items()
    fields = {"groupName": "fig4", "displayName": "digits", "tags": ["mine", "table1"], "project": "lpc_test"}
    assert stored.fields.items() >= fields.items()
    assert stored.summary.items() >= {"final/fid": 3.5, "status": "finished", "resumed_at": 10}.items()
    assert stored.files[stored.history[-1]["samples"]["path"]] == picture.read_bytes()
    assert stored.exit_code == 0 and set(server.runs) == {"lpc_test/digits-1a2b"}
    assert capfd.readouterr() == ("", "") and KEY not in (tmp_path / "run" / "published.json").read_text()


def test_what_an_offline_run_prints_uploads_all_of_its_sessions(server, tmp_path, caplog):
    folder = tmp_path / "a 'quoted' run"
    # The second session repeats what came after the checkpoint: of a step given twice, W&B would make another row.
    for updates, status in (((1, 10, 20), "interrupted"), ((20, 30), "finished")):
        with caplog.at_level("INFO", "lpc_runner"):
            sink = start(folder, mode="offline")
        tracker = Tracker(MetricLog(folder / "metrics.jsonl"), [sink])
        for update in updates:
            tracker.log(update, update / 10, {"train/elbo": -float(update)})
        tracker.close(status)
    line = next(message for message in reversed(caplog.messages) if "wandb sync" in message)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line.split("`")[1]],
        cwd=tmp_path,  # where W&B writes its own log
        env={**os.environ, "PATH": path, "WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (stored,) = server.runs.values()
    assert [row["_step"] for row in stored.history] == [1, 10, 20, 30], done.stdout + done.stderr
    assert stored.exit_code == 0


def test_an_agents_run_takes_the_agents_id_and_publishing_knows_it(server, tmp_path, monkeypatch):
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agent7")
    monkeypatch.setenv("WANDB_PROJECT", "lpc_test")
    sink = start(run.path, run_id=run.name)
    sink.log(1, 0.1, {"eval/fd_random_conv": 9.5})
    sink.close("finished")
    stored = server.runs["lpc_test/agent7"]
    assert stored.fields["sweep"] == "sweep1" and len(stored.history) == 1
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name)
    assert dict(publish(run.path))[run.name].startswith("published")
    assert set(server.runs) == {"lpc_test/agent7"} and [row["_step"] for row in stored.history] == [1, 10, 20]


@pytest.mark.faults
def test_an_agent_pulls_runs_from_a_sweep_and_may_stop_one_early(server, tmp_path):
    """`wandb agent` itself: runs of scripts/sweep_bayes.yaml's command, the second stopped as by hyperband.

    The last has the first one's values: its numbers are the first one's.
    """
    config = yaml.safe_load((SCRIPTS / "sweep_bayes.yaml").read_text())
    swap = {"dataset=svhn": "dataset=digits", "metrics.every_epochs=1": "metrics.num_samples=40"}
    config["command"] = [swap.get(word, word) for word in config["command"]]
    small = ["model=mlp", "model.hidden=[16]", "model.latent_dim=4", "sampler.num_steps=3", "metrics.max_references=40"]
    config["command"][-1:-1] = [*small, "trainer.batch_size=16", "trainer.log_every=1", "num_threads=1", "device=cpu"]
    config["command"][-1:-1] = ["trainer.num_epochs=100000"]
    values = {"step_size.value": 0.01, "preconditioning.beta": 0.5, "optimizer.learning_rate": 0.001}
    lengths = {"first": 20, "second": 100_000, "third": 30, "again": 20}
    waiting = {name: values | {"trainer.max_updates": count} for name, count in lengths.items()}
    server.sweeps["sweep1"] = StoredSweep(config, waiting, stop=("second",))

    binaries = Path(sys.executable).parent
    more = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    more |= {"WANDB_AGENT_REPORT_INTERVAL": "0", "WANDB_MODE": "online"}
    command = [str(binaries / "wandb"), "agent", "tester/lpc_test/sweep1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | more, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr

    stored = {run.name: run for run in server.runs.values()}
    assert list(stored) == ["first", "second", "third", "again"], done.stderr
    assert {run.fields["sweep"] for run in stored.values()} == {"sweep1"}
    assert stored["first"].exit_code == stored["third"].exit_code == 0 and stored["second"].exit_code != 0
    assert stored["first"].history[-1]["_step"] == 20
    first, again = ({k: v for k, v in stored[name].summary.items() if k[0] != "_"} for name in ("first", "again"))
    assert again == first and len(stored["again"].history) == len(stored["first"].history)
    assert any(key.startswith("final/") for key in again) and stored["again"].exit_code == 0
    assert sorted(run.state for run in list_runs(tmp_path / "outputs")) == ["done", "done", "interrupted"]


SCRIPT = """
import logging, sys, time
from pathlib import Path
from lpc_runner.tracking import wandb_run
from lpc_runner.store.log import MetricLog
from lpc_runner.tracking.tracker import Tracker

logging.basicConfig(level=logging.WARNING, format="%(message)s")
wandb_run.SETTINGS.update(finish_timeout=2, x_file_stream_transmit_interval=1)
folder = Path(sys.argv[1])
run_time = dict(run_id=folder.name, name=folder.name, group="fig4", config={}, folder=folder)
sink = wandb_run.WandbTracker("auto", "lpc_test", None, [], **run_time)
tracker = Tracker(MetricLog(folder / "metrics.jsonl"), [sink])
slowest = 0.0
for update in range(1, 41):
    began = time.monotonic()
    tracker.log(update, update / 10, {"train/elbo": -float(update)})
    slowest = max(slowest, time.monotonic() - began)
    time.sleep(0.1)
tracker.close("finished")
print(sink.mode, slowest)
"""


def train_while(server, tmp_path, leave, *, at_start=False):
    """A process logs 40 rows in 4 s and the server leaves on the way; returns (run, process, its output, seconds)."""
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    (run.path / "metrics.jsonl").unlink()
    began = time.monotonic()
    if at_start:
        leave()
    # Not a pipe: W&B's service process would hold it open after ours has ended.
    with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
        command = [sys.executable, "-c", SCRIPT, str(run.path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            while not at_start and not any(stored.lines for stored in server.runs.values()):
                assert process.poll() is None and time.monotonic() - began < 30
                time.sleep(0.05)
            if not at_start:
                leave()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait()
        seconds = time.monotonic() - began
    return run, (tmp_path / "out").read_text(), (tmp_path / "err").read_text(), seconds


def assert_training_went_on_and_publishing_completes(server, run, out, err, seconds):
    mode, slowest = out.split()
    assert mode == "online" and float(slowest) < 1
    assert [row["update"] for row in MetricLog.read(run.path / "metrics.jsonl")] == list(range(1, 41))
    assert err.count("\n") == 1 and "did not take everything within 2 s" in err and str(run.path) in err
    assert seconds < 30  # 4 s of rows, 2 s until finishing gives up, 5 s for the service, starting up
    (stored,) = server.runs.values()
    assert 0 < len(stored.history) < 40
    server.up()
    assert dict(publish(run.path))[run.name].startswith("published")
    assert [row["_step"] for row in stored.history] == list(range(1, 41))
    assert stored.summary["status"] == "finished" and len(server.runs) == 1


@pytest.mark.faults
def test_a_server_closed_in_mid_run_costs_nothing_and_publishing_completes(server, tmp_path):
    result = train_while(server, tmp_path, server.down)
    assert_training_went_on_and_publishing_completes(server, *result)


@pytest.mark.faults
def test_a_server_that_hangs_in_mid_run_costs_nothing_and_publishing_completes(server, tmp_path):
    result = train_while(server, tmp_path, server.hang)
    assert_training_went_on_and_publishing_completes(server, *result)


@pytest.mark.faults
@pytest.mark.parametrize("leave", ["down", "hang"])
def test_a_server_absent_from_the_start_means_offline(server, tmp_path, leave):
    run, out, err, seconds = train_while(server, tmp_path, getattr(server, leave), at_start=True)
    assert out.split()[0] == "offline" and err == ""
    assert len(MetricLog.read(run.path / "metrics.jsonl")) == 40 and seconds < 60
    assert list((run.path / "wandb").glob("offline-run-*"))


def test_a_tracker_that_lost_the_server_is_not_noted_as_complete(server, tmp_path):
    tracker = Tracker(None, [start(tmp_path / "run")])
    tracker.log(1, 0.0, {"train/elbo": 1.0})
    tracker.close("finished")
    (mark,) = json.loads((tmp_path / "run" / "published.json").read_text()).values()
    assert mark == {"run_id": "digits-1a2b", "studies": ["fig4"], "complete": False}
