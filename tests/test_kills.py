"""Real processes and real signals: whatever ends them, the same command again ends with the same bits."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY, assert_same_run, environment, only_run, result_of, write_images

from lpc_runner.store.checkpoints import load_checkpoint

PATIENCE = 60.0  # seconds, for a machine that is busy


class Server:
    """Starts command lines as processes; see forks.py."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue = queue.Queue()
        self._codes: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert "ready" in self._lines.get(timeout=PATIENCE)

    def _read(self) -> None:
        for line in self._process.stdout:
            content = json.loads(line)
            if "ended" in content:
                self._codes[content["ended"]] = content["code"]
            else:
                self._lines.put(content)

    def start(self, cwd: Path, *argv: str) -> int:
        """The process id."""
        order = {"argv": argv, "cwd": str(cwd), "err": str(cwd / "stderr.txt")}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._lines.get(timeout=PATIENCE)["started"]

    def alive(self, pid: int) -> bool:
        return pid not in self._codes

    def end(self, pid: int) -> int:
        """Wait for the exit code."""
        until(lambda: not self.alive(pid))
        return self._codes[pid]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> tuple[str, ...]:
    """A run of 200 short updates over 50 epochs with a checkpoint every few updates."""
    folder = tmp_path_factory.mktemp("data")
    images = write_images(folder / "images.npz", count=45)
    keep = [item for item in TINY if not item.startswith(("trainer.", "metrics."))]
    return (
        *keep,
        "dataset=arrays",
        f"dataset.train={images}",
        f"data_dir={folder}",
        "trainer.batch_size=10",
        "trainer.num_epochs=50",
        "trainer.checkpoint_seconds=0.03",
        "metrics.num_samples=12",
        "metrics.num_samples_during=8",
        "metrics.every_epochs=20",
    )


@pytest.fixture(scope="module")
def straight(server, settings, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert server.end(server.start(folder, *settings)) == 0, (folder / "stderr.txt").read_text()
    return only_run(folder / "outputs")


def newest(folder: Path) -> str:
    """Name of the newest checkpoint, '' while there is none."""
    return max((path.name for path in folder.glob("outputs/runs/*/checkpoints/update-*.pt")), default="")


def kill_and_finish(server, settings, folder: Path, chance: random.Random, kills: int) -> int:
    """Kill the same command again and again, then let it finish; how often it was alive to be killed."""
    killed = 0
    for _ in range(kills):
        before = newest(folder)
        pid = server.start(folder, *settings)
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0, 1.5))  # anywhere: composing, loading, the first updates
        else:
            until(lambda before=before, pid=pid: newest(folder) > before or not server.alive(pid))
            time.sleep(chance.uniform(0, 0.1))  # among updates and saves
        if server.alive(pid):
            os.kill(pid, signal.SIGKILL)
        killed += server.end(pid) == -signal.SIGKILL
    assert server.end(server.start(folder, *settings)) == 0, (folder / "stderr.txt").read_text()
    return killed


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.faults)])
def test_killed_again_and_again(kills, server, settings, straight, tmp_path):
    assert kill_and_finish(server, settings, tmp_path, random.Random(4), kills=kills) == kills
    assert_same_run(straight, only_run(tmp_path / "outputs"))
    sessions = (only_run(tmp_path / "outputs") / "sessions.jsonl").read_text().splitlines()
    assert len(sessions) >= 2


@pytest.mark.faults
def test_killed_fifty_times(server, settings, straight, tmp_path):
    chance, killed, number = random.Random(), 0, 0
    while killed < 50:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        killed += kill_and_finish(server, settings, folder, chance, kills=5)
        assert_same_run(straight, only_run(folder / "outputs"))


def test_control_c_saves_and_a_second_process_is_refused(server, settings, straight, tmp_path):
    pid = server.start(tmp_path, *settings)
    until(lambda: newest(tmp_path))
    os.kill(pid, signal.SIGSTOP)  # it has not ended when the second one asks
    second = server.start(tmp_path, *settings)
    assert server.end(second) == 1
    os.kill(pid, signal.SIGCONT)
    assert f"is being run by pid {pid} on " in (tmp_path / "stderr.txt").read_text()
    os.kill(pid, signal.SIGINT)
    assert server.end(pid) == 130
    run = only_run(tmp_path / "outputs")
    assert not (run / "result.json").exists()
    assert server.end(server.start(tmp_path, *settings)) == 0
    assert_same_run(straight, run)


def test_sigterm_ends_a_sweep_within_an_update_with_143(settings, straight, tmp_path):
    """The plain command, as a scheduler starts and stops it."""
    command = [
        sys.executable,
        "-m",
        "lpc_runner",
        "-m",
        "seed=0,1",
        *settings,
        "trainer.checkpoint_seconds=1000",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    log = lambda: list(tmp_path.glob("outputs/runs/*/metrics.jsonl"))
    until(lambda: log() and log()[0].read_bytes().count(b"\n") >= 3)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and time.monotonic() - sent < 20
    assert "Traceback" not in err
    (run,) = tmp_path.glob("outputs/runs/*")  # the second cell was not begun
    assert not (run / "result.json").exists()
    state = load_checkpoint(run / "checkpoints")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= state["counters"]["update"] - rows[-1]["update"] < 10
    assert result_of(straight)["num_updates"] > state["counters"]["update"]
