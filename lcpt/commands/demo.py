"""Run `make demo`: train on books and on recall, evaluate, plot, and print the result beside what it must beat.

It runs the same commands as a user would. A call after an interrupted one goes on with what is missing; a call after a
finished one prints the result and what to do next."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.config import Config, load_config
from lcpt.data import Corpus, open_tokenizer
from lcpt.evaluation.loss_plots import loss_by_position, loss_curve, recall_by_distance
from lcpt.evaluation.text_baselines import unigram_bits_per_byte, xz_bits_per_byte
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.figures import Heading

CONFIG, RECALL_CONFIG = "configs/demo.yaml", "configs/demo-recall.yaml"
# Short samples first: within 80 steps a model finds out what to do, which long ones of as many tokens do not teach it.
SHORT = ("data.context=64", "training.global_batch_tokens=2048", "training.micro_batch=32", "training.max_steps=80")
BIN = Path(sys.executable).parent  # of the environment that make setup made


@one_line_errors
def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not Path(CONFIG).is_file():
        raise ValueError(f"there is no {CONFIG} here: the demo runs in a checkout of lcpt, after `make data`")
    config, recall_config = load_config(CONFIG), load_config(RECALL_CONFIG)
    run = Path(config.run.dir)
    result = run / "demo.json"
    run.mkdir(parents=True, exist_ok=True)
    with locked(run / "demo.lock"):
        make(config, recall_config, run, result)
    print_table(config, run, json.loads(result.read_text()))
    return 0


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a file's lock. Raises ValueError where another process holds it."""
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another demo is running in {file.parent}; wait for it, or end it") from None
        yield


def make(config: Config, recall_config: Config, run: Path, result: Path) -> None:
    """Do what is missing, and write the result."""
    if is_finished(result):
        print(f"{run} holds a finished demo; `rm -r {run}` and `make demo` make it anew.\n")
    else:
        began = time.perf_counter()
        if not (run / "summary.json").exists():
            train(config)  # or goes on with it, where it was interrupted
        if not (run / "evaluation.json").exists() or not (run / "steps.json").exists():
            evaluate_and_time(config, run)
        learn_to_recall(recall_config, run / "recall")
        figures = collect(config, run) | {"recall": collect_recall(recall_config, run / "recall")}
        draw(run, figures["recall"])
        replace_text(result, json.dumps(figures | {"seconds": time.perf_counter() - began}, indent=2) + "\n")


def is_finished(result: Path) -> bool:
    """Check for a result with all figures of today: one of an earlier version may lack some."""
    return result.exists() and "recall" in json.loads(result.read_text())


