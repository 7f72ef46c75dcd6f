"""`lpc-runner publish`: finished runs reach W&B once each, whatever came in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, only_run
from wandb_server import KEY, forget_wandb, make_run, running_server

from lpc_runner.base.errors import UserError
from lpc_runner.tracking import uploads
from lpc_runner.tracking.uploads import place_of, publish
from lpc_runner.tracking.wandb_service import Place

CLOCKS = ("time/", "_timestamp", "_runtime", "_wandb")


@pytest.fixture
def server(tmp_path, monkeypatch):
    with running_server(tmp_path, monkeypatch) as server:
        yield server


def without_clocks(values):
    return {key: value for key, value in values.items() if not key.startswith(CLOCKS)}


def content(stored):
    """What W&B holds of a run, without what clocks say."""
    pictures = {name: data for name, data in stored.files.items() if name.startswith("media/")}
    return [without_clocks(row) for row in stored.history], without_clocks(stored.summary), pictures


def test_a_published_run_is_the_run_that_an_online_one_would_have_been(server, command):
    once = ["trainer.batch_size=300", "trainer.max_updates=8", "metrics.every_epochs=1"]
    assert command(*TINY, *once, "tracker=wandb", "tracker.mode=online", "output_dir=live").code == 0
    assert command(*TINY, *once, "output_dir=quiet").code == 0
    (live,) = server.runs.values()
    assert [name for name, _ in publish(Path("quiet/default"), project="copy")] == [live.name]
    copy = server.runs[f"copy/{live.name}"]
    assert len(live.history) == 8 and len(content(live)[2]) == 3
    assert content(copy) == content(live)
    places = ("config", "_wandb")  # the nested configuration names tracker and folder, which differ here
    assert {k: v for k, v in copy.config.items() if k not in places} == {
        k: v for k, v in live.config.items() if k not in places
    }
    assert copy.config["config"]["sampler"] == live.config["config"]["sampler"]
    assert copy.fields["groupName"] == live.fields["groupName"] == "default"
    # What was online is asked for, not sent.
    sent = live.lines_sent
    assert dict(publish(only_run(Path("live")))) == {live.name: "already there"}
    assert live.lines_sent == sent == 8


def test_every_finished_run_goes_once(server, tmp_path, monkeypatch):
    outputs = tmp_path / "outputs"
    runs = [make_run(outputs, f"digits-lpc-s{seed}-1a2b", seed=seed) for seed in (0, 1)]
    make_run(outputs, "digits-lpc-s2-1a2b", status="failed", seed=2)
    make_run(outputs, "digits-lpc-s3-1a2b", status="diverged", seed=3)
    first = dict(publish(outputs / "fig4"))
    assert [done.partition(":")[0] for done in first.values()] == ["published", "published", "left out", "published"]
    asked = len(server.requests)
    assert set(dict(publish(outputs / "fig4")).values()) == {"already there", "left out: failed"}
    assert not {"file_stream", "upload", "UpsertBucket"} & set(server.requests[asked:])
    (runs[0].path / "published.json").unlink()  # without the note the server is asked, and nothing is sent twice
    assert dict(publish(runs[0].path))[runs[0].name].startswith("published: 0 of 3 rows")
    for stored in server.runs.values():
        assert [row["_step"] for row in stored.history] == [1, 10, 20] and stored.lines_sent == 3
        assert stored.history[1].items() >= {"train/elbo": -10, "eval/fd_random_conv": 9.5, "epoch": 1}.items()
        assert {row["_step"] for row in stored.history if "samples" in row} == {10, 20}
        assert stored.summary["final/fd_random_conv"] == 7.25 and stored.fields["tags"] == ["mine"]
    assert server.runs["lpc_test/digits-lpc-s3-1a2b"].summary["status"] == "diverged"
    assert len(server.runs) == 3


def test_a_run_that_another_study_shares_is_tagged_with_it(server, tmp_path):
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    list(publish(run.path))
    run.write("run.json", run.description() | {"studies": ["fig4", "table1"]})
    list(publish(run.path))
    (stored,) = server.runs.values()
    assert stored.fields["tags"] == ["mine", "table1"] and stored.lines_sent == 3
    assert dict(publish(run.path)) == {run.name: "already there"}


def test_an_upload_interrupted_anywhere_is_completed_by_the_next(server, tmp_path, monkeypatch):
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    real = uploads._Replay.row

    def dies(self, update, row):
        if update == 20:
            self._run.finish(exit_code=1)  # what was sent so far arrives
            raise KeyboardInterrupt
        return real(self, update, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(uploads._Replay, "row", dies)
        list(publish(run.path))
    (stored,) = server.runs.values()
    assert [row["_step"] for row in stored.history] == [1, 10]
    lost = next(name for name in stored.files if name.startswith("media/images/samples_10_"))
    del stored.files[lost]  # pictures travel apart from rows
    assert dict(publish(run.path))[run.name].startswith("published: 1 of 3 rows")
    assert [row["_step"] for row in stored.history] == [1, 10, 20] and stored.lines_sent == 3
    named = {row[key]["path"] for row in stored.history for key in ("samples", "reconstructions") if key in row}
    assert named == {name for name in stored.files if name.startswith("media/")} and lost in named


def test_a_server_that_loses_data_is_not_believed(server, tmp_path, monkeypatch):
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    monkeypatch.setattr(uploads, "_PATIENCE", 0)
    monkeypatch.setattr(type(server), "upload", lambda *arguments: None)
    with pytest.raises(UserError, match="does not show all of digits-lpc-s0-1a2b yet: run this again"):
        list(publish(run.path))
    assert not any(mark["complete"] for mark in json.loads((run.path / "published.json").read_text()).values())
    monkeypatch.undo()


def script(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lpc_runner", "publish", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def test_without_key_or_server_the_command_says_so_in_one_line(tmp_path, monkeypatch):
    forget_wandb(monkeypatch, tmp_path / "home")
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    done = script(run.path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "no W&B API key found: run `wandb login`" in done.stderr
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    done = script(run.path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "127.0.0.1:9" in done.stderr and KEY not in done.stderr
    assert not (run.path / "published.json").exists()


def test_impossible_requests_are_one_line(tmp_path, monkeypatch):
    forget_wandb(monkeypatch, tmp_path / "home")
    with pytest.raises(UserError, match="holds no runs: give outputs/<study>"):
        list(publish(tmp_path))
    run = make_run(tmp_path / "outputs", "digits-lpc-s0-1a2b")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="WANDB_MODE=offline: unset it"):
        list(publish(run.path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(UserError, match="unset WANDB_SWEEP_ID"):
        list(publish(run.path))


def test_a_run_belongs_to_an_entity_and_a_project():
    """What was asked for goes before the run's own, and that before the account's default."""
    own = {"project": "lpc", "entity": "team"}
    assert place_of(own, None, None, "w", "me") == Place("w", "team", "lpc")
    assert place_of(own, "other", "else", "w", "me") == Place("w", "other", "else")
    assert place_of({"project": "lpc"}, None, None, "w", "me") == Place("w", "me", "lpc")
    with pytest.raises(UserError, match="no default entity: give one with --entity"):
        place_of({"project": "lpc"}, None, None, "w", None)
