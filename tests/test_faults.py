"""Faults from outside a run: full disks, read-only and odd folders, changed code, torn records."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_run, only_run, plan_of, result_of

from lpc_runner.base.errors import UserError
from lpc_runner.runner.run import execute
from lpc_runner.store.checkpoints import load_checkpoint
from lpc_runner.store.runs import RunDirectory
from lpc_runner.training.learner import Learner

SETTINGS = (*TINY, "trainer.checkpoint_seconds=1e-9")


def at_update(monkeypatch, update: int, act) -> None:
    """Do something in the middle of training."""
    real = Learner.gradients

    def gradients(self, batch, seed, number, *args, **kwargs):
        if number == update:
            act()
        return real(self, batch, seed, number, *args, **kwargs)

    monkeypatch.setattr(Learner, "gradients", gradients)


@pytest.fixture
def straight(workplace) -> Path:
    """The run that nothing disturbed."""
    planned = plan_of(*SETTINGS, "output_dir=straight")
    execute(planned)
    return planned.directory.path


@pytest.fixture
def file_size_limit():
    """`file_size_limit(n)`: no file of this process grows beyond n bytes; the system refuses, as with a full disk.

    None: as before.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_write_that_the_system_refuses_fails_the_run_and_a_rerun_ends_it(
    what, straight, monkeypatch, file_size_limit, command
):
    """The real refusal, in the middle of a file: half a line or half a checkpoint is written before it."""
    settings = SETTINGS if what == "checkpoint" else TINY
    planned = plan_of(*settings)
    log = planned.directory.path / "metrics.jsonl"
    room = {"checkpoint": 3000, "log": 100}[what]  # a row takes some 500 bytes, a checkpoint 100 kB
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: file_size_limit(log.stat().st_size + room))
        answer = command(*settings)
        file_size_limit(None)
    run = only_run()
    assert answer.code == 1 and result_of(run)["status"] == "failed"
    assert "File too large" in result_of(run)["error"] and "File too large" in answer.lines[-1]
    assert all(line.endswith("}") for line in log.read_text().splitlines()) and log.read_bytes().endswith(b"\n")
    assert not list(run.rglob("*.tmp"))
    if what == "checkpoint":
        assert load_checkpoint(run / "checkpoints")["counters"]["update"] == 4
    assert command(*settings).code == 0
    assert_same_run(straight, run)


def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(command, workplace, monkeypatch):
    (workplace / "file").write_text("")
    answer = command(*TINY, "output_dir=file/outputs")
    assert (
        answer.code == 1 and len(answer.lines) == 1 and "file is a file" in answer.err and "output_dir=" in answer.err
    )
    readonly = workplace / "readonly"
    readonly.mkdir()
    real = os.access  # root may write anywhere but on a read-only file system: what that answers is put here
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != readonly and real(path, mode))
    answer = command(*TINY, f"output_dir={readonly}/outputs")
    assert answer.code == 1 and len(answer.lines) == 1 and "readonly is read-only" in answer.err
    assert list(readonly.iterdir()) == []


@pytest.mark.parametrize("place", ["outputs/runs/{name}", "outputs/default"])
def test_a_folder_of_another_user_s_is_one_line_before_any_work(place, command, workplace, monkeypatch):
    theirs = workplace / place.format(name=plan_of(*TINY).directory.name)
    theirs.mkdir(parents=True)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != theirs and real(path, mode))
    answer = command(*TINY)
    assert answer.code == 1 and len(answer.lines) == 1 and f"{theirs} is read-only" in answer.err, answer.err
    assert list(theirs.iterdir()) == []


@pytest.mark.parametrize("name", [
    "Größe ñ 数据 'f' $g;h", "-m",
    pytest.param("two words", marks=pytest.mark.slow), pytest.param("a=b,c [d] {e}", marks=pytest.mark.slow),
])  # fmt: skip
def test_odd_paths(name, command, workplace, straight, monkeypatch):
    """Run, stop, resume, measure again, sample and list in a folder of that name."""
    import lpc_runner.evaluate
    import lpc_runner.ls
    import lpc_runner.sample

    odd = workplace / name
    odd.mkdir()
    monkeypatch.chdir(odd)
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
        assert command(*SETTINGS).code == 1
    assert command(*SETTINGS).code == 0
    assert_same_run(workplace / straight, only_run())
    assert command(str(only_run().absolute()), entry=lpc_runner.evaluate.main).code == 0
    assert command(str(only_run().absolute()), "--num", "4", entry=lpc_runner.sample.main).code == 0
    assert "1 done" in command(str(odd / "outputs"), entry=lpc_runner.ls.main).out


