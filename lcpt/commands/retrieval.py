"""Measure how well a checkpoint finds again what was planted in held-out documents, by context and depth.

niah_single_2: one sentence states a value, and its beginning comes again at the end of the context. niah_multikey_1:
three more such sentences stand elsewhere. copy: a passage, and its beginning again. associative_recall: 16 lines of key
and value, some asked for. Answers are scored by likelihood, beside other words and beside the same context with nothing
planted, so any base model can be measured. Beside OUT.json it draws OUT.png, accuracy and gain by context and depth."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from lcpt.commands.arguments import CHECKPOINT, check_output, whole_numbers, words
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.data.documents import documents
from lcpt.evaluation import retrieval_plots
from lcpt.evaluation.intervals import FEW
from lcpt.evaluation.retrieval import Settings, choose_texts, default_contexts, even_depths, measure
from lcpt.evaluation.retrieval_tasks import TASKS
from lcpt.model.pretrained import open_pretrained
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.figures import Heading
from lcpt.utils.memory import peak_memory_bytes
from lcpt.utils.provenance import report_header

EXAMPLE = """examples:
  lcpt retrieval --checkpoint runs/demo --data data/sample/valid.jsonl.xz --output runs/demo/retrieval.json
  lcpt retrieval --checkpoint runs/mine --data held_out.jsonl --contexts 8192,16384,32768 --samples 40 \\
      --output runs/mine/retrieval.json

By default a model of the demo's size takes one to three minutes on two CPU cores."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, **CHECKPOINT)
    parser.add_argument("--data", required=True, metavar="FILE|DIR", help="held-out text, or a prepared folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="A,B", help=f"of {', '.join(TASKS)} (all)")
    parser.add_argument(
        "--contexts", nargs="+", metavar="N,N", help="tokens (512, doubled up to the context of training)"
    )
    parser.add_argument("--depths", type=int, default=3, metavar="N", help="from the beginning to the end (3)")
    parser.add_argument(
        "--samples", type=int, default=10, metavar="N", help="of each task, context and depth, over the documents (10)"
    )
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="contexts at a time; changes no number (4)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    output = Path(args.output)
    if output.suffix == ".png":
        raise ValueError(f"--output {output} is the name of the picture; name a .json file")
    check_output(output, ".png")
    contexts = sorted(set(whole_numbers("contexts", args.contexts))) if args.contexts else None
    trained, device = open_pretrained(args.checkpoint), groups.device()
    settings = Settings(
        tasks=list(dict.fromkeys(words(args.tasks))),
        contexts=contexts or default_contexts(trained.context),
        depths=even_depths(args.depths),
        samples=args.samples,
        batch=args.batch,
    )
    tokenizer = trained.open_tokenizer()
    began = time.perf_counter()
    texts = choose_texts(documents(args.data, tokenizer), settings)
    figures = measure(trained.model.to(device), tokenizer, texts, settings, device)
    report = {
        **report_header(device),
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "data": str(args.data),
        "batch": args.batch,
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory_bytes(device),
        **figures,
    }
    replace_text(output, json.dumps(report, indent=2) + "\n")
    heading = Heading("Retrieval", report["checkpoint"], report["device"], f"{args.samples} samples a cell")
    retrieval_plots.retrieval(heading, report["rows"], output.with_suffix(".png"))
    print_table(report, output)
    return 0


def print_table(report: dict, output: Path) -> None:
    few = f", too few documents ({report['documents']}) to rely on" if report["documents"] < FEW else ""
    print(f"{report['checkpoint']}: {report['samples']} samples at each of {len(report['depths'])} depths")
    print(f"95 % intervals are over documents{few}\n")
    print(f"{'task':<20}{'context':>8}{'right':>8}  {'95 %':<16}{'chance':>7}{'not planted':>13}{'nats gained':>13}")
    for row in report["summary"]:
        interval = "of one document" if row["interval"] is None else "{:.1%} to {:.1%}".format(*row["interval"])
        print(
            f"{row['task']:<20}{row['context']:>8,}{row['accuracy']:>8.1%}  {interval:<16}{row['chance']:>7.1%}"
            f"{row['accuracy_without']:>13.1%}{row['gain']:>13.2f}"
        )
    print(f"\n{report['seconds']:.0f} s; written to {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
