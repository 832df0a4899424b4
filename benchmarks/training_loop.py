"""Measure the real training loop: whole runs of launch/pretrain.py, on fresh random samples, beside one another.

    python benchmarks/training_loop.py --config configs/gpt2-small-8k.yaml --output loop.json

A variant is a ZeRO stage, with the blocks compiled or not. Its row has medians over the steps after the first two, and
of the last step's trace the device's time by part. A variant that fails is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lcpt.benchmarking.trace import device_seconds
from lcpt.config import ConfigError, load_config
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

ROOT = Path(__file__).parents[1]
VARIANTS = {
    "zero1": ["parallel.zero_stage=1", "training.compile=false"],
    "zero1-compiled": ["parallel.zero_stage=1", "training.compile=auto"],
    "zero2-compiled": ["parallel.zero_stage=2", "training.compile=auto"],
    "zero3-compiled": ["parallel.zero_stage=3", "training.compile=auto"],
}
WARM_UP = 2  # steps, which compile and allocate
FIGURES = (
    "tokens_per_second",
    "tflops_per_second",
    "mfu",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "update_seconds",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="X.yaml")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="A,B", help=f"({','.join(VARIANTS)})")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help=f"of each variant, more than {WARM_UP} (8)")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of a step (4)")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for each variant (60)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.steps <= WARM_UP:
        print(f"error: --steps is {args.steps}; {WARM_UP} are only for warming up", file=sys.stderr)
        return 2
    variants = args.variants.split(",")
    if unknown := set(variants) - VARIANTS.keys():
        print(f"error: --variants {', '.join(unknown)} is none of {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    try:
        config = load_config(args.config, ["run.dir=none", *args.overrides])
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokens = config.data.context * config.training.micro_batch * args.micro_batches
    overrides = [
        *args.overrides,
        "data.path=synthetic:needle",
        "data.valid_path=null",
        f"training.global_batch_tokens={tokens}",
        f"training.max_steps={args.steps}",
        "training.warmup_steps=0",
        "training.norms_every_steps=0",
        f"training.profile.start={args.steps}",
        "training.profile.steps=1",
        "checkpoint.every_steps=1000000",
    ]
    report = report_header(groups.device()) | {"failed": {}, "rows": []}
    for name in variants:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            outcome = train(args.config, [*overrides, *VARIANTS[name], f"run.dir={run}"], args.limit)
            if outcome is None:
                report["rows"].append(row(f"{Path(args.config).stem} {name}", run, config.data.context))
            else:
                report["failed"][name] = outcome
                print(f"failed: {name}: {outcome}", file=sys.stderr)
        replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    print(f"written to {args.output}")
    return 1 if report["failed"] else 0


def train(config: str, overrides: list[str], limit: float) -> str | None:
    """Run launch/pretrain.py -> None, or how it failed."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", config, *overrides]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done in {limit:g} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None


def row(method: str, run: Path, context: int) -> dict:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steady = rows[WARM_UP:-1]  # the profiler slows the last one down
    [trace] = (run / "profile").iterdir()
    return {
        "method": method,
        "context": context,
        **{name: median([x[name] for x in steady]) for name in FIGURES},
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "steps": len(steady),
        "device_seconds": device_seconds(trace),
    }


def median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(rows: list[dict]) -> str:
    lines = [f"{'':34s} {'tokens/s':>10s} {'TFLOP/s':>8s} {'MFU':>6s} {'GiB':>6s}  seconds of the device by part"]
    for x in rows:
        mfu = "" if x["mfu"] is None else f"{x['mfu']:.1%}"
        parts = ", ".join(f"{part} {seconds:.4f}" for part, seconds in x["device_seconds"].items())
        lines.append(
            f"{x['method']:34s} {x['tokens_per_second']:10,.0f} {x['tflops_per_second']:8.3g} {mfu:>6s} "
            f"{x['peak_memory_bytes'] / 2**30:6.2f}  {parts or 'no kernels in the trace'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
