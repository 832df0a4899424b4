"""Measure what a checkpoint costs a run: seconds to write one, and seconds in which training waits for it.

    python benchmarks/saving.py --output benchmarks/results/saving-cpu.json

Real runs on the demo's data (`make data` comes first), a few steps long, at about 10 and 100 million parameters. The
stall includes the wait for the last checkpoint before the run ends.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from lcpt.checkpoint import find_checkpoint, read_manifest
from lcpt.training.run_folder import environment
from lcpt.utils.atomic_files import replace_text

MODELS = {
    "10 M": {"n_layers": 11, "d_model": 256, "n_heads": 4},
    "100 M": {"n_layers": 13, "d_model": 768, "n_heads": 12},
}
INTERVAL = 1000  # steps between two saves by default


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="OUT.json")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    rows = [measure(name, model, args.ranks) for name, model in MODELS.items()]
    machine = environment()
    report = {
        "schema_version": 1,
        "date": date.today().isoformat(),
        "git_commit": machine["git_commit"],
        "device": machine["device"],
        "versions": machine["versions"],
        "command": "python benchmarks/saving.py --output OUT.json",
        "rows": rows,
    }
    replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    print(f"{'model':8}{'parameters':>13}{'bytes':>15}{'write s':>9}{'stall s':>9}{'step s':>8}{'of 1,000 steps':>16}")
    for row in rows:
        print(
            f"{row['model']:8}{row['parameters']:13,}{row['bytes']:15,}{row['save_seconds']:9.2f}"
            f"{row['save_stall_seconds']:9.3f}{row['step_seconds']:8.2f}{row['stall_at_default_interval']:16.4%}"
        )
    return 0


def measure(name: str, model: dict, ranks: int) -> dict:
    """Measure one row: a run of 9 steps that saves every third."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = {
            "run.dir": run,
            "data.context": 256,
            "training.global_batch_tokens": 512 * ranks,
            "training.max_steps": 9,
            "training.warmup_steps": 2,
            "training.valid_every_steps": 1000,
            "data.valid_path": "null",
            "checkpoint.every_steps": 3,
            **{f"model.{key}": value for key, value in model.items()},
        }
        command = ["deepspeed", "--num_accelerators", str(ranks), "launch/pretrain.py", "--config", "configs/demo.yaml"]
        subprocess.run(
            [
                Path(sys.executable).parent / command[0],
                *command[1:],
                *(f"{key}={value}" for key, value in settings.items()),
            ],
            check=True,
        )
        summary = json.loads((run / "summary.json").read_text())
        steps = sorted(json.loads(line)["step_seconds"] for line in (run / "metrics.jsonl").read_text().splitlines())
        manifest = read_manifest(find_checkpoint(run))
        shapes = [entry["shape"] for entry in manifest["tensors"]["weights"].values()]
        step_seconds, stall = steps[len(steps) // 2], summary["save_stall_seconds"]
        return {
            "model": name,
            "settings": {key: str(value) for key, value in settings.items() if key != "run.dir"},
            "ranks": ranks,
            "parameters": sum(map(math.prod, shapes)),
            "bytes": sum(entry["size_bytes"] for entry in manifest["files"].values()),
            "save_seconds": summary["save_seconds"],
            "save_stall_seconds": stall,
            "step_seconds": step_seconds,
            "stall_at_default_interval": stall / (stall + INTERVAL * step_seconds),
        }


if __name__ == "__main__":
    sys.exit(main())
