"""Checkpoints: whatever happens within a save, a whole one is there afterwards."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch

from lpc_runner.base.errors import UserError
from lpc_runner.store.checkpoints import load_checkpoint, require_checkpoint, save_checkpoint
from lpc_runner.store.runs import RunDirectory
from lpc_runner.training.learner import restore


class Stop(BaseException):
    """As sudden as a kill, for this process: nothing below catches it."""


STATE = {"weights": torch.arange(5000.0), "counters": {"update": 1}}


@pytest.mark.parametrize("what", ["open", "fsync", "replace", "unlink"])
def test_a_save_that_is_cut_anywhere_leaves_a_whole_checkpoint(what, tmp_path, monkeypatch):
    """The n-th file operation of a kind dies, before or after it acted, for every n that a save makes."""
    targets = {"open": ("builtins.open", open), "fsync": ("os.fsync", os.fsync)}
    targets |= {"replace": ("os.replace", os.replace), "unlink": ("pathlib.Path.unlink", Path.unlink)}
    name, real = targets[what]
    deaths = 0
    for acted in (False, True):
        for doomed in range(10):
            folder = tmp_path / f"{acted}-{doomed}"
            for update in (1, 2):
                save_checkpoint(folder, update, {**STATE, "counters": {"update": update}})
            calls = iter(range(100))

            def operation(*args, doomed=doomed, acted=acted, calls=calls, **kwargs):
                number = next(calls)
                if number == doomed and not acted:
                    raise Stop
                answer = real(*args, **kwargs)
                if number == doomed:
                    if what == "open":
                        answer.write(b"half a checkpoint")
                        answer.close()
                    raise Stop
                return answer

            with monkeypatch.context() as patch:
                patch.setattr(name, operation)
                try:
                    save_checkpoint(folder, 3, {**STATE, "counters": {"update": 3}})
                except Stop:
                    deaths += 1
                else:
                    assert doomed > 0  # the operation is one that a save makes
                    break
            state = load_checkpoint(folder)
            assert state["counters"]["update"] in (2, 3)
            assert torch.equal(state["weights"], STATE["weights"])
            save_checkpoint(folder, 4, {**STATE, "counters": {"update": 4}})  # and the next save is not disturbed
            assert load_checkpoint(folder)["counters"]["update"] == 4
            assert len(list(folder.glob("update-*.pt"))) == 2
        else:
            pytest.fail("ten operations and no end")
    assert deaths >= 2


def test_a_disk_that_fills_within_a_write_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    for update in (1, 2):
        save_checkpoint(tmp_path, update, {**STATE, "counters": {"update": update}})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 3, STATE)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("there, here", [(None, True), (True, None)])
def test_an_optimiser_s_steps_are_launched_as_its_own_device_wants_it(there, here):
    """A checkpoint of a CPU, where Adam is a loop, goes on by one fused kernel on CUDA, and the other way round."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    one, other = (torch.optim.Adam([weight], lr=rate, fused=fused) for rate, fused in ((0.1, there), (0.3, here)))
    weight.grad = torch.ones(5)
    one.step()
    restore(other, copy.deepcopy(one.state_dict()))
    (group,) = other.param_groups
    assert (group["fused"], group["lr"]) == (here, 0.1)
    other.step()
    assert float(other.state[weight]["step"]) == 2 and torch.equal(one.state[weight]["exp_avg"], torch.full((5,), 0.1))


def test_a_run_without_a_checkpoint_is_said_as_it_was_named(tmp_path):
    with pytest.raises(UserError, match=f"^trainer.init_from={tmp_path} has no checkpoint yet$"):
        require_checkpoint(RunDirectory(tmp_path), setting="trainer.init_from=")
