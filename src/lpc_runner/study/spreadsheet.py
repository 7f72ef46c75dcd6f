"""A study as one flat table for other programs: a row per run, nothing averaged, nothing rounded."""

from __future__ import annotations

import csv
import io

from lpc_runner.study.study import Study


def study_csv(study: Study) -> str:
    """One row per run: its settings, state, cost and every number, in full precision."""
    records = []
    group_of = {id(run): group for group in study.groups for run in [*group.runs, *group.repeated]}
    for run in study.runs:
        group = group_of[id(run)]
        counted = any(run is other for other in group.counted)
        record = {"run": run.name, "status": run.status, "group": group.label, "counted": counted}
        record |= {f"choice.{key}": value for key, value in run.choices.items() if not isinstance(value, dict)}
        record |= {f"setting.{key}": value for key, value in (group.properties | run.keys).items()}
        cost = ("num_updates", "num_epochs", "train_seconds", "total_seconds", "gradient_evaluations")
        record |= {name: run.result.get(name) for name in cost}
        place = run.result.get("diverged_at")
        record |= {f"diverged_at.{key}": value for key, value in place.items()} if isinstance(place, dict) else {}
        record |= {"error": run.result.get("error")}
        record |= {f"metric.{name}": value for name, value in run.numbers.items()}
        for found in run.measurements:
            prefix = "" if found.source == "result.json" else f"{found.source}:"
            record |= {f"{prefix}metric.{name}": value for name, value in found.values.items()}
            record |= {f"{prefix}measurement.{name}": value for name, value in found.facts.items()}
        records.append(record)
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