def test_other_code_under_a_run_is_said(workplace, monkeypatch, caplog):
    planned = plan_of(*SETTINGS)
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
        patch.setattr("lpc_runner.store.environment.git_commit", lambda: "0ld")
        with pytest.raises(RuntimeError, match="stop"):
            execute(planned)
    with caplog.at_level(logging.WARNING):
        execute(plan_of(*SETTINGS))
    assert any("the code changed under this run" in line and "0ld" in line for line in caplog.messages)


@pytest.mark.parametrize("kind, says", [("cuda", True), ("cpu", False)])
def test_a_run_that_goes_on_on_another_kind_of_device_says_so(workplace, monkeypatch, caplog, kind, says):
    planned = plan_of(*SETTINGS)
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            execute(planned)
    sessions = planned.directory.path / "sessions.jsonl"
    assert json.loads(sessions.read_text())["device_kind"] == "cpu"
    sessions.write_text(sessions.read_text().replace('"device_kind": "cpu"', f'"device_kind": "{kind}"'))
    with caplog.at_level(logging.WARNING):
        execute(plan_of(*SETTINGS))
    assert any("begun on cuda, now on cpu" in line for line in caplog.messages) == says


def test_a_device_without_memory_left_is_one_line(command, straight, monkeypatch):
    """It names what takes less, and a rerun goes on from the checkpoint."""

    def refuse():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        at_update(patch, 4, refuse)
        answer = command(*SETTINGS)
    assert answer.code == 1 and "Traceback" not in answer.out + answer.err
    assert "trainer.batch_size (16) or runs_per_gpu (1) takes less" in answer.out + answer.err
    assert result_of(only_run())["status"] == "failed" and "2.00 GiB" in result_of(only_run())["error"]
    assert command(*SETTINGS).code == 0
    assert_same_run(straight, only_run())


def test_the_commit_is_that_of_the_package_whatever_repository_git_is_told(monkeypatch, tmp_path):
    """A git hook and `git rebase --exec` set GIT_DIR for what they start."""
    from lpc_runner.store.environment import _git

    for name in ("package", "other"):
        subprocess.run(["git", "init", "-q", tmp_path / name], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert _git(tmp_path / "package", "rev-parse", "--show-toplevel") == str((tmp_path / "package").resolve())


def test_a_package_without_metadata_costs_its_version_only(monkeypatch):
    from importlib import metadata

    from lpc_runner.store.environment import describe_environment

    def version(name: str) -> str:
        if name == "torchvision":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    packages = describe_environment(torch.device("cpu"))["packages"]
    assert packages["torchvision"] is None and packages["torch"] == "1.0"


def test_a_sweep_that_started_this_command_does_not_say_what_it_runs(command, workplace, monkeypatch):
    """The plan's variable reaches whatever a job of a sweep starts."""
    monkeypatch.setenv("LPC_RUNNER_PLAN", "/nowhere/plan.json")
    assert command(*TINY).code == 0


def test_the_same_code_says_nothing(workplace, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            execute(plan_of(*SETTINGS))
    with caplog.at_level(logging.WARNING):
        execute(plan_of(*SETTINGS))
    assert not any("the code changed" in line for line in caplog.messages)


def test_another_configuration_is_another_run_and_a_renamed_folder_is_refused(workplace, command):
    assert command(*SETTINGS).code == 0
    changed = plan_of(*SETTINGS, "optimizer.learning_rate=0.5")
    assert changed.directory.path.name != only_run().name
    shutil.copytree(only_run().resolve(), changed.directory.path)
    (changed.directory.path / "result.json").unlink()
    before = sorted(changed.directory.path.rglob("*"))
    with pytest.raises(UserError, match=r"belongs to another configuration .* move the folder away"):
        execute(changed)
    assert [path for path in sorted(changed.directory.path.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


def test_a_torn_session_line_costs_that_line_only(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_session({"number": 1})
    with open(tmp_path / "sessions.jsonl", "ab") as file:
        file.write(b'{"number": 2, "comm')
    assert run.last_session() == {"number": 1}
    run.append_session({"number": 3})
    lines = (tmp_path / "sessions.jsonl").read_text().splitlines()
    assert (json.loads(lines[0]), json.loads(lines[2])) == ({"number": 1}, {"number": 3})
    assert run.last_session() == {"number": 3}


def test_no_room_for_the_news_of_a_full_disk_hides_no_error(workplace, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    planned = plan_of(*SETTINGS)
    at_update(monkeypatch, 2, lambda: monkeypatch.setattr(RunDirectory, "write", full))
    monkeypatch.setattr("lpc_runner.store.log.MetricLog.sync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        execute(planned)
    assert caught.value.__context__ is None
