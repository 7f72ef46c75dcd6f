"""`python -m lpc_runner.ls`: every state a run can be in, told apart, with the right advice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENDED, TINY, environment, only_run

from lpc_runner.base.errors import UserError
from lpc_runner.ls import list_runs, main
from lpc_runner.store.checkpoints import save_checkpoint
from lpc_runner.store.runs import DONE, RunDirectory


def make(root: Path, name: str, result: dict | None = None, update: int = 12) -> RunDirectory:
    """A run's records, as a session leaves them."""
    run = RunDirectory(root / "runs" / name)
    run.path.mkdir(parents=True)
    run.write("run.json", {"studies": ["default"], "hash": "", "choices": {}, "keys": {}})
    run.append_session({"command": ["/x/__main__.py", "seed=3", "model.hidden=[1,2]"], "host": "here", "pid": 1})
    (run.path / "metrics.jsonl").write_text(json.dumps({"update": update, "epoch": 1.5}) + "\n" + '{"update": 13, "ep')
    if result is not None:
        run.write("result.json", {"metrics": {}, "error": None} | (ENDED if result["status"] in DONE else {}) | result)
    return run


@pytest.fixture
def outputs(tmp_path) -> Path:
    root = tmp_path / "outputs"
    make(root, "a-done", {"status": "finished", "metrics": {"fid": 12.5}, "num_epochs": 15.0, "num_updates": 99})
    make(root, "b-diverged", {"status": "diverged", "diverged_at": {"update": 7}})
    make(root, "c-failed", {"status": "failed", "error": "OSError: No space left on device"})
    stopped = make(root, "d-interrupted")
    save_checkpoint(stopped.checkpoints, 12, {"n": 1})
    worn = make(root, "e-worn")
    for update in (5, 12):
        save_checkpoint(worn.checkpoints, update, {"n": update})
    damage(worn.checkpoint_files()[0].path)
    broken = make(root, "f-broken")
    damage(save_checkpoint(broken.checkpoints, 12, {"n": 1}))
    (make(root, "g-torn").path / "result.json").write_text('{"sta')
    return root


def test_records_that_were_edited_are_listed(tmp_path, command):
    odd = {"status": "finished", "metrics": {"fid": None, "elbo": "nan", "r2": 0.5}, "num_epochs": "many"}
    make(tmp_path, "a-odd", odd)
    answer = command(str(tmp_path), entry=main)
    assert answer.code == 0 and "1 runs: 1 done" in answer.out and "r2 0.5" in " ".join(answer.out.split())
    run = make(tmp_path, "b-cut", {"status": "finished"})
    content = json.loads((run.path / "result.json").read_text())
    content.pop("train_seconds")
    run.write("result.json", content)
    (_, cut) = list_runs(tmp_path)
    assert cut.state == "damaged" and "result.json is damaged (no train_seconds)" in cut.todo


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_every_state_and_what_to_do_about_it(outputs):
    running = RunDirectory(outputs / "runs" / "h-running")
    make(outputs, "h-running")
    with running.locked():
        found = {run.name[0]: run for run in list_runs(outputs)}
    command = "python -m lpc_runner seed=3 'model.hidden=[1,2]'"
    assert [found[key].state for key in "abcdefgh"] == [
        "done", "diverged", "failed", "interrupted", "interrupted", "damaged", "damaged", "running",
    ]  # fmt: skip
    assert (found["a"].epoch, found["a"].update, found["a"].metrics, found["a"].todo) == (15.0, 99, {"fid": 12.5}, "")
    assert "update 7" in found["b"].todo
    assert found["c"].todo == f"OSError: No space left on device; rerun: {command}"
    assert found["d"].todo == f"rerun: {command}"
    assert (found["d"].epoch, found["d"].update, found["d"].host) == (1.5, 12, "here")  # the last whole line
    assert "damaged: goes on after update 5" in found["e"].todo
    assert found["f"].todo == f"all 1 checkpoints are damaged: move the folder away, then rerun: {command}"
    assert "result.json is damaged" in found["g"].todo
    assert found["h"].todo.startswith(f"leave it to pid {os.getpid()} on ")


def test_one_line_of_json_per_run(outputs, command):
    answer = command(str(outputs), "--json", entry=main)
    found = [json.loads(line) for line in answer.out.splitlines()]
    assert len(found) == 7 and found[0]["metrics"] == {"fid": 12.5} and found[0]["studies"] == ["default"]


def test_a_table_of_real_runs_by_folder_study_and_run(command, outputs):
    assert command(*TINY).code == 0
    for where in ("outputs", "outputs/default", str(only_run())):
        answer = command(where, entry=main)
        assert answer.code == 0 and "1 runs: 1 done" in answer.out and "fd_random_conv" in " ".join(answer.out.split())
    answer = command(str(outputs), entry=main)
    assert "7 runs: 2 damaged, 1 diverged, 1 done, 1 failed, 2 interrupted" in answer.out


def test_in_a_pipe_names_stay_whole(command, outputs, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    assert command(*TINY).code == 0
    answer = command("outputs", entry=main)
    assert f" {only_run().name} " in answer.out.splitlines()[1]


def test_no_runs_is_one_line(tmp_path, command):
    for where in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="runs lie in outputs/"):
            list_runs(where)
        answer = command(str(where), entry=main)
        assert answer.code == 1 and len(answer.lines) == 1


def test_five_hundred_runs_are_listed_without_torch(tmp_path):
    root = tmp_path / "outputs"
    for number in range(500):
        make(root, f"run-{number:03}", {"status": "finished"} if number % 2 else None)
    code = (
        "import sys; from lpc_runner.ls import list_runs; "
        f"print(len(list_runs({str(root)!r}))); assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "500\n", done.stderr
    assert time.monotonic() - started < 15  # some 1.5 s when nothing else runs


def test_commands_are_first_words(command, outputs):
    """`lpc-runner ls` is `python -m lpc_runner.ls`; each is in --help, and has one of its own."""
    from lpc_runner.main import COMMANDS

    assert command(*TINY).code == 0
    one, other = (
        json.loads(a.out) for a in (command("ls", "outputs", "--json"), command("outputs", "--json", entry=main))
    )
    assert one | {"age": 0} == other | {"age": 0} and one["state"] == "done"
    assert command("report", "outputs/default").code == 0 and Path("outputs/default/report/report.md").exists()
    assert command("report", "nowhere").code == 1
    assert "evaluate" in COMMANDS and command("evaluate", "nowhere").lines[0].startswith(
        "lpc_runner: nowhere is no run"
    )
    assert command("fetch", "nosuchset").code == 2
    text = command("--help").out
    for name in COMMANDS:
        assert f"  lpc-runner {name} " in text, name
        own = command(name, "--help")
        assert own.code == 0 and own.out.startswith(f"usage: lpc-runner {name} "), name
    # Words of Hydra's stay Hydra's, whatever they begin with.
    assert command("study=ls", *TINY, "check=true").code == 0
    assert "and no command" in command("reprot", "outputs/default").lines[0]


def test_what_is_installed_names_no_file_that_stays_behind():
    source = Path(__file__).parents[1]
    paths = (path for folder in ("src", "conf") for path in (source / folder).rglob("*"))
    texts = {path: path.read_text() for path in paths if path.suffix in (".py", ".yaml")}
    assert len(texts) > 200
    assert [path for path, text in texts.items() if "scripts/" in text] == []
