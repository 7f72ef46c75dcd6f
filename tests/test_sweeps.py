"""Sweeps on several processes: launchers, leases, two commands in one study, a plan that conf/ cannot change."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    TELLING,
    TINY,
    assert_same_run,
    cell_of,
    cells_of,
    environment,
    finish,
    result_of,
    spin_counts,
    write_images,
)
from omegaconf import OmegaConf

from lpc_runner.base.errors import UserError
from lpc_runner.base.ranks import Ranks
from lpc_runner.inference.engine import Compiled
from lpc_runner.runner import fleet
from lpc_runner.runner.jobs import gpu_slot, visible_gpus
from lpc_runner.runner.plan import plan
from lpc_runner.runner.run import execute
from lpc_runner.store.runs import RunDirectory
from lpc_runner.tracking.wandb_run import WandbTracker
from lpc_runner.training.learner import Learner
from lpc_runner.training.trainer import Interrupted

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings(tmp_path) -> tuple[str, ...]:
    """A run of some 150 updates, fast to compose."""
    images = write_images(tmp_path / "images.npz", count=45)
    keep = [item for item in TINY if not item.startswith(("trainer.", "metrics."))]
    return (
        *keep,
        "dataset=arrays",
        f"dataset.train={images}",
        f"data_dir={tmp_path}/data",
        "trainer.batch_size=10",
        "trainer.num_epochs=40",
        "trainer.checkpoint_seconds=0.05",
        "metrics.num_samples=12",
        "metrics.num_samples_during=8",
    )


def start(cwd: Path, *arguments: str) -> subprocess.Popen:
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lpc_runner", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env=environment() | TELLING, text=True, start_new_session=True, **pipes)


def until(condition) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 90 seconds"
        time.sleep(0.01)


def rows(folder: Path) -> list[int]:
    """Lines of every metric log."""
    return [path.read_bytes().count(b"\n") for path in folder.glob("outputs/runs/*/metrics.jsonl")]


def runs(folder: Path, study: str = "default") -> list[Path]:
    return sorted((folder / "outputs" / study).iterdir())


def sessions(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]


def owner_pid(run: Path) -> int:
    return int((run / ".owner").read_text().split()[1])


@pytest.mark.faults
def test_two_workers_run_a_sweep_and_each_run_is_that_of_one_process(settings, tmp_path, command):
    sweep = ("-m", "seed=0,1", *settings, "trainer.num_epochs=10")
    assert command(*sweep).code == 0
    out = finish(start(tmp_path / "two", *sweep, "hydra/launcher=parallel"))
    assert out.count("finished: 40 updates") == 2
    assert set(spin_counts(out)) == {0} or platform.system() != "Linux"  # in the workers too, threads sleep
    for one, two in zip(runs(Path()), runs(tmp_path / "two"), strict=True):
        assert_same_run(one, two)
    pids = {session["pid"] for run in runs(tmp_path / "two") for session in sessions(run)}
    assert len(pids) == 2  # in two processes


@pytest.mark.faults
def test_a_killed_worker_is_said_in_one_line_and_the_same_command_goes_on(settings, tmp_path):
    sweep = ("-m", "seed=0,1,2", *settings)
    finish(start(tmp_path / "one", *sweep))
    broken = tmp_path / "broken"
    process = start(broken, *sweep, "hydra/launcher=parallel")
    until(lambda: rows(broken) and max(rows(broken)) >= 3)
    alive = [path for path in (broken / "outputs" / "runs").iterdir() if (path / ".owner").exists()]
    os.kill(owner_pid(alive[0]), signal.SIGKILL)
    out = finish(process, code=1)
    assert "the launcher failed; the same command goes on with what is left" in out.splitlines()[-1]
    assert "Traceback" not in out
    finish(start(broken, *sweep, "hydra/launcher=parallel"))
    for one, two in zip(runs(tmp_path / "one"), runs(broken), strict=True):
        assert_same_run(one, two)


@pytest.mark.faults
def test_workers_whose_command_was_terminated_save_and_leave(settings, tmp_path):
    """The command of a parallel sweep gets SIGTERM, as at a shutdown: its workers are not left over."""
    sweep = ("-m", "seed=0,1", *settings, "trainer.num_epochs=2000", "trainer.checkpoint_seconds=1000")
    folder = tmp_path / "broken"
    process = start(folder, *sweep, "hydra/launcher=parallel")
    until(lambda: len(rows(folder)) == 2 and min(rows(folder)) >= 3)
    workers = [owner_pid(run) for run in runs(folder)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # ends when the last worker has let go of the pipe
    assert process.returncode == -signal.SIGTERM
    assert_saved_and_left(runs(folder), workers)


def assert_saved_and_left(interrupted: list[Path], workers: list[int]) -> None:
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    for run in interrupted:
        assert RunDirectory(run.resolve()).checkpoint_files() and not (run / "result.json").exists()


@pytest.mark.faults
def test_a_worker_saves_its_second_run_too(settings, tmp_path):
    """A worker takes many runs: what it was told of the command must hold for the later ones."""
    sweep = ("-m", "trainer.num_epochs=2,2000", "seed=0,1", *(word for word in settings if "num_epochs" not in word))
    folder = tmp_path / "broken"
    process = start(folder, *sweep, "trainer.checkpoint_seconds=1000", "hydra/launcher=parallel")
    running = lambda: [run for run in runs(folder) if not (run / "result.json").exists() and (run / ".owner").exists()]
    until(lambda: (folder / "outputs" / "default").exists() and len(runs(folder)) == 4 and len(running()) == 2)
    until(lambda: all((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size for run in running()))
    interrupted = running()
    workers = [owner_pid(run) for run in interrupted]
    pids = [session["pid"] for run in runs(folder) for session in sessions(run)]
    assert any(pids.count(pid) > 1 for pid in workers)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert_saved_and_left(interrupted, workers)


@pytest.mark.faults
@pytest.mark.parametrize("everyone", [True, False], ids=["from the terminal", "to the command"])
def test_control_c_on_a_parallel_sweep_saves_every_run(everyone, settings, tmp_path):
    """A terminal interrupts the whole process group; `kill -INT` the command alone."""
    sweep = ("-m", "seed=0,1", *settings, "trainer.checkpoint_seconds=1000", "trainer.num_epochs=300")
    folder = tmp_path / "broken"
    process = start(folder, *sweep, "hydra/launcher=parallel")
    until(lambda: len(rows(folder)) == 2 and min(rows(folder)) >= 3)
    workers = [owner_pid(run) for run in runs(folder)]
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    out = finish(process, code=128 + signal.SIGINT)
    assert "the workers save their runs and leave" in out and "Traceback" not in out
    assert_saved_and_left(runs(folder), workers)
    finish(start(folder, *sweep, "hydra/launcher=parallel"))
    finish(start(tmp_path / "one", *sweep))
    for one, two in zip(runs(tmp_path / "one"), runs(folder), strict=True):
        assert_same_run(one, two)


def test_a_run_that_another_command_has_is_left_to_it(command):
    sweep = ("-m", "seed=0,1", *TINY)
    occupied, free = (plan(cell).directory for cell in cells_of(*sweep))
    with RunDirectory(occupied.path).locked():
        answer = command(*sweep)
        assert answer.code == 1 and "left to it, going on with the next" in answer.err + answer.out
        assert f"is being run by pid {os.getpid()}" in answer.err
        assert free.result()["status"] == "finished" and not (occupied.path / "result.json").exists()
    before = [session["pid"] for session in sessions(free.path)]
    assert command(*sweep).code == 0  # its owner gone, it is taken; what is done stays done
    assert occupied.result()["status"] == "finished" and [session["pid"] for session in sessions(free.path)] == before


@pytest.mark.faults
def test_two_commands_share_a_study_and_run_nothing_twice(settings, tmp_path):
    sweep = ("-m", "seed=0,1,2,3", *settings, "trainer.num_epochs=300")
    folder = tmp_path / "shared"
    first, second = start(folder, *sweep), start(folder, *sweep)
    said = [process.communicate(timeout=180)[0] for process in (first, second)]
    finished = runs(folder)
    assert [result_of(run)["status"] for run in finished] == ["finished"] * 4
    by_pid = [[session["pid"] for session in sessions(run)] for run in finished]
    assert all(len(pids) == 1 for pids in by_pid), by_pid  # no run was started twice
    assert {first.pid, second.pid} == {pids[0] for pids in by_pid}
    assert any("left to it, going on with the next" in out for out in said)
    for process, out in zip((first, second), said):  # whoever ends while the other is at work says so
        assert process.returncode == 0 or f"is being run by pid {first.pid}" in out or str(second.pid) in out, out


@pytest.mark.faults
def test_submitit_requeues_a_preempted_job_which_goes_on(settings, tmp_path):
    """submitit's own handler, controller and signal (SIGUSR2), with its local executor in the place of SLURM."""
    sweep = ("-m", "seed=0,1", *settings, "trainer.checkpoint_seconds=1000")
    finish(start(tmp_path / "one", *sweep))
    broken = tmp_path / "broken"
    process = start(broken, *sweep, "hydra/launcher=submitit_local")
    until(lambda: rows(broken) and max(rows(broken)) >= 3)
    (log, *_) = (path for path in broken.glob("outputs/runs/*/metrics.jsonl") if path.read_bytes().count(b"\n") >= 3)
    victim = log.parent  # one that trains; a signal before that requeues a job that has nothing to save
    os.kill(owner_pid(victim), signal.SIGUSR2)
    out = finish(process)
    assert out.count("finished: 160 updates") == 2
    assert len(sessions(victim)) == 2
    words = [session["command"][1:] for run in runs(broken) for session in sessions(run)]
    typed = sorted((*sweep, "hydra/launcher=submitit_local"))
    assert all(sorted(found) == typed for found in words)  # what `ls` says to type again
    logs = "".join(path.read_text() for path in (broken / "outputs" / ".sweeps").rglob("*_log.*"))
    assert "Requeued job" in logs, logs
    assert set(spin_counts(logs)) == {0}, logs
    assert "resuming after update" in logs, logs
    for one, two in zip(runs(tmp_path / "one"), runs(broken), strict=True):
        assert_same_run(one, two)


