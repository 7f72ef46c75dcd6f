"""One W&B workspace and one report per study; their panels follow from what the study's runs hold."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lpc_runner.base.errors import UserError, one_line
from lpc_runner.base.files import write_atomically
from lpc_runner.base.presentation import SYMBOLS
from lpc_runner.store.environment import settings_of
from lpc_runner.store.log import final_numbers, rows_of
from lpc_runner.store.runs import DONE
from lpc_runner.tracking.uploads import place_of, runs_of
from lpc_runner.tracking.wandb_service import Place, online, read_mapping

# Spread over orders of magnitude in a sweep.
_LOGARITHMIC = ("step_size", "learning_rate", "scale")
# Where several settings vary, curves are grouped by the first of these; a seed makes repetitions, never groups.
_GROUP_ORDER = ("beta", "objective", "preconditioning", "sampler", "num_steps", "step_size", "learning_rate")
_COUNTS = ("eval/num_samples", "train/gradient_evaluations")  # have no curve
_COLUMNS = 24  # that W&B divides the width into


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
        return next((key for key in (*_GROUP_ORDER, *self.varying) if key in self.varying), None)

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
            final |= dict.fromkeys(final_numbers(result))
    trackers = [settings_of(run)["tracker"] for run in runs]
    if not logged and not final:
        raise UserError(f"{study}: its runs have recorded nothing yet")
    name = Path(study).resolve().name
    return StudyFacts(name, len(runs), num_done, settings, sorted(logged), sorted(final), list(pictures), trackers)


class Section(NamedTuple):
    """A titled group of panels; `text` explains it in the report."""

    title: str
    text: str
    panels: list[Any]


class Saved(NamedTuple):
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
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise UserError("dashboards need the package wandb-workspaces: pip install 'lpc-runner[dashboards]'") from None
    saved = read_mapping(path, "the dashboard is saved as a new one then").get("saved", {})
    with ExitStack() as stack:
        try:
            stack.enter_context(online("saving a dashboard"))
        except UserError as error:
            place = _place(facts, entity, project, server="", default="entity")  # no account says which
            _write(path, place, build_workspace(facts, place), build_report(facts, place), saved)
            return Saved(path, [], one_line(error))
        api = wandb.Api()
        place = _place(facts, entity, project, api.settings["base_url"], api.default_entity)
        # The project is there once a run is; a report refuses one that is not.
        if place.project not in {existing.name for existing in api.projects(place.entity)}:
            api.create_project(place.project, place.entity)
        workspace, report = build_workspace(facts, place), build_report(facts, place, resolved=True)
        ids = saved.setdefault(place.key, {"name": "", "id": "", "report": ""})
        workspace._internal_name, workspace._internal_id, report.id = ids["name"], ids["id"], ids["report"]
        try:
            workspace.save()
            ids |= {"name": workspace._internal_name, "id": workspace._internal_id}
            report.save()
            ids["report"] = report.id
        except (ValueError, OSError) as error:
            raise UserError(f"saving a dashboard: {one_line(error)}") from error
        finally:  # also after half of it: saving again must replace what there is
            _write(path, place, workspace, report, saved)
        return Saved(path, [workspace.url, report.url], None)


def build_sections(facts: StudyFacts) -> list[Section]:
    """Every panel of a study; a section without panels is left out."""
    import wandb_workspaces.reports.v2 as wr

    varying, group_key = facts.varying, facts.group_key
    group = wr.Config(group_key) if group_key else None
    mean = "mean" if group else None

    def curves(kind: str) -> list[Any]:
        return [
            wr.LinePlot(
                title=key,
                x="Step",
                y=[key],
                title_x="updates",
                title_y=key.partition("/")[2],
                groupby=group,
                groupby_aggfunc=mean,
                groupby_rangefunc="minmax" if group else None,
                max_runs_to_show=facts.num_runs,
            )
            for key in facts.logged
            if key.startswith(kind) and key not in _COUNTS
        ]

    bars = [
        wr.BarPlot(
            title=key.removeprefix("final/"),
            metrics=[key],
            groupby=group,
            groupby_aggfunc=mean,
            groupby_rangefunc="stddev" if group else None,
            max_bars_to_show=facts.num_runs,
        )
        for key in facts.final
    ]
    final_text, scatters = "Every final metric, mean and standard deviation over runs of a group.", []
    if "step_size" in varying:
        color = wr.Config("beta") if "beta" in varying else None
        coloured = ", coloured by β" if color else ""
        final_text = (
            f"Fréchet distance against the step size γ on a logarithmic axis{coloured}; below it every final metric."
        )
        step_size = wr.Config("step_size")
        scatters = [
            wr.ScatterPlot(
                title=f"{key.removeprefix('final/')} against γ",
                x=step_size,
                y=wr.SummaryMetric(key),
                z=color,
                log_x=True,
            )
            for key in facts.distances
        ]
    sweep = []
    if varying and facts.final:
        column = wr.ParallelCoordinatesPlotColumn
        settings = [
            column(wr.Config(key), display_name=_label(key), log=key in _LOGARITHMIC or None) for key in varying
        ]
        metrics = [column(wr.SummaryMetric(key)) for key in facts.distances or facts.final[:1]]
        sweep = [wr.ParallelCoordinatesPlot(columns=settings + metrics, title="settings and Fréchet distance")]
    browser = wr.MediaBrowser
    pictures = [browser(title=key, media_keys=[key], grid_x_axis="step", grid_y_axis="run") for key in facts.pictures]
    what_varies = ", ".join(map(_label, varying))
    grouped = f", grouped by {_label(group_key)}" if group_key else ""
    sections = [
        Section("Final metrics", final_text, _placed([*scatters, *bars])),
        Section("Sweep", f"Settings that vary ({what_varies}), and what they lead to.", _placed(sweep, _COLUMNS)),
        Section("Sample quality during training", f"Against updates{grouped}.", _placed(curves("eval/"))),
        Section("Training", f"Means over a batch, against updates{grouped}.", _placed(curves("train/"))),
        Section("Chain", f"Along the chains of a batch, against updates{grouped}.", _placed(curves("chain/"))),
        Section(
            "Pictures",
            "Grids by run and update: always of the same draws from the prior.",
            _placed(pictures, _COLUMNS, height=12),
        ),
        Section(
            "Runs",
            "Settings and results in which the runs differ.",
            _placed([wr.RunComparer(diff_only="split")], _COLUMNS, height=12),
        ),
    ]
    return [section for section in sections if section.panels]


def _placed(panels: list[Any], width: int = 8, height: int = 6) -> list[Any]:
    """The panels side by side, row by row."""
    import wandb_workspaces.reports.v2 as wr

    for number, panel in enumerate(panels):
        row, column = divmod(number, _COLUMNS // width)
        panel.layout = wr.Layout(width * column, height * row, width, height)
    return panels


def build_workspace(facts: StudyFacts, place: Place) -> Any:
    """The workspace as wandb_workspaces has it; `_to_model()` is what W&B stores."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=place.entity,
        project=place.project,
        name=facts.name,
        sections=[ws.Section(name=part.title, panels=part.panels, is_open=True) for part in build_sections(facts)],
        settings=ws.WorkspaceSettings(max_runs=facts.num_runs),
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


def _label(key: str) -> str:
    return SYMBOLS.get(key, key)


def _settings_text(facts: StudyFacts) -> str:
    def text(value: Any) -> str:
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    parts = [f"{_label(key)} in {', '.join(map(text, facts.settings[key]))}" for key in facts.varying]
    seeds = facts.settings.get("seed", [])
    parts += [f"seeds {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
    return f"What differs: {'; '.join(parts)}." if parts else ""


def _place(facts: StudyFacts, entity: str | None, project: str | None, server: str, default: str | None) -> Place:
    places = {place_of(tracker, entity, project, server, default) for tracker in facts.trackers}
    if len(places) > 1:
        named = ", ".join(sorted(f"{place.entity}/{place.project}" for place in places))
        raise UserError(f"the runs of {facts.name} are in several W&B projects ({named}): give --entity and --project")
    return places.pop()


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
