"""Measure perplexity, bits per byte, loss by position and loss on repeated bigrams of a checkpoint on whole documents,
or its recall on a task.

Every token of a document is scored once. With --stride N below the context, each sees at least context - N tokens; with
--carry-state each sees all of its document before it. Tasks are those of data.path, such as synthetic:mqar, in samples
that no training draws. Beside OUT.json it writes OUT.documents.jsonl: id, tokens, bytes and nats of each document."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lcpt.checkpoint import CheckpointError
from lcpt.data import DataError, is_task
from lcpt.data.documents import documents
from lcpt.evaluation import recall
from lcpt.evaluation.carried_state import score_with_carried_state
from lcpt.evaluation.intervals import FEW
from lcpt.evaluation.perplexity import Tally, score
from lcpt.evaluation.repeated_bigrams import RepeatedBigrams
from lcpt.evaluation.windows import text_bytes, windows
from lcpt.model.pretrained import Pretrained, open_pretrained
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.memory import peak_memory_bytes

EXAMPLE = """examples:
  python tools/evaluate.py --checkpoint runs/demo --data data/sample/valid.jsonl.xz \\
      --output runs/demo/evaluation.json
  python tools/evaluate.py --checkpoint runs/recall --data synthetic:mqar --output runs/recall/recall.json"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|STEP|EXPORT",
        help="a run folder, one of its steps, or what export.py wrote",
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE|DIR|synthetic:TASK", help="text, a prepared folder, or a task"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens a window (the context of training)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--stride", type=int, metavar="N", help="tokens between windows (the context: disjoint ones)")
    ways.add_argument("--carry-state", action="store_true", help="windows of a document go on from each other's state")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows at a time; changes no number (1)")
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="of a task (512)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    try:
        check(args)
        check_output(Path(args.output))
        trained, device = open_pretrained(args.checkpoint), groups.device()
        trained.model.to(device)
        began = time.perf_counter()
        evaluate = evaluate_task if is_task(args.data) else evaluate_text
        tokens, figures = evaluate(trained, device, args)
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = {
        "schema_version": 1,
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "data": str(args.data),
        **figures,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "peak_memory_bytes": peak_memory_bytes(device),
        "versions": {"torch": torch.__version__},
    }
    replace_text(Path(args.output), json.dumps(report, indent=2) + "\n")
    print_table(report, args.output)
    return 0


def check(args: argparse.Namespace) -> None:
    if is_task(args.data) and (args.stride or args.carry_state):
        raise DataError(f"{args.data} is scored sample by sample; leave out --stride and --carry-state")
    if args.carry_state and args.batch != 1:
        raise DataError("--carry-state goes through one document at a time; leave out --batch")
    for name in ("context", "batch", "samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise DataError(f"--{name} is {value}; it must be ≥ 1")


def check_output(path: Path) -> None:
    """Try to write the report, and what stands beside it, before anything is scored. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_suffix(".documents.jsonl")):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; name a file in --output")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to; name another file in --output")


def evaluate_text(trained: Pretrained, device: torch.device, args: argparse.Namespace) -> tuple[int, dict]:
    """Score documents; returns (tokens scored, figures)."""
    context = args.context or trained.context
    stride = args.stride or context
    if not 0 < stride <= context:
        raise DataError(f"stride {stride} must lie in 1 … {context} (the context)")
    tokenizer = trained.open_tokenizer()
    tally, bigrams, token_bytes = Tally(context), RepeatedBigrams(context), tokenizer.token_bytes()
    identifiers: list[str] = []
    digest = hashlib.sha256()

    def cut_documents():
        for number, (identifier, tokens, n_bytes) in enumerate(documents(args.data, tokenizer)):
            identifiers.append(identifier)
            digest.update(tokens.tobytes())
            yield from windows(number, tokens, context, stride, text_bytes([tokens[1:]], n_bytes, token_bytes))

    cut = cut_documents()
    scored = (
        score_with_carried_state(trained.model, cut, device)
        if args.carry_state
        else score(trained.model, cut, args.batch, device)
    )
    with tqdm(unit="tok", unit_scale=True, desc="scoring", disable=None) as bar:
        for window, losses in scored:
            tally.add(window, losses)
            bigrams.add(window, losses)
            bar.update(len(losses))
    if not tally.tokens:
        raise DataError(f"{args.data} holds no text to score")
    figures = tally.report()
    rows = tally.by_document(identifiers)
    replace_text(Path(args.output).with_suffix(".documents.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    return figures["tokens_scored"], {
        "fingerprint": digest.hexdigest(),
        **figures,
        "repeated_bigrams": bigrams.report(),
        "window": context,
        "stride": stride,
        "carry_state": args.carry_state,
    }


def evaluate_task(trained: Pretrained, device: torch.device, args: argparse.Namespace) -> tuple[int, dict]:
    """Ask the questions of a task; returns (tokens that the model read, figures)."""
    context, task = args.context or trained.context, recall.open_task(trained, args.data)
    answers = task.scored(context)
    parts = []
    with tqdm(unit="answer", unit_scale=True, total=args.samples * answers, desc="asking", disable=None) as bar:
        for part in recall.answers(trained.model, task, args.samples, context, args.batch, device):
            parts.append(part)
            bar.update(len(part.correct))
    return args.samples * context, {
        "fingerprint": task.fingerprint,
        "samples": args.samples,
        "context": context,
        **recall.report(parts, context),
    }


def print_table(report: dict, output: str) -> None:
    rows = {"checkpoint": report["checkpoint"], **(task_rows(report) if "accuracy" in report else text_rows(report))}
    rows |= {"tokens a second": f"{report['tokens_per_second']:,.0f}", "written to": output}
    for name, value in rows.items():
        print(f"{name:<18}{value}")


def text_rows(report: dict) -> dict[str, str]:
    repeated = report["repeated_bigrams"]
    rare = repeated["rare"] or {"loss": None, "tokens": 0}
    return {
        "scored": f"{report['tokens_scored']:,} tokens, {report['bytes_scored']:,} bytes",
        "window, stride": f"{report['window']:,}, {report['stride']:,}" + ", state carried" * report["carry_state"],
        "loss": f"{report['loss']:.4f} nats a token",
        "perplexity": f"{report['perplexity']:.2f} a token",
        "bits per byte": f"{report['bits_per_byte']:.4f} ({interval_of(report)})",
        "repeated bigrams": f"{mean_of(repeated)}; the rare ones: {mean_of(rare)}",
        "other tokens": mean_of({"loss": repeated["other_loss"], "tokens": repeated["other_tokens"]}),
    }


def interval_of(report: dict) -> str:
    count, interval = report["documents_scored"], report["bits_per_byte_interval"]
    if interval is None:
        return "of one document: no interval"
    few = f", {count} alone, too few to rely on it" if count < FEW else ""
    return f"95 % by documents{few}: {interval[0]:.3f} to {interval[1]:.3f}"


def mean_of(part: dict) -> str:
    return f"{part['loss']:.4f} nats ({part['tokens']:,} tokens)" if part["tokens"] else "none"


def task_rows(report: dict) -> dict[str, str]:
    distances = {
        f"  {part['start']:,} … {part['end'] - 1:,}": f"{part['accuracy']:.1%} of {part['answers']:,}"
        for part in report["recall_by_distance"]
    }
    return {
        "asked": f"{report['answers']:,} answers in {report['samples']:,} samples of {report['context']:,} tokens",
        "recall": f"{report['accuracy']:.1%} of the answers are right",
        "loss": f"{report['loss']:.4f} nats an answer",
        "by distance": "",
        **distances,
    }


if __name__ == "__main__":
    sys.exit(main())
