"""`lpc-runner dashboard`: panels that a study's runs can fill, in a file without an account and in W&B with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_server import forget_wandb, make_run, running_server

from lpc_runner.base.errors import UserError
from lpc_runner.tracking.dashboards import build_sections, save_dashboard, study_facts
from lpc_runner.tracking.uploads import publish

SCRIPT = Path(__file__).parents[1] / "scripts" / "dashboard.py"
NESTED = ("config",)  # beside the flat keys, in W&B's config


@pytest.fixture
def server(tmp_path, monkeypatch):
    with running_server(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def study(tmp_path):
    """Two step sizes by two βs and one run without preconditioning, two seeds each."""
    outputs = tmp_path / "outputs"
    for number, (step_size, beta) in enumerate([(0.01, 0.25), (0.1, 0.25), (0.01, 0.9), (0.1, 0.9), (0.1, None)]):
        for seed in (0, 1):
            keys = {"step_size": step_size, "beta": beta, "seed": seed, "num_steps": 30}
            keys = {key: value for key, value in keys.items() if value is not None}
            make_run(outputs, f"digits-lpc-s{seed}-{number}", ("table1", "fig4") if number else ("fig4",), **keys)
    return outputs / "fig4"


def panels_of(workspace):
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def report_panels(report):
    grids = [block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]], grids


def keys_in(panels):
    """Every name that panels ask W&B for, by the part of a run it belongs to."""
    found = {"config": set(), "summary": set(), "history": set(), "media": set()}
    for panel in panels:
        settings, kind = panel["config"], panel["viewType"]
        accessors = [settings[axis] for axis in ("xAxis", "yAxis", "zAxis") if settings.get(axis)]
        if kind == "Run History Line Plot":
            assert accessors == ["_step"]
            accessors = []
        accessors += [column["accessor"] for column in settings.get("columns", [])]
        for accessor in accessors:
            part, _, name = accessor.partition(":")
            found[part].add(name.removesuffix(".value") if part == "config" else name)
        if settings.get("groupBy"):
            found["config"].add(settings["groupBy"].removesuffix(".value"))
        found["history" if kind == "Run History Line Plot" else "summary"] |= set(settings.get("metrics", []))
        found["media"] |= set(settings.get("mediaKeys", []))
    return found


@pytest.mark.slow
def test_every_panel_asks_for_what_the_runs_hold_in_w_and_b(server, study):
    """The oracle is the server's store of the published runs, not the code that read the folder."""
    assert all(done.startswith("published") for _, done in publish(study))
    saved = save_dashboard(study)
    stored = list(server.runs.values())
    held = {
        "config": {key for run in stored for key in run.config},
        "summary": {key for run in stored for key in run.summary},
        "history": {key for run in stored for row in run.history for key in row},
        "media": {key for run in stored for row in run.history for key in row if isinstance(row[key], dict)},
    }
    content = json.loads(saved.path.read_text())
    workspace = [panel for panels in panels_of(content["workspace"]).values() for panel in panels]
    report, grids = report_panels(content["report"])
    for panels in (workspace, report):
        asked = keys_in(panels)
        assert all(asked[part] <= held[part] for part in held)
        assert asked["config"] == {"step_size", "beta"}  # what varies, without the seed
        assert asked["media"] == {"samples", "reconstructions"} == held["media"]
        assert {"eval/fd_random_conv", "train/elbo", "chain/drift_norm_last"} <= asked["history"]
        assert {"final/fd_random_conv", "final/elbo"} <= asked["summary"]
    # Saved as built: the views are in the server, filtered to the study by group or tag.
    kinds = {view["type"]: json.loads(view["spec"]) for view in server.views.values()}
    assert set(kinds) == {"project-view", "runs"}
    (runset,) = kinds["project-view"]["section"]["runSets"]
    for filters in [runset["filters"], *(grid["metadata"]["runSets"][0]["filters"] for grid in grids)]:
        rules = [(rule["key"]["name"], rule["op"], rule["value"]) for rule in filters["filters"]]
        assert rules == [("group", "=", "fig4"), ("tags", "IN", ["fig4"])]
        assert filters["filters"][1]["connector"] == "OR"
    groups = [(run.fields["groupName"], run.fields["tags"]) for run in stored]
    assert all(group == "fig4" or "fig4" in tags for group, tags in groups)
    assert len(saved.urls) == 2 and all(url.startswith(server.url) for url in saved.urls)


def test_saving_again_replaces_the_workspace_and_the_report(server, study):
    first, second = save_dashboard(study), save_dashboard(study)
    assert first.urls == second.urls and len(server.views) == 2
    assert all(view["projectName"] == "lpc_test" for view in server.views.values())


def test_the_scatter_is_distance_against_step_size_in_log_scale_coloured_by_beta(study):
    (scatter,) = [p for part in build_sections(study_facts(study)) for p in part.panels if hasattr(p, "regression")]
    settings = scatter._to_model().config
    assert (settings.x_axis, settings.y_axis) == ("config:step_size.value", "summary:final/fd_random_conv")
    assert (settings.z_axis, settings.x_axis_log_scale) == ("config:beta.value", True)


def test_curves_are_means_by_beta_and_the_parallel_axes_are_what_varies(study):
    sections = {part.title: part for part in build_sections(study_facts(study))}
    for title in ("Sample quality during training", "Training", "Chain"):
        for panel in sections[title].panels:
            settings = panel._to_model().config
            assert (settings.group_by, settings.group_agg, settings.aggregate) == ("beta.value", "mean", True)
    (parallel,) = sections["Sweep"].panels
    columns = [(column.accessor, column.log) for column in parallel._to_model().config.columns]
    assert columns[:-1] == [("config:step_size.value", True), ("config:beta.value", None)]
    assert columns[-1][0] == "summary:final/fd_random_conv"


def test_a_single_setting_has_no_groups_no_scatter_and_no_parallel_axes(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "outputs", f"digits-vae-s{seed}-1", ("vae",), seed=seed)
    sections = build_sections(study_facts(tmp_path / "outputs" / "vae"))
    assert "Sweep" not in [part.title for part in sections]
    configs = [panel._to_model().config for part in sections for panel in part.panels]
    assert not any(getattr(settings, "group_by", None) for settings in configs)
    assert not any(hasattr(settings, "y_axis_log_scale") and hasattr(settings, "z_axis") for settings in configs)


def test_without_an_account_the_command_writes_the_file_and_says_so_in_one_line(study, tmp_path, monkeypatch):
    forget_wandb(monkeypatch, tmp_path / "home")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    target = tmp_path / "spec.json"
    command = [sys.executable, str(SCRIPT), str(study), "--entity", "team", "--output", str(target)]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert "not saved in W&B" in done.stdout and str(target) in done.stdout
    content = json.loads(target.read_text())
    assert (content["entity"], content["project"], content["saved"]) == ("team", "lpc_test", {})
    assert panels_of(content["workspace"])["Pictures"]


def test_impossible_requests_are_one_line(study, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no runs"):
        save_dashboard(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is damaged"):
        save_dashboard(study, output=tmp_path / "bad.json")
    config = next(study.iterdir()) / "config.yaml"
    config.write_text("tracker: {_target_: lpc_runner.tracking.tracker.NoTracker}\n")
    with pytest.raises(UserError, match="tracker=none names no W&B project: give one with --project"):
        save_dashboard(study)