def test_jobs_run_what_was_planned_though_conf_was_edited(settings, tmp_path, command, monkeypatch):
    own = tmp_path / "own"
    (own / "method").mkdir(parents=True)
    method = own / "method" / "mine.yaml"
    method.write_text("# @package _global_\noptimizer:\n  learning_rate: 1e-3\n")
    from lpc_runner.runner import run

    real = run.execute

    def edit(planned):
        method.write_text("# @package _global_\noptimizer:\n  learning_rate: 0.5\n")
        return real(planned)

    monkeypatch.setattr(run, "execute", edit)
    sweep = (f"--config-dir={own}", "-m", "method=mine", "seed=0,1", *TINY)
    answer = command(*sweep)
    assert answer.code == 0, answer.err
    found = [OmegaConf.load(path / "config.yaml").optimizer.learning_rate for path in runs(Path())]
    assert found == [1e-3, 1e-3]


def test_a_launcher_whose_plugin_is_missing_is_one_line(command, monkeypatch):
    from hydra.core.config_store import ConfigStore

    cells_of(*TINY)  # plugins register themselves when Hydra first composes
    for preset, option in (("parallel", "joblib"), ("slurm", "submitit_slurm")):
        launchers = ConfigStore.instance().repo["hydra"]["launcher"]
        with monkeypatch.context() as patch:
            patch.delitem(launchers, f"{option}.yaml")
            answer = command("-m", f"hydra/launcher={preset}", "seed=0,1", *TINY)
        assert answer.code == 1 and len(answer.lines) == 1
        assert f"pip install 'lpc-runner[{preset}]'" in answer.err
    if "optuna.yaml" not in ConfigStore.instance().repo["hydra"]["sweeper"]:
        answer = command("-m", "hydra/sweeper=optuna", "seed=0,1", *TINY)
        assert answer.code == 1 and "pip install 'lpc-runner[optuna]'" in answer.err


