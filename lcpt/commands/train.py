"""Pretrain a model.

    deepspeed -q [--num_accelerators N] launch/pretrain.py --config configs/demo.yaml training.lr=3e-3
    lcpt train --config configs/demo.yaml --dry-run [--ranks 8]

Anything in the config changes by section.key=value. The same command continues a run that was ended or killed. SIGTERM,
SIGUSR1 and Ctrl-C make it save and leave.

A dry run prints the config and its cost, and makes every check of a start on so many ranks, but changes nothing.

Exit codes: 0 finished; 1 a fault on some rank, start again; 2 bad input, said in one line; 3 a person must look;
75 asked to leave and saved, start again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to save: Ctrl-C just ends it

from lcpt.commands.one_line_errors import one_line_errors  # noqa: E402
from lcpt.config import Config, load_config, to_yaml  # noqa: E402
from lcpt.parallel.launchers import find_place, is_first  # noqa: E402


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print config and cost, check a start, train nothing")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="that --dry-run checks a start on (as many as there are)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose memory --dry-run counts on, such as H100-80GB")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if not arguments.dry_run and (arguments.ranks, arguments.gpu) != (None, None):
        parser.error("--ranks and --gpu belong to --dry-run")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return dry_run(config, arguments.ranks, arguments.gpu)

    from lcpt.training import job

    return job.run(config, to_yaml(config))


def dry_run(config: Config, ranks: int | None, gpu: str | None) -> int:
    """Print config and cost, then make every check of a start; ValueError says what keeps it from starting."""
    from lcpt.training.dry_run import describe
    from lcpt.training.dry_start import dry_start
    from lcpt.training.out_of_memory import count_parameters

    if ranks is None:
        ranks = find_place(os.environ).world
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}; it must be ≥ 1")
    if is_first(os.environ):
        print(to_yaml(config))
        count_parameters(config.model)  # no table holds what no memory does
        print(describe(config, ranks, gpu), flush=True)
        print(dry_start(config, ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
