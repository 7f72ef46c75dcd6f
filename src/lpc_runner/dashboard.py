"""`lpc-runner dashboard outputs/<study>`: save a study's W&B workspace and report.

The panels follow from the study's runs: Fréchet distance against the step size, final metrics, parallel coordinates of
the settings that vary, curves of eval/*, train/*, chain/*, sample grids, and a comparison of the runs. Saving again
replaces both. The specification goes to outputs/<study>/dashboard.json, without an account that is all that happens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lpc_runner.base.surroundings import one_line_errors
from lpc_runner.tracking.dashboards import save_dashboard


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lpc-runner dashboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="outputs/<study>")
    parser.add_argument("--entity", help="W&B user or team (default: the runs' config.yaml, else the account's)")
    parser.add_argument("--project", help="W&B project (default: the runs' config.yaml)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: outputs/<study>/dashboard.json")
    arguments = parser.parse_args()
    with one_line_errors():
        saved = save_dashboard(arguments.study, arguments.entity, arguments.project, arguments.output)
    if saved.reason is not None:
        print(f"not saved in W&B ({saved.reason}); the specification is in {saved.path}")
    for url in saved.urls:
        print(url)


if __name__ == "__main__":
    main()
