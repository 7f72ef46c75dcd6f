"""The time left that check=true states: nothing for what is done, the log's pace for what is begun, else a timing."""

import json
import math
from pathlib import Path

import pytest
from conftest import TINY, TINY_VAE, only_run, plan_of

from lpc_runner.runner.pace import Pace
from lpc_runner.tracking.progress import show_duration


def test_a_finished_run_has_nothing_left(command):
    assert command(*TINY).code == 0
    assert Pace().seconds_left(plan_of(*TINY)) == 0


def test_a_run_under_way_goes_on_at_its_own_pace(command):
    assert command(*TINY).code == 0
    run = only_run()
    (run / "result.json").unlink()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pace = rows[3]["time/ms_per_update"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))  # 4 of 6 updates
    assert Pace().seconds_left(plan_of(*TINY)) == pytest.approx(2 * pace / 1e3)


def test_a_new_run_is_timed_once_and_costs_in_proportion_to_its_chain(workplace, monkeypatch):
    calls = []
    monkeypatch.setattr("lpc_runner.runner.pace._time_updates", lambda run: calls.append(run) or (0.5, 0.25))
    pace = Pace()
    short, long = plan_of(*TINY), plan_of(*TINY, "sampler.num_steps=30", "seed=3", "step_size.value=0.01")
    assert pace.seconds_left(short) == pytest.approx(6 * (0.5 + 3 * 0.25))
    assert pace.seconds_left(long) == pytest.approx(6 * (0.5 + 30 * 0.25))
    assert len(calls) == 1
    pace.seconds_left(plan_of(*TINY, "model.hidden=[17]"))
    assert len(calls) == 2
    pace.seconds_left(plan_of(*TINY, "precision=bf16"))
    pace.seconds_left(plan_of(*TINY, "engine=compiled"))
    assert len(calls) == 4
    assert not list(Path("outputs").glob("*"))


@pytest.mark.parametrize("every", [1, 4, 10])
def test_a_thinned_chain_is_extrapolated_by_whole_periods(workplace, monkeypatch, every):
    """Where a step costs 1 and a gradient of θ 3 more, a chain of 40 steps costs 40 + 3 · 40 / every."""

    def cost(learner, *_):
        sampler = learner.sampler
        return 7 + sampler.num_steps + 3 * math.ceil(sampler.num_steps / sampler.theta_every)

    monkeypatch.setattr("lpc_runner.runner.pace._once", cost)
    plan = plan_of(*TINY, "sampler.num_steps=40", f"sampler.theta_every={every}")
    assert Pace().seconds_left(plan) == pytest.approx(6 * (7 + 40 + 120 / every))


@pytest.mark.parametrize("words", [TINY, (*TINY_VAE, "method=vae"), (*TINY_VAE, "method=iwae")])
def test_real_timings_are_positive(workplace, words):
    seconds = Pace().seconds_left(plan_of(*words))
    assert 0 < seconds < 60 and math.isfinite(seconds)


@pytest.mark.parametrize("load, says", [(0.3, False), (9.0, True)])
def test_a_forecast_made_on_a_busy_machine_says_so(command, monkeypatch, load, says):
    monkeypatch.setattr("lpc_runner.runner.pace.load_average", lambda: load)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    out = command(*TINY, "check=true").out
    assert ("timed beside other work (load average 9.0 on 4 cores)" in out) == says and "nothing was started" in out


def test_what_was_not_timed_is_not_cautioned_about(command, monkeypatch):
    monkeypatch.setattr("lpc_runner.runner.pace.load_average", lambda: 99.0)
    assert command(*TINY).code == 0
    assert "timed beside" not in command(*TINY, "check=true").out


def test_durations_as_people_say_them():
    said = {12.4: "12 s", 119: "119 s", 240: "4 min", 3600 * 3 + 300: "3 h 05 min", 86400 + 7300: "1 d 02 h"}
    assert {seconds: show_duration(seconds) for seconds in said} == said


def test_longer_first_visits_are_counted_in_the_first_epoch(workplace, monkeypatch):
    """Two epochs of 89 updates: five steps each in the first, one in the second."""
    monkeypatch.setattr(Pace, "_timed", lambda self, run: (0.5, 1.0))
    words = ("sampler.start=persistent", "sampler.num_steps=1", "sampler.first_steps=5", "trainer.max_updates=178")
    assert Pace().seconds_left(plan_of(*TINY, *words)) == pytest.approx(0.5 * 178 + 89 * 5 + 89 * 1)