def test_slurm_jobs_are_requeued_after_their_time_limit():
    """The plugin's own value of max_num_timeout, 0, would end a run at its first time limit."""
    preset = OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / "slurm.yaml")
    assert preset.max_num_timeout >= 10 and 30 <= preset.signal_delay_s < 60 * preset.timeout_min


def _hold(folder: Path, slots: int) -> None:
    """Leave a file that says which GPU was taken, keep the slot until told to go; no lock that could die with it."""
    with gpu_slot(["a", "b"], slots, folder / "slots") as index:
        (folder / f"took-{os.getpid()}-{index}").touch()
        deadline = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def test_slots_of_gpus_are_leased_once_and_come_back_from_the_dead(tmp_path, monkeypatch):
    monkeypatch.setattr("lpc_runner.runner.jobs.INTERVAL", 0.02)
    context = multiprocessing.get_context("fork")
    taken = lambda: {(int(pid), int(gpu)) for _, pid, gpu in (path.name.split("-") for path in tmp_path.glob("took-*"))}
    holders = [context.Process(target=_hold, args=(tmp_path, 2)) for _ in range(5)]
    for holder in holders:
        holder.start()
    until(lambda: len(taken()) == 4)
    time.sleep(0.3)
    before = taken()
    assert sorted(gpu for _, gpu in before) == [0, 0, 1, 1]  # four slots, and a fifth process that waits
    pid, gpu = min(before)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(taken()) == 5)
    ((_, heir),) = taken() - before
    assert heir == gpu
    (tmp_path / "go").touch()
    for holder in holders:
        holder.join(20)


