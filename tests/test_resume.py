"""Never lose a run: what was interrupted in whatever way ends with the bits of a run that was not."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
from pathlib import Path

import pytest
from conftest import TINY, assert_same_run, cell_of, earlier_run, only_run, result_of, rows_of
from omegaconf import OmegaConf

import lpc_runner
from lpc_runner.base.errors import UserError
from lpc_runner.runner.plan import plan
from lpc_runner.runner.run import execute
from lpc_runner.store.checkpoints import load_checkpoint, save_checkpoint
from lpc_runner.store.log import MetricLog
from lpc_runner.training import trainer
from lpc_runner.training.learner import Learner
from lpc_runner.training.trainer import Interrupted, Interrupts

# Some 40 training images in batches of 10 are 4 updates an epoch. Beside each case: the updates that die.
EACH = ("trainer.checkpoint_seconds=1e-9",)  # a checkpoint after every update
CASES = {
    "jeffreys": (EACH, (1, 7)),
    "no checkpoint yet": ((), (3,)),
    "shared": (("preconditioning=adam_shared", "objective=forward", *EACH), (7,)),
    "prior": (("objective=prior", *EACH), (7,)),
    "fisher": (("preconditioning=fisher", *EACH), (1, 7)),
    "persistent": (
        ("method=lpc_persistent", "sampler.num_steps=1", "sampler.first_steps=5", "step_size.num_visits=2", *EACH),
        (2, 7),
    ),
    "adapted": (
        ("sampler=mala", "preconditioning=fisher", "step_size=adapted", "sampler.start=persistent", *EACH),
        (1, 7),
    ),
    "optimal": (("model.likelihood.scale=optimal", *EACH), (7,)),
    "binarised": (("dataset.binarise=dynamic", "model/likelihood=bernoulli", *EACH), (7,)),
    "measured": (("metrics.every_epochs=1",), (7,)),
}


class Stop(BaseException):
    """As sudden as a kill, for this process: nothing below catches it."""


@pytest.fixture
def settings(tmp_path):
    """Overrides of a run of ten updates over three epochs; its outputs lie in the folder named."""
    from conftest import write_images

    images = write_images(tmp_path / "images.npz", count=45)
    keep = [item for item in TINY if not item.startswith(("trainer.max_updates", "trainer.batch", "metrics."))]
    common = (
        *keep,
        "dataset=arrays",
        f"dataset.train={images}",
        f"data_dir={tmp_path}/data",
        "trainer.batch_size=10",
    )
    common += ("trainer.max_updates=10", "metrics.num_samples=12", "metrics.num_samples_during=8")
    return lambda name, *more: (*common, f"output_dir={tmp_path / name}", *more)


def run(overrides) -> Path:
    """Execute one cell as a job does; the run's directory."""
    planned = plan(cell_of(*overrides))
    execute(planned)
    return planned.directory.path


def interrupted(overrides, monkeypatch, at: int, number: int | None = None) -> Path:
    """The same, stopped during update `at` (from 0): by a signal, or dead on the spot."""
    planned = plan(cell_of(*overrides))
    with monkeypatch.context() as patch:
        real = Learner.gradients

        def gradients(self, batch, seed, update, *args, **kwargs):
            if update == at:
                if number is None:
                    raise Stop
                os.kill(os.getpid(), number)
            return real(self, batch, seed, update, *args, **kwargs)

        patch.setattr(Learner, "gradients", gradients)
        with pytest.raises(Stop if number is None else Interrupted):
            execute(planned)
    assert planned.directory.state() == "resume"
    return planned.directory.path


def checkpoints(path: Path) -> list[Path]:
    """Newest first."""
    return sorted((path / "checkpoints").iterdir(), reverse=True)


