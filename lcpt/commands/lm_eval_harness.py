"""Run tasks of lm-evaluation-harness (`pip install lcpt[eval]`) on a checkpoint.

Tasks are the harness's own, whose data it takes from the Hugging Face hub, and those that the YAML files in
--include-path describe, whose data may be files: then nothing needs a network."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from lcpt.commands.arguments import CHECKPOINT, check_output, check_ranges, words
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text

EXAMPLE = """examples:
  lcpt lm-eval --checkpoint runs/mine --tasks wikitext,lambada_openai --output lm_eval.json
  lcpt lm-eval --checkpoint runs/mine --tasks my_task --include-path my_tasks --output lm_eval.json

A text is scored in windows of --context tokens, the last of them filled with context, as evaluate.py does with its last
window full."""


@one_line_errors
def main() -> int:
    args = build_parser().parse_args()
    check(args)
    try:
        report = run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ValueError("lm_eval is not installed; pip install 'lcpt[eval]'") from None
    replace_text(Path(args.output), json.dumps(report, indent=2, default=str) + "\n")
    print_table(report, args.output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, **CHECKPOINT)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="A,B", help="names of tasks, groups or tags")
    parser.add_argument("--include-path", metavar="FOLDER", help="of YAML files that describe tasks")
    parser.add_argument("--context", type=int, metavar="N", help="tokens a window (the context of training)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows at a time (1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and matrices (fp32)")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before a question (the task's number)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N samples of a task alone")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    return parser


def check(args: argparse.Namespace) -> None:
    """Find what is wrong with the arguments before anything is scored. Raises ValueError or OSError."""
    check_ranges(args, {"context": 1, "batch": 1, "fewshot": 0, "limit": 1})
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ValueError(f"--include-path {args.include_path} is no folder; name one that holds the tasks' YAML files")
    check_output(args.output)


def run(args: argparse.Namespace) -> dict:
    """Run the tasks; returns the report."""
    import lm_eval

    from lcpt.evaluation.lm_eval_model import LcptLM

    names = words(args.tasks)
    tasks = find_tasks(names, args.include_path)
    model = LcptLM(args.checkpoint, args.context, args.batch, groups.device(), args.precision)
    began = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model, tasks=names, num_fewshot=args.fewshot, limit=args.limit, log_samples=False, task_manager=tasks
    )
    return {
        "schema_version": 1,
        "checkpoint": str(model.trained.folder),
        "step": model.trained.step,
        "window": model.max_length,
        "last_window": "full",
        "precision": args.precision,
        "limit": args.limit,
        "results": found["results"],
        "task_versions": found["versions"],
        "fewshot": found["n-shot"],
        "samples": found["n-samples"],
        "seconds": time.perf_counter() - began,
        "versions": {"torch": torch.__version__, "lm_eval": lm_eval.__version__},
    }


def find_tasks(names: list[str], folder: str | None):
    """Return the harness's TaskManager that knows the tasks. Raises ValueError naming those that there are not."""
    from lm_eval.tasks import TaskManager

    # Reading the harness's own tasks takes half a minute.
    for with_own in (False, True):
        tasks = TaskManager(include_path=folder, include_defaults=with_own)
        unknown = [name for name in names if name not in tasks.all_tasks]
        if not unknown:
            return tasks
    raise ValueError(
        f"no task, group or tag is called {', '.join(map(repr, unknown))}; `lm_eval ls tasks` names the harness's own, "
        "--include-path gives more"
    )


def print_table(report: dict, output: str) -> None:
    print(f"{'checkpoint':<18}{report['checkpoint']}")
    for task, figures in report["results"].items():
        for name, value in figures.items():
            metric, _, variant = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not variant:
                continue
            error = figures.get(f"{metric}_stderr,{variant}")
            around = f" ± {error:.4f}" if isinstance(error, float) else ""
            print(f"{task:<18}{metric} {value:.4f}{around}")
    print(f"{'written to':<18}{output}")


if __name__ == "__main__":
    sys.exit(main())