def test_an_empty_gpu_goes_before_a_second_run_on_one(tmp_path):
    with gpu_slot(["a", "b"], 2, tmp_path) as one, gpu_slot(["a", "b"], 2, tmp_path) as two:
        assert (one, two) == (0, 1)


FLEET = "hydra/launcher=fleet"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, ...]:
    """A run of four updates, measured on a few images."""
    folder = tmp_path_factory.mktemp("small")
    images = write_images(folder / "images.npz", count=45)
    others = ("trainer.max", "trainer.batch", "model.hidden", "metrics.", "traces.")
    return (
        *(word for word in TINY if not word.startswith(others)),
        "dataset=arrays",
        f"dataset.train={images}",
        f"data_dir={folder}/data",
        "trainer.batch_size=10",
        "trainer.max_updates=4",
        "model.hidden=[4]",
        "traces.num_chains=0",
        "metrics.num_samples=8",
        "metrics.num_samples_during=8",
    )


@pytest.fixture(scope="module")
def six(small) -> list:
    """Plans of three seeds with T = 3, then with T = 4, two to share a GPU."""
    return [plan(cell) for cell in cells_of("-m", *small, "sampler.num_steps=3,4", "seed=0,1,2", "runs_per_gpu=2")]


def disturbed(monkeypatch, faults: dict[tuple[int, int], str]) -> list[tuple[int, int]]:
    """Seed and number of every update in the order in which they are made; at some a signal comes, or an error."""
    order, real = [], Learner.gradients

    def gradients(self, batch, seed, update, *given, **more):
        order.append((seed, update))
        fault = faults.pop((seed, update), None)
        if fault == "an error":
            raise RuntimeError("no such kernel")
        if fault is not None:
            os.kill(os.getpid(), signal.SIGTERM)
            while threading.current_thread().received is None:  # by the main thread
                time.sleep(0.001)
        return real(self, batch, seed, update, *given, **more)

    monkeypatch.setattr(Learner, "gradients", gradients)
    return order


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_members_of_a_fleet_are_the_runs_that_they_are_alone(small, workplace, device, monkeypatch):
    """Bit for bit, though methods and settings differ, one diverges, one fails, and a signal comes; in turn, by one."""
    words = [word for word in small if word != "device=cpu"]
    words += [f"device={device}", f"deterministic={device != 'cpu'}", "runs_per_gpu=3"]
    other = ("seed=1", "objective=forward", "step_size.value=0.03", "preconditioning.beta=0.5")
    cells = [cell_of(*words, *more) for more in ((), other, ("seed=2", "optimizer.learning_rate=1e30"))]

    def planned(folder: str) -> list:
        for cell in cells:
            cell.cfg.output_dir = folder
        return [plan(cell) for cell in cells]

    alone = planned("alone")
    for run in alone:
        execute(run)
    faults = {(1, 1): "a signal", (1, 3): "an error"}
    order, failures = disturbed(monkeypatch, faults), []
    together, failed = planned("together"), lambda run, error: failures.append((run, str(error)))
    with pytest.raises(Interrupted, match="SIGTERM"):
        fleet.execute_fleets(together, failed)
    saved = [run.directory.checkpoint_files()[0].update for run in together]
    assert order == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)] and saved == [2, 2, 1] and not failures
    fleet.execute_fleets(together, failed)
    assert order[5:] == [(0, 2), (1, 2), (2, 1), (0, 3), (1, 3)] and failures == [(together[1], "no such kernel")]
    assert [run.directory.result()["status"] for run in together] == ["finished", "failed", "diverged"]
    fleet.execute_fleets(together, failed)  # what is done is taken as it is
    assert order[10:] == [(1, 2), (1, 3)] and len(failures) == 1  # from its checkpoint
    for one, two in zip(alone, together):
        assert_same_run(one.directory.path, two.directory.path)
        assert two.directory.result()["status"] == one.directory.result()["status"]


