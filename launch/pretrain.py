"""Pretrain a model.

    deepspeed [--num_accelerators N] launch/pretrain.py --config configs/demo.yaml training.lr=3e-3
    python launch/pretrain.py --config configs/demo.yaml --dry-run

Anything in the config changes by section.key=value. The same command continues a run that was ended or killed. SIGTERM,
SIGUSR1 and Ctrl-C make it save and leave.

Exit codes: 0 finished; 1 a fault on some rank, start again; 2 bad input, said in one line; 3 a person must look;
75 asked to leave and saved, start again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to save: Ctrl-C just ends it

from lcpt.config import ConfigError, load_config, to_yaml  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the config and its cost, train nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        return refuse(error)
    if arguments.dry_run:
        from lcpt.training.dry_run import describe

        if is_first():
            print(to_yaml(config) + "\n" + describe(config, int(os.environ.get("WORLD_SIZE", 1))))
        return 0

    from lcpt.training import job

    return job.run(config, to_yaml(config))


def is_first() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def refuse(error: Exception) -> int:
    if is_first():
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
