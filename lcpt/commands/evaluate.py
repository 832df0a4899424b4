"""Measure perplexity, bits per byte, loss by position and loss on repeated bigrams of a checkpoint on whole documents,
or its recall on a task.

Every token of a document is scored once. With --stride N below the context, each sees at least context - N tokens; with
--carry-state each sees all of its document before it. --context-gain scores the same tokens with 512, 1,024, 2,048 …
tokens before them. Tasks are those of data.path, such as synthetic:mqar, in samples that no training draws. Beside
OUT.json it writes OUT.documents.jsonl, a record of each document from which all of that is computed.

Started by torchrun, deepspeed or srun, its ranks share the work; figures are those of one rank."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from lcpt.commands.arguments import CHECKPOINT, check_output, check_ranges, whole_numbers
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.data import DataError, is_task
from lcpt.evaluation import recall
from lcpt.evaluation.context_gain import default_contexts
from lcpt.evaluation.intervals import FEW
from lcpt.evaluation.text import TextScoring, evaluate_text
from lcpt.model.pretrained import Pretrained, open_pretrained
from lcpt.parallel import groups
from lcpt.parallel.launchers import find_place
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.memory import peak_memory_bytes
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import device_name

EXAMPLE = """examples:
  lcpt evaluate --checkpoint runs/demo --data data/sample/valid.jsonl.xz \\
      --output runs/demo/evaluation.json
  torchrun --nproc-per-node 8 -m lcpt.commands.evaluate --checkpoint runs/mine --data held_out.jsonl --precision bf16 \\
      --batch 4 --context-gain --output evaluation.json
  lcpt evaluate --checkpoint runs/recall --data synthetic:mqar --output runs/recall/recall.json"""

DOCUMENTS = ".documents.jsonl"  # what takes the place of the suffix of OUT.json


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, **CHECKPOINT)
    parser.add_argument(
        "--data", required=True, metavar="FILE|DIR|synthetic:TASK", help="text, a prepared folder, or a task"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens a window (the context of training)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--stride", type=int, metavar="N", help="tokens between windows (the context: disjoint ones)")
    ways.add_argument("--carry-state", action="store_true", help="windows of a document go on from each other's state")
    parser.add_argument(
        "--last-window",
        choices=("short", "full"),
        default="short",
        help="a document's last window begins where the one before ends (short), or early enough to be as long as the "
        "others, as in lm-evaluation-harness (full)",
    )
    parser.add_argument(
        "--context-gain",
        nargs="*",
        metavar="N,N",
        help="score targets with these contexts too (doublings from 512 to the context)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (fp32)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows at a time; changes no number (1)")
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="of a task (512)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    if find_place(os.environ).world > 1:
        groups.join()
    try:
        with groups.raise_on_all_ranks():
            trained, device = prepare(args), groups.device()
        began = time.perf_counter()
        rows = None
        if is_task(args.data):
            figures = evaluate_task(trained, device, args)
        else:
            figures, rows = evaluate_text(trained, args.data, text_scoring(args, trained), device)
    finally:
        is_first = groups.is_first()
        groups.leave()
    if not is_first:
        return 0
    tokens = args.samples * figures["context"] if rows is None else figures["tokens_scored"]
    report = {
        "schema_version": 1,
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "data": str(args.data),
        "device": device_name(device),
        "precision": args.precision,
        **figures,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "peak_memory_bytes": peak_memory_bytes(device),
        "versions": {"torch": torch.__version__},
    }
    if rows is not None:
        replace_text(Path(args.output).with_suffix(DOCUMENTS), "".join(json.dumps(row) + "\n" for row in rows))
    replace_text(Path(args.output), json.dumps(report, indent=2) + "\n")
    print_table(report, args.output)
    return 0


def prepare(args: argparse.Namespace) -> Pretrained:
    """Check what was asked for, and open the model on this rank's device."""
    if is_task(args.data) and (args.stride or args.carry_state or args.context_gain is not None):
        raise DataError(f"{args.data} is scored sample by sample; leave out --stride, --carry-state, --context-gain")
    check_ranges(args, {"context": 1, "stride": 1, "batch": 1, "samples": 1})
    check_output(args.output, DOCUMENTS)
    trained = open_pretrained(args.checkpoint)
    if not is_task(args.data):
        trained.check_tokenizer()
        text_scoring(args, trained)
    trained.model.to(groups.device(), torch.bfloat16 if args.precision == "bf16" else torch.float32)
    return trained


def text_scoring(args: argparse.Namespace, trained: Pretrained) -> TextScoring:
    window = args.context or trained.context
    return TextScoring(
        window=window,
        stride=args.stride or window,
        carry_state=args.carry_state,
        full_last_window=args.last_window == "full",
        batch=args.batch,
        gain_contexts=gain_contexts(args.context_gain, trained.context),
    )


def gain_contexts(given: list[str] | None, longest: int) -> tuple[int, ...]:
    """Read --context-gain: contexts, doublings up to that of training where none are given, nothing where it is not."""
    if given is None:
        return ()
    return tuple(sorted(set(whole_numbers("context-gain", given)))) if given else tuple(default_contexts(longest))


def evaluate_task(trained: Pretrained, device: torch.device, args: argparse.Namespace) -> dict:
    """Ask the questions of a task; returns its figures, on the first rank."""
    context, task = args.context or trained.context, recall.open_task(trained, args.data)
    total, quiet = args.samples * task.scored(context), not groups.is_first()
    parts = []
    with progress_bar(unit="answer", unit_scale=True, total=total, desc="asking", hidden=quiet) as bar:
        for part in recall.answers(trained.model, task, args.samples, context, args.batch, device):
            parts.append(part)
            bar.update(len(part.correct))
    figures = {"fingerprint": task.fingerprint, "samples": args.samples, "context": context}
    return figures | (recall.report(parts, context) if parts else {})


def print_table(report: dict, output: str) -> None:
    rows = {"checkpoint": report["checkpoint"], **(task_rows(report) if "accuracy" in report else text_rows(report))}
    rows |= {"tokens a second": f"{report['tokens_per_second']:,.0f}", "written to": output}
    for name, value in rows.items():
        print(f"{name:<18}{value}")


def text_rows(report: dict) -> dict[str, str]:
    repeated = report["repeated_bigrams"]
    rare = repeated["rare"] or {"loss": None, "tokens": 0}
    window = f"{report['window']:,}, {report['stride']:,}" + ", state carried" * report["carry_state"]
    return {
        "scored": f"{report['tokens_scored']:,} tokens, {report['bytes_scored']:,} bytes, in {report['precision']}",
        "window, stride": window + ", the last as long as the others" * (report["last_window"] == "full"),
        "loss": f"{report['loss']:.4f} nats a token",
        "perplexity": f"{report['perplexity']:.2f} a token",
        "bits per byte": f"{report['bits_per_byte']:.4f} ({interval_of(report)})",
        "repeated bigrams": f"{mean_of(repeated)}; the rare ones: {mean_of(rare)}",
        "other tokens": mean_of({"loss": repeated["other_loss"], "tokens": repeated["other_tokens"]}),
        **gain_rows(report.get("context_gain")),
    }


def gain_rows(gain: dict | None) -> dict[str, str]:
    if gain is None:
        return {}
    rows = {"context gain": f"{gain['targets']:,} tokens of {gain['documents']} documents, nats a token"}
    for part in gain["contexts"]:
        interval = part["gain_interval"]
        reach = f", {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        rows[f"  {part['context']:,}"] = f"{part['loss']:.4f}" + f" (gain {part['gain']:.4f}{reach})" * bool(
            part["gain"]
        )
    return rows


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