def test_a_fleet_s_command_leaves_as_that_of_any_sweep(small, command, monkeypatch):
    sweep, before = ("-m", "seed=0,1", *small, FLEET, "runs_per_gpu=2"), signal.getsignal(signal.SIGTERM)
    disturbed(monkeypatch, {(0, 1): "a signal"})
    answer = command(*sweep)
    assert answer.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    assert not any((run / "result.json").exists() for run in runs(Path()))
    disturbed(monkeypatch, {(0, 2): "an error", (1, 2): "an error"})
    answer = command(*sweep)
    assert answer.code == 1 and answer.lines[-1].startswith("lpc_runner: 2 of 2 runs did not finish")
    assert sorted(line.split(": ")[1] for line in answer.lines if "resuming after" in line) == [
        "resuming after update 1",
        "resuming after update 2",
    ]


def test_turns_go_round_and_what_failed_lets_go_of_its_memory(six, workplace, monkeypatch, caplog):
    seen, held, failures = [], [], []
    caplog.set_level("INFO")
    for run in six[:3]:
        monkeypatch.setattr(run.experiment.trainer, "max_updates", {0: 1, 1: 3, 2: 2}[run.experiment.seed])

    def training(planned, member):
        model = torch.nn.Linear(1, 1)
        held.append(weakref.ref(model))
        for number in range({0: 1, 1: 3, 2: 2}[planned.experiment.seed]):
            seen.append((planned.experiment.seed, number))
            assert member.turn() >= 0
        time.sleep(0.2 if planned.experiment.seed == 1 else 0)  # the last one: for the thread that counts
        raise RuntimeError("out of memory") from ValueError()

    monkeypatch.setattr(fleet, "execute", training)
    made = fleet.Fleet(six[:3], lambda run, error: failures.append((run.experiment.seed, error)))
    made.run()
    assert [line for line in caplog.messages if "update of 3 runs 6/6" in line]
    assert not [line for line in caplog.messages if "update of" in line and six[0].directory.name in line]
    assert seen == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (1, 2)]
    assert [seed for seed, _ in failures] == [0, 2, 1] and not any(model() for model in held)


def test_a_member_that_ends_the_process_ends_it_after_the_others(six, workplace, monkeypatch):
    def training(planned, member):
        if planned.experiment.seed == 0:
            raise SystemExit(3)
        assert member.turn() >= 0
        made.append(planned.experiment.seed)

    made = []
    monkeypatch.setattr(fleet, "execute", training)
    with pytest.raises(SystemExit, match="3"):
        fleet.Fleet(six[:3], lambda *failed: pytest.fail("no failure")).run()
    assert made == [1, 2]


