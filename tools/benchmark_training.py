"""Time and memory of a training step, of configs side by side in one run.

Without a GPU it is the time of one thread at work, which the neighbours on a shared machine disturb least."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from lcpt.checkpoint.files import replace_text
from lcpt.config import Config, ConfigError, load_config
from lcpt.evaluation.provenance import header
from lcpt.evaluation.timing import time_in_turn
from lcpt.parallel import groups
from lcpt.training.benchmark import training_step

EXAMPLE = """example:
  python tools/benchmark_training.py --configs configs/demo.yaml --kinds softmax,polysketch --contexts 8192,16384 \\
      --output steps.json"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", required=True, metavar="X.yaml,Y.yaml")
    parser.add_argument("--kinds", metavar="A,B", help="each config once with each of these in all layers")
    parser.add_argument("--contexts", required=True, metavar="N,N", help="tokens a sequence")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps of each, in turn (5)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    try:
        contexts = [int(context) for context in args.contexts.split(",")]
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        configs = read_configs(args.configs.split(","), args.kinds.split(",") if args.kinds else [])
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError:
        print(f"error: --contexts {args.contexts} is no list of whole numbers; give 8192,16384", file=sys.stderr)
        return 2

    rows = [row for context in contexts for row in measure(configs, context, args.repeats)]
    report = header(groups.device()) | {"rows": rows}
    replace_text(Path(args.output), json.dumps(report, indent=2) + "\n")
    print_table(rows, args.output)
    return 0


def read_configs(paths: list[str], kinds: list[str]) -> dict[str, Config]:
    """A name for each row of the table -> its config: every file as it is, or once with each kind in all layers."""
    overrides = [[f"model.attention.kind={kind}", "model.attention.pattern=[]"] for kind in kinds] or [[]]
    configs = [(Path(path).stem, load_config(path, given)) for path in paths for given in overrides]
    return {f"{stem} {'+'.join(sorted(set(config.model.kinds)))}": config for stem, config in configs}


def measure(configs: dict, context: int, repeats: int) -> list[dict]:
    device = groups.device()
    steps = {
        name: training_step(config.model, config.training.micro_batch, context, config.training.precision, device)
        for name, config in configs.items()
    }
    figures = time_in_turn(steps, repeats, device)
    medians = {name: figure["milliseconds"]["p50"] for name, figure in figures.items()}
    return [
        {
            "method": name,
            "settings": dataclasses.asdict(config.model),
            "context": context,
            "batch": config.training.micro_batch,
            "heads": config.model.n_heads,
            "head_dim": config.model.d_model // config.model.n_heads,
            "dtype": config.training.precision,
            "device": device.type,
            "backend": "torch",
            "mode": "training_step",
            **figures[name],
            "speedup": {other: medians[other] / medians[name] for other in configs if other != name},
        }
        for name, config in configs.items()
    ]


def print_table(rows: list[dict], output: str) -> None:
    print(f"{'context':>8}  {'step':32}{'median ms':>10}{'p10':>9}{'p90':>9}{'peak MiB':>10}  times as fast as")
    for row in rows:
        ms = row["milliseconds"]
        others = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in row["speedup"].items())
        print(f"{row['context']:>8}  {row['method']:32}{ms['p50']:10.0f}{ms['p10']:9.0f}{ms['p90']:9.0f}"
              f"{row['peak_memory_bytes'] / 2**20:10.0f}  {others}")
    print(f"written to {output}")


if __name__ == "__main__":
    sys.exit(main())
