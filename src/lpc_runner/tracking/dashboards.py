"""One W&B workspace and one report per study; their panels follow from what the study's runs hold."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import write_atomically
from lpc_runner.base.presentation import SYMBOLS
from lpc_runner.store.log import rows_of
from lpc_runner.store.runs import DONE
from lpc_runner.tracking.uploads import place_of, runs_of
from lpc_runner.tracking.wandb_service import Place, one_line, online, read_mapping

# Spread over orders of magnitude in a sweep.
LOGARITHMIC = ("step_size", "learning_rate", "scale")
# Where several settings vary, curves are grouped by the first of these; a seed makes repetitions, never groups.
_GROUP_ORDER = ("beta", "objective", "preconditioning", "sampler", "num_steps", "step_size", "learning_rate")


@dataclass(frozen=True)
class StudyFacts:
    """One study; `settings`: the values of each flat key; `logged`, `final`: keys of W&B's history, summary."""

    name: str
    num_runs: int
    num_done: int
    settings: dict[str, list[Any]]
    logged: list[str]
    final: list[str]
    pictures: list[str]
    trackers: list[dict[str, Any]]

    @property
    def varying(self) -> list[str]:
        """Settings with more than one value, the seed left out; of a run without such a setting the value is None."""
        return [key for key, values in self.settings.items() if len(values) > 1 and key != "seed"]

    @property
    def group_key(self) -> str | None:
        """The setting that curves are grouped by; None: only seeds differ, or there is a single run."""
        rest = [key for key in self.varying if key not in _GROUP_ORDER]
        return next((key for key in (*_GROUP_ORDER, *rest) if key in self.varying), None)

    @property
    def distances(self) -> list[str]:
        """Final Fréchet distances, `final/fid` of Inception first."""
        distances = [key for key in self.final if key == "final/fid" or key.startswith("final/fd_")]
        return sorted(distances, key=lambda key: key != "final/fid")


def study_facts(study: Path) -> StudyFacts:
    """Read outputs/<study>. Raises UserError (one line) for a folder without runs or with damaged files."""
    runs = runs_of(study)
    settings: dict[str, list[Any]] = {}
    logged: dict[str, None] = {}
    final: dict[str, None] = {}
    pictures: dict[str, None] = {}
    descriptions = [run.description()["keys"] for run in runs]
    for key in dict.fromkeys(key for keys in descriptions for key in keys):
        values = {repr(keys.get(key)): keys.get(key) for keys in descriptions}
        settings[key] = sorted(values.values(), key=lambda value: (value is None, isinstance(value, str), value))
    num_done = 0
    for run in runs:
        result = run.result()
        for row in rows_of(run).values():
            logged |= dict.fromkeys(row.values)
            pictures |= dict.fromkeys(row.pictures)
        if result is not None and result["status"] in DONE:
            num_done += 1
            final |= dict.fromkeys(f"final/{name}" for name in result["metrics"])
    trackers = [run.settings()["tracker"] for run in runs]
    if not logged and not final:
        raise UserError(f"{study}: its runs have recorded nothing yet")
    name = Path(study).resolve().name
    return StudyFacts(name, len(runs), num_done, settings, sorted(logged), sorted(final), list(pictures), trackers)


_COLUMNS = 3  # panels side by side, each 8 of W&B's 24 columns wide
_WIDTH, _HEIGHT = 8, 6
_NO_ENTITY = "entity"  # stands in a specification that is not saved, where no account says which


@dataclass(frozen=True)
class Section:
    """A titled group of panels; `text` explains it in the report."""

    title: str
    text: str
    panels: list[Any]


@dataclass(frozen=True)
class Saved:
    """What came of it: the specification's file, the addresses in W&B, and why there are none if so."""

    path: Path
    urls: list[str]
    reason: str | None


def save_dashboard(
    study: Path, entity: str | None = None, project: str | None = None, output: Path | None = None
) -> Saved:
    """Save workspace and report of outputs/<study> in W&B, and their specification in dashboard.json; returns Saved.

    Saving again replaces both. Without key or network only the file is written. Raises UserError (one line).
    """
    facts = study_facts(study)
    path = output or Path(study) / "dashboard.json"
    _require_package()
    before = read_mapping(path, "the dashboard is saved as a new one then")
    with ExitStack() as stack:
        try:
            stack.enter_context(online("saving a dashboard"))
        except UserError as error:
            place = _place(facts, entity, project, server="", default=_NO_ENTITY)
            workspace, report = build_workspace(facts, place), build_report(facts, place)
            _write(path, place, workspace, report, before.get("saved", {}))
            return Saved(path, [], one_line(error))
        return _save_online(facts, path, entity, project, before.get("saved", {}))