@pytest.mark.parametrize("measures", [False, True])
def test_the_same_signal_again_ends_a_fleet_at_once(six, workplace, monkeypatch, measures):
    """Also while a member measures, which asks for no turn."""

    def endless(planned, member):
        try:
            while member.turn() >= 0:
                while planned.experiment.seed == 1 and len(sent) < 2:
                    sent.append(os.kill(os.getpid(), signal.SIGINT))
                    while member.received is None:
                        time.sleep(0.001)
                while measures and sent:
                    time.sleep(0.001)
        finally:
            time.sleep(0.02)
            left.append(planned.experiment.seed)

    sent, left = [], []
    monkeypatch.setattr(fleet, "execute", endless)
    made = fleet.Fleet(six[:2], lambda *failed: pytest.fail("no failure"))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert made.received == signal.SIGINT and sorted(left) == [0, 1]


def test_runs_of_one_kind_go_together(six, monkeypatch):
    """Others, and what is done, go by themselves."""
    monkeypatch.setattr(six[1].directory, "state", lambda: "done")
    groups = [[six.index(run) for run in group] for group in fleet.fleets_of(six)]
    assert groups == [[0, 2], [1], [3, 4], [5]]
    assert fleet.who_goes_together(six) == "hydra/launcher=fleet: runs that train together: 2, 2, 1"