@pytest.mark.parametrize("more, deaths", CASES.values(), ids=CASES)
def test_a_run_that_died_ends_as_if_it_had_not(more, deaths, settings, monkeypatch):
    straight = run(settings("straight", *more))
    for at in deaths:
        broken = interrupted(settings(f"died{at}", *more), monkeypatch, at)
        assert not (broken / "result.json").exists()
        assert run(settings(f"died{at}", *more)) == broken
        assert_same_run(straight, broken)
        assert len((broken / "sessions.jsonl").read_text().splitlines()) == 2
    assert [row["update"] for row in rows_of(straight) if "train/log_joint" in row] == list(range(1, 11))
    if "method=lpc_persistent" in more:
        assert result_of(straight)["gradient_evaluations"] == 10 * (4 * 5 + 6 * 1)
        last = rows_of(straight)[-1]
        assert last["chain/step_size"] == pytest.approx(0.1)
        assert 0 < last["chain/fisher_min"] <= last["chain/fisher_max"]
        Path(OmegaConf.load(straight / "config.yaml").dataset.train).unlink()  # what looks at a run needs no data
        loaded = lpc_runner.load(straight)
        assert loaded.sampler.preconditioner.scalars()["chain/fisher_max"].item() == last["chain/fisher_max"]
    if "metrics.every_epochs=1" in more:
        assert [row["update"] for row in rows_of(straight) if "eval/fd_random_conv" in row] == [4, 8]


def test_dying_again_and_again(settings, monkeypatch):
    straight = run(settings("straight"))
    often = settings("often", *EACH)
    for at in (2, 3, 4, 9):
        broken = interrupted(often, monkeypatch, at)
        assert load_checkpoint(broken / "checkpoints")["counters"]["update"] == at
    run(often)
    assert_same_run(straight, broken)


def test_a_signal_during_the_last_update_leaves_the_measuring_to_the_next_command(settings, monkeypatch):
    broken = interrupted(settings("signal"), monkeypatch, 9, signal.SIGTERM)
    assert load_checkpoint(broken / "checkpoints")["counters"]["update"] == 10
    monkeypatch.setattr(Learner, "gradients", lambda *args, **kwargs: pytest.fail("trained again"))
    run(settings("signal"))
    monkeypatch.undo()
    assert_same_run(run(settings("straight")), broken)


def test_a_signal_during_the_last_save_leaves_the_measuring_to_the_next_command(settings, monkeypatch):
    planned = plan(cell_of(*settings("signal")))
    with monkeypatch.context() as patch:
        save = trainer.save_checkpoint

        def saving(*given):
            save(*given)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(trainer, "save_checkpoint", saving)
        with pytest.raises(Interrupted):
            execute(planned)
    broken = planned.directory.path
    assert load_checkpoint(broken / "checkpoints")["counters"]["update"] == 10
    run(settings("signal"))
    assert_same_run(run(settings("straight")), broken)


def test_a_terminal_that_closes_is_a_signal_unless_nohup_ignores_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, heard in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, None)):
            signal.signal(signal.SIGHUP, handler)
            with Interrupts() as interrupts:
                os.kill(os.getpid(), signal.SIGHUP)
                assert interrupts.received == heard
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_that_lost_its_description_gets_it_back(settings):
    finished = run(settings("one"))
    description = (finished / "run.json").read_text()
    (finished / "run.json").unlink()
    assert run(settings("one")) == finished
    assert (finished / "run.json").read_text() == description


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_the_update_saves_and_leaves(number, settings, monkeypatch):
    handler = signal.getsignal(number)
    monkeypatch.setattr(signal, "default_int_handler", handler if number == signal.SIGINT else None)
    broken = interrupted(settings("signal"), monkeypatch, 5, number)
    assert signal.getsignal(number) == handler
    assert load_checkpoint(broken / "checkpoints")["counters"]["update"] == 6
    run(settings("signal"))
    assert_same_run(run(settings("straight")), broken)