def build_sections(facts: StudyFacts) -> list[Section]:
    """Every panel of a study; a section without panels is left out."""
    grouped = f", grouped by {_label(facts.group_key)}" if facts.group_key else ""
    measured = [key for key in facts.logged if key.startswith("eval/") and key != "eval/num_samples"]
    training = [key for key in facts.logged if key.startswith("train/") and key != "train/gradient_evaluations"]
    chain = [key for key in facts.logged if key.startswith("chain/")]
    sections = [
        Section("Final metrics", _final_text(facts), _final_panels(facts)),
        Section("Sweep", f"Settings that vary ({_varying(facts)}), and what they lead to.", _sweep_panels(facts)),
        Section("Sample quality during training", f"Against updates{grouped}.", _curves(facts, measured)),
        Section("Training", f"Means over a batch, against updates{grouped}.", _curves(facts, training)),
        Section("Chain", f"Along the chains of a batch, against updates{grouped}.", _curves(facts, chain)),
        Section("Pictures", "Grids by run and update: always of the same draws from the prior.", _pictures(facts)),
        Section("Runs", "Settings and results in which the runs differ.", _comparer()),
    ]
    return [section for section in sections if section.panels]


def build_workspace(facts: StudyFacts, place: Place) -> Any:
    """The workspace as wandb_workspaces has it; `_to_model()` is what W&B stores."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=place.entity,
        project=place.project,
        name=facts.name,
        sections=[ws.Section(name=part.title, panels=part.panels, is_open=True) for part in build_sections(facts)],
        settings=ws.WorkspaceSettings(max_runs=max(facts.num_runs, 1)),
        runset_settings=ws.RunsetSettings(filters=_filter(facts)),
    )


def build_report(facts: StudyFacts, place: Place, *, resolved: bool = False) -> Any:
    """The same panels with text; `resolved`: the set of runs names its project, which W&B must know then."""
    import wandb_workspaces.reports.v2 as wr

    where: dict[str, Any] = {"entity": place.entity, "project": place.project} if resolved else {}
    blocks: list[Any] = [
        wr.P(f"{facts.num_runs} runs, {facts.num_done} of them finished or diverged. {_settings_text(facts)}")
    ]
    for part in build_sections(facts):
        runset = wr.Runset(name=facts.name, filters=_filter(facts), **where)
        blocks += [wr.H2(part.title), wr.P(part.text), wr.PanelGrid(runsets=[runset], panels=part.panels)]
    return wr.Report(project=place.project, entity=place.entity, title=facts.name, blocks=blocks, width="fluid")


def _filter(facts: StudyFacts) -> Any:
    """The study's runs: a run's first study is its W&B group, the others are tags."""
    from wandb_workspaces import expr

    return expr.Or(expr.Metric("Group") == facts.name, expr.Metric("Tags").isin([facts.name]))


def _final_panels(facts: StudyFacts) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    panels: list[Any] = []
    if "step_size" in facts.varying:
        color = wr.Config("beta") if "beta" in facts.varying else None
        panels += [
            wr.ScatterPlot(
                title=f"{key.removeprefix('final/')} against γ",
                x=wr.Config("step_size"),
                y=wr.SummaryMetric(key),
                z=color,
                log_x=True,
            )
            for key in facts.distances
        ]
    group = wr.Config(facts.group_key) if facts.group_key else None
    panels += [
        wr.BarPlot(
            title=key.removeprefix("final/"),
            metrics=[key],
            groupby=group,
            groupby_aggfunc="mean" if group else None,
            groupby_rangefunc="stddev" if group else None,
            max_bars_to_show=max(facts.num_runs, 1),
        )
        for key in facts.final
    ]
    return _placed(panels)


def _sweep_panels(facts: StudyFacts) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    if not facts.varying or not facts.final:
        return []
    column = wr.ParallelCoordinatesPlotColumn
    columns = [
        column(wr.Config(key), display_name=_label(key), log=key in LOGARITHMIC or None) for key in facts.varying
    ]
    columns += [column(wr.SummaryMetric(key)) for key in facts.distances or facts.final[:1]]
    panel = wr.ParallelCoordinatesPlot(columns=columns, title="settings and Fréchet distance")
    panel.layout = wr.Layout(0, 0, 3 * _WIDTH, _HEIGHT)
    return [panel]


def _curves(facts: StudyFacts, keys: list[str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    group = wr.Config(facts.group_key) if facts.group_key else None
    return _placed(
        [
            wr.LinePlot(
                title=key,
                x="Step",
                y=[key],
                title_x="updates",
                title_y=key.partition("/")[2],
                groupby=group,
                groupby_aggfunc="mean" if group else None,
                groupby_rangefunc="minmax" if group else None,
                max_runs_to_show=max(facts.num_runs, 1),
            )
            for key in keys
        ]
    )


def _pictures(facts: StudyFacts) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    browser = wr.MediaBrowser
    panels = [browser(title=key, media_keys=[key], grid_x_axis="step", grid_y_axis="run") for key in facts.pictures]
    for number, panel in enumerate(panels):
        panel.layout = wr.Layout(0, 2 * _HEIGHT * number, 3 * _WIDTH, 2 * _HEIGHT)
    return panels


def _comparer() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.RunComparer(diff_only="split", layout=wr.Layout(0, 0, 3 * _WIDTH, 2 * _HEIGHT))]


def _placed(panels: list[Any]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    for number, panel in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        panel.layout = wr.Layout(_WIDTH * column, _HEIGHT * row, _WIDTH, _HEIGHT)
    return panels


def _label(key: str | None) -> str:
    return SYMBOLS.get(key, key) if key else ""


def _varying(facts: StudyFacts) -> str:
    return ", ".join(map(_label, facts.varying))


def _settings_text(facts: StudyFacts) -> str:
    def text(value: Any) -> str:
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    parts = [f"{_label(key)} in {', '.join(map(text, facts.settings[key]))}" for key in facts.varying]
    seeds = facts.settings.get("seed", [])
    parts += [f"seeds {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
    return f"What differs: {'; '.join(parts)}." if parts else ""


def _final_text(facts: StudyFacts) -> str:
    if "step_size" in facts.varying:
        colors = ", coloured by β" if "beta" in facts.varying else ""
        return f"Fréchet distance against the step size γ on a logarithmic axis{colors}; below it every final metric."
    return "Every final metric, mean and standard deviation over runs of a group."


def _place(facts: StudyFacts, entity: str | None, project: str | None, server: str, default: str | None) -> Place:
    places = {place_of(tracker, entity, project, server, default) for tracker in facts.trackers}
    if len(places) > 1:
        named = ", ".join(sorted(f"{place.entity}/{place.project}" for place in places))
        raise UserError(f"the runs of {facts.name} are in several W&B projects ({named}): give --entity and --project")
    return places.pop()


def _save_online(
    facts: StudyFacts, path: Path, entity: str | None, project: str | None, saved: dict[str, dict[str, str]]
) -> Saved:
    import wandb

    api = wandb.Api()
    place = _place(facts, entity, project, api.settings["base_url"], api.default_entity)
    # The project is there once a run is; a report refuses one that is not.
    if place.project not in {existing.name for existing in api.projects(place.entity)}:
        api.create_project(place.project, place.entity)
    workspace, report = build_workspace(facts, place), build_report(facts, place, resolved=True)
    ids = saved.get(place.key, {"name": "", "id": "", "report": ""})
    workspace._internal_name, workspace._internal_id, report.id = ids["name"], ids["id"], ids["report"]
    try:
        workspace.save()
        ids = {"name": workspace._internal_name, "id": workspace._internal_id, "report": report.id}
        report.save()
        ids["report"] = report.id
    except (ValueError, OSError) as error:
        raise UserError(f"saving a dashboard: {one_line(error)}") from error
    finally:  # also after half of it: saving again must replace what there is
        _write(path, place, workspace, report, saved | {place.key: ids})
    return Saved(path, [workspace.url, report.url], None)


def _write(path: Path, place: Place, workspace: Any, report: Any, saved: dict[str, dict[str, str]]) -> None:
    content = {
        "entity": place.entity,
        "project": place.project,
        "saved": saved,
        "workspace": json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)),
        "report": json.loads(report._to_model().model_dump_json(by_alias=True, exclude_none=True)),
    }
    try:
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _require_package() -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise UserError("dashboards need the package wandb-workspaces: pip install 'lpc-runner[dashboards]'") from None