def test_what_no_fleet_can_have_is_one_line(six, monkeypatch):
    fleet.require_fleet(six)
    run = six[0]
    for part, name, value, says in (
        (run, "ranks", Ranks(0, 2, 0), "not under torchrun"),
        (run.experiment, "engine", Compiled(), "engine=compiled is for one run at a time"),
        (run.experiment, "tracker", partial(WandbTracker, mode="offline"), "tracker=none, and `lpc-runner publish`"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=says):
            patch.delenv("WANDB_MODE", raising=False)
            patch.setattr(part, name, value)
            fleet.require_fleet(six)
    monkeypatch.setattr(run.experiment, "tracker", partial(WandbTracker, mode="disabled"))
    fleet.require_fleet(six)
    with pytest.raises(UserError, match="runs_per_gpu runs together, which is 1"):
        fleet.require_fleet(
            [replace(run, cell=replace(run.cell, cfg=OmegaConf.merge(run.cell.cfg, {"runs_per_gpu": 1})))]
        )


def test_slots_mean_the_gpu_not_its_number_in_one_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus(2) == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == ["0", "1"]


def test_looking_at_a_run_does_not_disturb_it(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run.owner() is None
    with run.locked():
        assert RunDirectory(run.path).owner().startswith(f"pid {os.getpid()} on ")
    assert run.owner() is None
    run.path.joinpath(".owner").write_text("pid 1 on elsewhere")  # what a killed process leaves behind
    assert run.owner() is None
    shutil.rmtree(run.path)


SWEEPER = """
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Tries(Sweeper):
    '''Proposes the first value, then by what came of it; writes down what each job returned.'''

    def __init__(self, more, params=None):
        self.more, self.params = more, params or {}

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        fixed = [word for word in arguments if "interval(" not in word]
        for number, value in enumerate([0.1, *self.more]):
            (job,) = self.launcher.launch([[*fixed, f"step_size.value={value}"]], initial_job_idx=number)
            with open("returned", "a") as file:
                file.write(f"{value} {job.return_value}\\n")
"""


@pytest.fixture
def sweeper(tmp_path, monkeypatch):
    """hydra/sweeper=tries: one as Optuna's, which knows its next run when the last has returned."""
    import importlib

    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    (tmp_path / "plugin" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugin" / "hydra_plugins" / "tries.py").write_text(SWEEPER)
    monkeypatch.syspath_prepend(str(tmp_path / "plugin"))
    module = importlib.import_module("hydra_plugins.tries")
    Plugins.instance().register(module.Tries)
    node = {"_target_": "hydra_plugins.tries.Tries", "more": [0.2, 0.1], "params": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="tries", node=node, provider="test")
    monkeypatch.delitem(sys.modules, "hydra_plugins.tries", raising=False)
    monkeypatch.setitem(sys.modules, "hydra_plugins.tries", module)
    yield ("-m", "hydra/sweeper=tries", "step_size.value=interval(0.1,1)")
    del ConfigStore.instance().repo["hydra"]["sweeper"]["tries.yaml"]


def returned() -> list[list[str]]:
    return [line.split() for line in Path("returned").read_text().splitlines()]


def test_a_sweeper_that_searches_gets_each_runs_metric(sweeper, command):
    """Its runs are not known before: each is planned and checked when proposed, and found again as any other."""
    answer = command(*sweeper, *TINY)
    assert answer.code == 0, answer.err
    results = {OmegaConf.load(run / "config.yaml").step_size.value: result_of(run) for run in runs(Path())}
    assert sorted(results) == [0.1, 0.2]  # the third is the first again
    expected = [[str(value), str(results[value]["metrics"]["fd_random_conv"])] for value in (0.1, 0.2, 0.1)]
    assert returned() == expected
    assert answer.out.count("finished: 6 updates") == 2
    assert not list(Path("outputs/.sweeps").glob("proposed-*"))
    Path("returned").unlink()
    assert command(*sweeper, *TINY, "optimized_metric=elbo").code == 0  # changes no result: nothing is run again
    assert [float(value) for _, value in returned()] == [results[step]["metrics"]["elbo"] for step in (0.1, 0.2, 0.1)]
    assert len(runs(Path())) == 2 and all(len(sessions(run)) == 1 for run in runs(Path()))
    (single,) = cells_of(*TINY)
    names = plan(single).experiment.metrics.names()
    assert set(results[0.1]["metrics"]) <= set(names) and len(names) == len(set(names))


def test_what_a_sweeper_may_not_do_is_one_line(sweeper, command):
    first = command(*sweeper, *TINY, "optimized_metric=fdi")
    assert first.code == 1 and len(first.lines) == 1 and not Path("returned").exists()
    assert "optimized_metric=fdi: no such metric; there are: fd_random_conv, kid_random_conv" in first.err
    assert not Path("outputs/runs").exists()
    sequences = [item for item in TINY if not item.startswith(("model", "metrics.", "sampler"))]
    answer = command(*sweeper, *sequences, "dataset=lorenz", "objective=jeffreys")
    assert answer.code == 1 and len(answer.lines) == 1 and "optimized_metric has no default" in answer.err
    answer = command("-m", "step_size.value=interval(0.1,1)", *TINY)
    assert answer.code == 1 and len(answer.lines) == 1 and "hydra/sweeper=" in answer.err
    answer = command(*sweeper, *TINY, FLEET, "runs_per_gpu=2")
    assert answer.code == 1 and len(answer.lines) == 1 and "there is no fleet of one" in answer.err
    answer = command(*sweeper, *TINY, "check=true")
    assert answer.code == 0 and "hydra/sweeper=tries proposes its own" in answer.out
    # The second proposal does not fit: its sweeper hears of it, the first run stays.
    answer = command(*sweeper, *TINY, "hydra.sweeper.more=[-1]")
    assert answer.code == 1 and "Traceback" not in answer.err
    assert answer.lines[-1] == "lpc_runner: step_size.value must be a number above 0, got -1"
    assert [result_of(run)["status"] for run in runs(Path())] == ["finished"]


def test_a_diverged_run_is_the_worst_that_a_sweeper_can_get(sweeper, command):
    """θ at the bounds of float32: what was measured of the last finite state is no value of these settings."""
    wild = ("optimizer.learning_rate=1e30", "hydra.sweeper.more=[]")
    assert command(*sweeper, *TINY, *wild).code == 0
    assert command(*sweeper, *TINY, *wild, "optimized_metric=elbo").code == 0
    assert [result_of(run)["status"] for run in runs(Path())] == ["diverged"]
    assert [value for _, value in returned()] == ["inf", "-inf"]
