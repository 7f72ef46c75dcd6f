"""`lpc-runner publish outputs/<study>`: put finished runs into W&B, once each.

For runs that were offline (or lost the network, or had tracker=none): metrics.jsonl, pictures, configuration and final
metrics are replayed under the ids that an online run would have. What W&B already holds is not sent again, so that an
interrupted upload is completed by the same command. Needs `wandb login` or WANDB_API_KEY; exit 1 without them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lpc_runner.base.surroundings import one_line_errors
from lpc_runner.tracking.uploads import publish


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lpc-runner publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, nargs="+", help="outputs/<study>, or one run: outputs/<study>/<run>")
    parser.add_argument("--entity", help="W&B user or team (default: the run's config.yaml, else the account's)")
    parser.add_argument("--project", help="W&B project (default: the run's config.yaml)")
    arguments = parser.parse_args()
    with one_line_errors():
        for study in arguments.study:
            for name, done in publish(study, arguments.entity, arguments.project):
                print(f"{name}: {done}", flush=True)


if __name__ == "__main__":
    main()
