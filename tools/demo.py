"""Run `make demo`: train, evaluate on unseen books, plot, and print the result beside what it must beat.

It runs the same commands as a user would; a second call prints the finished result and what to do next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from lcpt.config import load_config
from lcpt.data import Corpus, Tokenizer
from lcpt.evaluation.plots import loss_by_position, loss_curve
from lcpt.evaluation.text_baselines import unigram_bits_per_byte, xz_bits_per_byte
from lcpt.utils.atomic_files import replace_text

CONFIG = "configs/demo.yaml"
TOOLS = Path(__file__).parent
BIN = Path(sys.executable).parent  # of the environment that make setup made


def main() -> int:
    config = load_config(CONFIG)
    run = Path(config.run.dir)
    result = run / "demo.json"
    if not result.exists():
        began = time.perf_counter()
        if not (run / "summary.json").exists():
            train(config)  # or goes on with it, where it was interrupted
        evaluate_and_time(config, run)
        loss_curve(run / "metrics.jsonl", run / "loss.png")
        loss_by_position(json.loads((run / "evaluation.json").read_text()), run / "loss_by_position.png")
        replace_text(result, json.dumps(collect(config, run, time.perf_counter() - began), indent=2) + "\n")
    else:
        print(f"{run} holds a finished demo; `rm -r {run}` and `make demo` make it anew.\n")
    print_table(config, run, json.loads(result.read_text()))
    return 0


def train(config) -> None:
    ranks = min(2, torch.cuda.device_count()) or 2
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # else the launcher warns that it found no GPU
    environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', '')}"
    print(f"\ntraining on {ranks} ranks at {config.data.context:,} tokens of context: a few minutes", flush=True)
    call("deepspeed", "-q", "--num_accelerators", str(ranks), "launch/pretrain.py", "--config", CONFIG, env=environment)


def evaluate_and_time(config, run: Path) -> None:
    print("\nscoring whole books by other authors", flush=True)
    call(
        "python",
        TOOLS / "evaluate.py",
        "--checkpoint",
        run,
        "--data",
        config.data.valid_path,
        "--output",
        run / "evaluation.json",
    )
    print("\none training step, polysketch and softmax in turn", flush=True)
    call(
        "python",
        TOOLS / "benchmark_training.py",
        "--configs",
        CONFIG,
        "--kinds",
        "polysketch,softmax",
        "--contexts",
        str(config.data.context),
        "--repeats",
        "1",
        "--output",
        run / "steps.json",
    )


def call(program: str, *arguments, env=None) -> None:
    done = subprocess.run([str(BIN / program), *map(str, arguments)], env=env, check=False)
    if done.returncode:
        sys.exit(f"error: {program} {' '.join(map(str, arguments))} ended with exit code {done.returncode}")


def collect(config, run: Path, seconds: float) -> dict:
    """Collect the figures of the closing table."""
    evaluation, steps = (json.loads((run / f"{name}.json").read_text()) for name in ("evaluation", "steps"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train_corpus, valid_corpus = Corpus(config.data.path), Corpus(config.data.valid_path)
    tokenizer = Tokenizer(valid_corpus.tokenizer)
    seen, held_out = ([c.document(n)[1] for n in range(len(c))] for c in (train_corpus, valid_corpus))
    return {
        "tokens": rows[-1]["tokens"],
        "tokens_per_second": rows[-1]["tokens"] / sum(row["step_seconds"] for row in rows),
        "bits_per_byte": evaluation["bits_per_byte"],
        "xz_bits_per_byte": xz_bits_per_byte(tokenizer.decode(tokens[1:].tolist()) for tokens in held_out),
        "unigram_bits_per_byte": unigram_bits_per_byte(seen, held_out, tokenizer.token_bytes()),
        "step_milliseconds": {row["method"].split()[-1]: row["milliseconds"]["p50"] for row in steps["rows"]},
        "seconds": seconds,
    }


def print_table(config, run: Path, figures: dict) -> None:
    polysketch, softmax = (figures["step_milliseconds"][kind] for kind in ("polysketch", "softmax"))
    context, bin_ = config.data.context, BIN.relative_to(Path.cwd()) if BIN.is_relative_to(Path.cwd()) else BIN
    rows = {
        "trained on": f"{figures['tokens']:,} tokens of four novels, {figures['tokens_per_second']:,.0f} a second",
        "unseen books": f"{figures['bits_per_byte']:.3f} bits per byte",
        "  xz -9": f"{figures['xz_bits_per_byte']:.3f} bits per byte of the same text",
        "  token unigram": f"{figures['unigram_bits_per_byte']:.3f} bits per byte of the same text",
        f"step at {context:,}": f"polysketch {polysketch / 1e3:.2f} s, softmax {softmax / 1e3:.2f} s a sequence "
        f"({softmax / polysketch:.2f} times polysketch's), on one core or GPU",
        "this call took": f"{figures['seconds'] / 60:.1f} minutes",
        "loss curves": f"{run}/loss.png, {run}/loss_by_position.png",
        "every step": f"{bin_}/tensorboard --logdir {run}",
    }
    print()
    for name, value in rows.items():
        print(f"{name:16}{value}")
    print(
        "\nnext: change anything with section.key=value (README.md), for example another kind of attention:\n"
        f"  {bin_}/deepspeed --num_accelerators 2 launch/pretrain.py --config {CONFIG} "
        "model.attention.kind=softmax run.dir=runs/softmax"
    )


if __name__ == "__main__":
    sys.exit(main())
