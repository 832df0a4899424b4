"""Run `lcpt COMMAND …`: find the command's module, and hand the other arguments on."""

from __future__ import annotations

import importlib
import sys

from lcpt import __version__

COMMANDS = {  # name -> (module, what it does)
    "train": ("train", "pretrain a model, or go on with a run"),
    "configs": ("configs", "list the configs that --config takes by name"),
    "prepare": ("prepare", "turn text into a folder of token shards"),
    "verify": ("verify", "find and name damage to such a folder"),
    "evaluate": ("evaluate", "measure perplexity, context gain and recall of a checkpoint"),
    "retrieval": ("retrieval", "find again what was planted in held-out documents"),
    "lm-eval": ("lm_eval_harness", "run tasks of lm-evaluation-harness (pip install 'lcpt[eval]')"),
    "generate": ("generate", "continue a text"),
    "export": ("export", "write a checkpoint as a model to pass on"),
    "import": ("import_model", "make an export of a GPT-2, Llama or Qwen3 that transformers saved"),
    "average": ("average", "average the weights of checkpoints"),
    "compare": ("compare", "put runs side by side"),
    "plan": ("plan", "plan a run on paper: memory, communication, time a step"),
    "benchmark attention": ("benchmark_attention", "time attention alone"),
    "benchmark training": ("benchmark_training", "time training steps"),
    "report features": ("feature_report", "what features of attention cost and lose"),
    "report kernels": ("kernel_report", "what compilers make of the kernels"),
    "demo": ("demo", "train, evaluate and draw a small model, in a checkout"),
}
USAGE = "usage: lcpt COMMAND …   (lcpt COMMAND --help tells more)"


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"lcpt {__version__}")
        return 0
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if name is None:
        print(f"error: there is no command {words[0]!r}; {hint(words[0])}", file=sys.stderr)
        return 2
    sys.argv = [f"lcpt {name}", *words[len(name.split()) :]]  # argparse shows the first as the program
    return importlib.import_module(f"lcpt.commands.{COMMANDS[name][0]}").main()


def hint(word: str) -> str:
    """Say which command may have been meant."""
    several = [name for name in COMMANDS if name.startswith(f"{word} ")]
    return f"there are {' and '.join(several)}" if several else "`lcpt` lists them"


def help_text() -> str:
    rows = "\n".join(f"  {name:<21}{what}" for name, (_, what) in COMMANDS.items())
    return f"{USAGE}\n\n{rows}\n\n  --version            print the version"


if __name__ == "__main__":
    sys.exit(main())
