"""Save a study's W&B workspace and report: python scripts/dashboard.py outputs/<study>

The panels follow from the study's runs: Fréchet distance against the step size, final metrics, parallel coordinates of
the settings that vary, curves of eval/*, train/*, chain/*, sample grids, and a comparison of the runs. Saving again
replaces both. The specification goes to outputs/<study>/dashboard.json, without an account that is all that happens.
"""

import argparse
import sys
from pathlib import Path

from lpc_runner.errors import UserError
from lpc_runner.tracking.dashboards import save_dashboard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="outputs/<study>")
    parser.add_argument("--entity", help="W&B user or team (default: the runs' config.yaml, else the account's)")
    parser.add_argument("--project", help="W&B project (default: the runs' config.yaml)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: outputs/<study>/dashboard.json")
    arguments = parser.parse_args()
    try:
        saved = save_dashboard(arguments.study, arguments.entity, arguments.project, arguments.output)
    except UserError as error:
        sys.exit(f"lpc_runner: {error}")
    if saved.reason is not None:
        print(f"not saved in W&B ({saved.reason}); the specification is in {saved.path}")
    for url in saved.urls:
        print(url)


if __name__ == "__main__":
    main()