def train(config) -> None:
    ranks = min(2, torch.cuda.device_count()) or 2
    print(f"\ntraining on {ranks} ranks at {config.data.context:,} tokens of context: a few minutes", flush=True)
    pretrain(ranks, environment((os.cpu_count() or 1) // ranks), "--config", CONFIG)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a program that computes on so many threads a process, at least one."""
    result = os.environ | {"OMP_NUM_THREADS": str(max(1, threads))}
    if not torch.cuda.is_available():
        result["DS_ACCELERATOR"] = "cpu"  # else the launcher warns that it found no GPU
    result["PATH"] = f"{BIN}{os.pathsep}{result.get('PATH', '')}"
    return result


def pretrain(ranks: int, env: dict[str, str], *arguments, log=None) -> None:
    """Run launch/pretrain.py under deepspeed, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("-q", "--num_accelerators", ranks, "--master_port", port, "launch/pretrain.py")
    call("deepspeed", *launcher, *arguments, env=env, log=log)


def evaluate_and_time(config, run: Path) -> None:
    print("\nscoring whole books by other authors", flush=True)
    call(
        "python",
        "-m",
        "lcpt.commands.evaluate",
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
        "-m",
        "lcpt.commands.benchmark_training",
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


def learn_to_recall(config, folder: Path) -> None:
    """Train polysketch and a window of one block side by side, and ask both."""
    models = recall_models(config)
    print(f"\nlearning to recall over {config.data.context:,} tokens: {' and '.join(models)}, a minute", flush=True)
    with ThreadPoolExecutor() as side_by_side:
        runs = [side_by_side.submit(learn_and_ask, folder / name, changes) for name, changes in models.items()]
    for done in runs:
        done.result()


def recall_models(config) -> dict[str, list[str]]:
    """Name the models that learn to recall, and what each changes in the config."""
    window = f"model.attention.softmax.window={config.model.attention.block_size}"
    return {"polysketch": [], "window": ["model.attention.kind=softmax", window]}


def learn_and_ask(folder: Path, changes: list[str]) -> None:
    """Train at a short context, then at that of the config, and write recall.json; skip what is done."""
    short, long, output = folder / "short", folder / "long", folder / "recall.json"
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(min(4, (os.cpu_count() or 1) // 2))  # a small model gains nothing from more
    with open(folder / "log.txt", "a") as log:
        for run, more in ((short, SHORT), (long, [f"training.init_from={short}"])):
            if not (run / "summary.json").exists():
                pretrain(1, env, "--config", RECALL_CONFIG, f"run.dir={run}", *changes, *more, log=log)
            if not (run / "summary.json").exists():
                sys.exit(f"error: {run} was interrupted; the same command goes on with it")
        if not output.exists():
            asked = ("--data", "synthetic:mqar", "--samples", 256, "--batch", 4, "--output", output)
            call("python", "-m", "lcpt.commands.evaluate", "--checkpoint", long, *asked, env=env, log=log)


def call(program: str, *arguments, env=None, log=None) -> None:
    """Run a program of the environment; where it fails, end with one line. What it prints may go into a log."""
    command = [str(BIN / program), *map(str, arguments)]
    done = subprocess.run(command, env=env, check=False, stdout=log, stderr=log)
    if done.returncode:
        seen = f"; see {log.name}" if log else ""
        sys.exit(f"error: {program} {' '.join(command[1:])} ended with exit code {done.returncode}{seen}")


def collect(config, run: Path) -> dict:
    """Collect the figures of the closing table that books gave."""
    evaluation, steps = (json.loads((run / f"{name}.json").read_text()) for name in ("evaluation", "steps"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train_corpus, valid_corpus = Corpus(config.data.path), Corpus(config.data.valid_path)
    tokenizer = open_tokenizer(valid_corpus.tokenizer)
    seen, held_out = ([c.document(n)[1] for n in range(len(c))] for c in (train_corpus, valid_corpus))
    return {
        "tokens": rows[-1]["tokens"],
        "tokens_per_second": rows[-1]["tokens"] / sum(row.get("step_seconds", 0) for row in rows),
        "bits_per_byte": evaluation["bits_per_byte"],
        "xz_bits_per_byte": xz_bits_per_byte(tokenizer.decode(tokens[1:].tolist()) for tokens in held_out),
        "unigram_bits_per_byte": unigram_bits_per_byte(
            seen, held_out, tokenizer.vocab_size, valid_corpus.manifest["bytes"]
        ),
        "step_milliseconds": {row["method"].split()[-1]: row["milliseconds"]["p50"] for row in steps["rows"]},
    }


def collect_recall(config, folder: Path) -> dict:
    """Collect recall by distance of each model, and what a guess among the tokens that can be answers is worth."""
    reports = {name: json.loads((folder / name / "recall.json").read_text()) for name in recall_models(config)}
    return {
        "context": config.data.context,
        "window": config.model.attention.block_size,
        "chance": 2 / config.model.vocab_size,
        "by_distance": {name: report["recall_by_distance"] for name, report in reports.items()},
    }


def draw(run: Path, recall: dict) -> None:
    """Draw the three pictures."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    facts = str(run), evaluation.get("device"), evaluation.get("precision")  # earlier versions wrote neither
    loss_curve(Heading("Loss over tokens", *facts), run / "metrics.jsonl", run / "loss.png")
    heading = Heading("Loss by position, on books by other authors", *facts)
    loss_by_position(heading, evaluation, run / "loss_by_position.png")
    names = {"polysketch": "polysketch", "window": f"softmax, window of {recall['window']} tokens"}
    lines = [(names[name], parts) for name, parts in recall["by_distance"].items()]
    heading = Heading("Recall by distance", *facts)
    recall_by_distance(heading, lines, recall["chance"], run / "recall_by_distance.png")


def print_table(config, run: Path, figures: dict) -> None:
    polysketch, softmax = (figures["step_milliseconds"][kind] for kind in ("polysketch", "softmax"))
    context, bin_ = config.data.context, BIN.relative_to(Path.cwd()) if BIN.is_relative_to(Path.cwd()) else BIN
    recall = figures["recall"]
    far = {name: parts[-1] for name, parts in recall["by_distance"].items()}
    start, end = far["polysketch"]["start"], far["polysketch"]["end"]
    rows = {
        "trained on": f"{figures['tokens']:,} tokens of four novels, {figures['tokens_per_second']:,.0f} a second",
        "unseen books": f"{figures['bits_per_byte']:.3f} bits per byte",
        "  xz -9": f"{figures['xz_bits_per_byte']:.3f} bits per byte of the same text",
        "  token unigram": f"{figures['unigram_bits_per_byte']:.3f} bits per byte of the same text",
        f"step at {context:,}": f"polysketch {polysketch / 1e3:.2f} s, softmax {softmax / 1e3:.2f} s a sequence "
        f"({softmax / polysketch:.2f} times polysketch's), on one core or GPU",
        f"recall at {end:,}": f"polysketch {percent(far['polysketch']['accuracy'])}, "
        f"window of {recall['window']} tokens {percent(far['window']['accuracy'])}, chance {percent(recall['chance'])} "
        f"(answers {start:,} to {end - 1:,} tokens back)",
        "this call took": f"{figures['seconds'] / 60:.1f} minutes",
        "pictures": f"{run}/recall_by_distance.png, loss.png, loss_by_position.png",
        "every step": f"{bin_}/tensorboard --logdir {run}",
    }
    print()
    for name, value in rows.items():
        print(f"{name:16}{value}")
    print(
        "\nnext: change anything with section.key=value (README.md), for example another kind of attention:\n"
        f"  {bin_}/deepspeed -q --num_accelerators 2 launch/pretrain.py --config {CONFIG} "
        "model.attention.kind=softmax run.dir=runs/softmax"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