def test_signals_become_exit_codes_and_second_ones_act_at_once():
    assert [Interrupted(number).exit_code for number in (signal.SIGTERM, signal.SIGINT)] == [143, 130]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_reaches_the_handler_that_was_there_before():
    """As a cluster launcher's, which asks for the job again and leaves: not before the state was saved."""
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert interrupts.received == signal.SIGUSR2 and heard == []
            os.kill(os.getpid(), signal.SIGUSR1)  # another signal on its way does not cut the update short
            assert interrupts.received == signal.SIGUSR2
            with pytest.raises(Interrupted, match="SIGUSR2"):
                interrupts.leave()
            assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda path: path.write_bytes(b"")], ids=["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over(damage, settings, monkeypatch, caplog):
    broken = interrupted(settings("broken", *EACH), monkeypatch, 7)
    newest, before = checkpoints(broken)
    assert "update-000000007-" in newest.name and "update-000000006-" in before.name
    damage(newest)
    with caplog.at_level(logging.WARNING):
        run(settings("broken", *EACH))
    assert any(newest.name in line and "damaged" in line for line in caplog.messages)
    assert_same_run(run(settings("straight")), broken)


def test_nothing_but_damaged_checkpoints_is_the_users_decision(settings, monkeypatch):
    broken = interrupted(settings("broken", *EACH), monkeypatch, 7)
    for path in checkpoints(broken):
        _flip(path)
    opened = []
    with monkeypatch.context() as patch:
        patch.setattr("lpc_runner.runner.run._open_sink", lambda *given: opened.append(given))
        with pytest.raises(UserError, match=r"all 2 checkpoints in .* are damaged; .* move the folder away"):
            run(settings("broken", *EACH))
    assert not opened  # no tracker hears of it
    aside = broken.with_name("aside")
    broken.rename(aside)
    assert_same_run(run(settings("straight")), run(settings("broken", *EACH)))
    assert all(path.exists() for path in checkpoints(aside))


def test_a_torn_last_line_is_cut_off(settings, monkeypatch):
    broken = interrupted(settings("torn", *EACH), monkeypatch, 6)
    with open(broken / "metrics.jsonl", "ab") as log:
        log.write(b'{"update": 7, "epo')
    run(settings("torn", *EACH))
    assert_same_run(run(settings("straight")), broken)


def test_a_log_shorter_than_the_checkpoint_is_refused(settings, monkeypatch):
    broken = interrupted(settings("cut", *EACH), monkeypatch, 6)
    log = broken / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match="cut or replaced"):
        run(settings("cut", *EACH))


@pytest.mark.parametrize("where", ["checkpoint", "log"])
def test_a_full_disk_fails_the_run_and_a_rerun_finishes_it(where, settings, monkeypatch):
    full = settings("full", *EACH)
    planned = plan(cell_of(*full))
    target = {
        "checkpoint": "lpc_runner.training.trainer.save_checkpoint",
        "log": "lpc_runner.store.log.MetricLog.append",
    }[where]
    real = {"checkpoint": save_checkpoint, "log": MetricLog.append}[where]

    def until_full(*args):
        if 5 in args[:2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target, until_full)
        with pytest.raises(OSError, match="No space left"):
            execute(planned)
    broken = planned.directory.path
    assert result_of(broken)["status"] == "failed" and "No space left" in result_of(broken)["error"]
    assert load_checkpoint(broken / "checkpoints")["counters"]["update"] == 4
    run(full)
    assert_same_run(run(settings("straight")), broken)


def test_a_second_process_in_the_same_run_is_refused(settings, monkeypatch):
    here = settings("twice")
    second = plan(cell_of(*here))
    real, refused = Learner.gradients, []

    def gradients(self, batch, seed, update, *args, **kwargs):
        if update == 4:
            with pytest.raises(UserError) as caught:
                execute(second)
            refused.append(str(caught.value))
        return real(self, batch, seed, update, *args, **kwargs)

    monkeypatch.setattr(Learner, "gradients", gradients)
    path = run(here)
    assert refused == [f"{path} is being run by pid {os.getpid()} on {socket.gethostname()}"]
    assert result_of(path)["status"] == "finished"


@pytest.mark.parametrize("name", ["result.json", "run.json"])
def test_a_damaged_record_is_named(name, settings, monkeypatch, command):
    broken = interrupted(settings("broken"), monkeypatch, 5, signal.SIGTERM)
    if name == "result.json":
        run(settings("broken"))
    (broken / name).write_text('{"status": "fin')
    answer = command(*settings("broken"))
    assert answer.code == 1 and "Traceback" not in answer.err
    assert f"{broken / name} is damaged" in answer.lines[-1] and "remove it" in answer.lines[-1]
    (broken / name).unlink()
    with monkeypatch.context() as patch:
        if name == "result.json":
            patch.setattr(Learner, "gradients", lambda *args, **kwargs: pytest.fail("trained again"))
        assert command(*settings("broken")).code == 0
    assert_same_run(run(settings("straight")), broken)


def test_a_lost_or_damaged_config_does_not_stop_a_resumption(settings, monkeypatch, command):
    from lpc_runner.evaluate import main

    broken = interrupted(settings("broken"), monkeypatch, 5, signal.SIGTERM)
    (broken / "config.yaml").write_text("dataset: [")
    answer = command(str(broken), entry=main)
    assert answer.code == 1 and len(answer.lines) == 1 and "config.yaml" in answer.err
    (broken / "config.yaml").unlink()
    answer = command(str(broken), entry=main)
    assert answer.code == 1 and len(answer.lines) == 1 and "config.yaml" in answer.err
    answer = command(*settings("broken"))  # the command line says it all again
    assert answer.code == 0, answer.err
    assert json.loads((broken / "run.json").read_text())["studies"] == ["default"]
    assert command(str(broken), entry=main).code == 0
    assert_same_run(run(settings("straight")), only_run(broken.parents[1]))


def test_a_run_of_an_earlier_version_is_done(workplace):
    """Its hash, its records and its checkpoint are read by whatever came since; a finished one is not run again."""
    import lpc_runner
    from lpc_runner.evaluate import evaluate
    from lpc_runner.sample import sample
    from lpc_runner.study.study import read_study

    overrides = earlier_run("done")
    before = result_of(next(Path("outputs/runs").iterdir()))
    planned = plan(cell_of(*overrides))
    assert planned.directory.state() == "done"
    assert execute(planned) == before == result_of(only_run())
    loaded = lpc_runner.load(only_run())
    assert loaded.update == 6 and loaded.cfg.step_size.value == 0.1
    config = only_run() / "config.yaml"
    config.write_text(re.sub(r"^(step_size:\n(?:  .*\n)*?  value:) 0\.1$", r"\1 1e-1", config.read_text(), flags=re.M))
    assert "value: 1e-1" in config.read_text() and lpc_runner.load(only_run()).cfg.step_size.value == 0.1
    assert sample(only_run(), 4).exists()
    measured = json.loads(evaluate(only_run(), ("num_threads=1",)).read_text())["metrics"]
    assert measured == pytest.approx(before["metrics"], rel=1e-3, abs=1e-3)
    (found,) = read_study(Path("outputs/default")).runs
    assert found.status == "finished"
    follower = run((*overrides, "seed=5", f"trainer.init_from={only_run()}"))
    assert result_of(follower)["status"] == "finished"


def test_an_interrupted_run_of_an_earlier_version_goes_on(workplace):
    overrides = earlier_run("interrupted")
    old = rows_of(next(Path("outputs/runs").iterdir()))
    planned = plan(cell_of(*overrides))
    assert planned.directory.state() == "resume"
    execute(planned)
    straight = run((*overrides, "output_dir=straight"))
    resumed = planned.directory.path
    assert resumed.name == straight.name and len((resumed / "sessions.jsonl").read_text().splitlines()) == 2
    assert rows_of(resumed)[:3] == old[:3]  # what was logged stays
    # Another processor rounds otherwise: the first half was computed elsewhere.
    for one, other in zip(rows_of(resumed), rows_of(straight), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    left, right = result_of(resumed), result_of(straight)
    assert left["gradient_evaluations"] == right["gradient_evaluations"] and left["num_updates"] == 6
    assert left["metrics"] == pytest.approx(right["metrics"], rel=1e-2, abs=1e-3)
