"""Export a trained model as a folder to use and to pass on: model.safetensors, config.json, tokenizer.model.

The weights are whole and named. Reading them takes neither DeepSpeed nor pickle. --format hf makes a folder that
transformers opens with trust_remote_code=True: its code calls lcpt, its README.md is a model card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcpt.commands.arguments import CHECKPOINT
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.model.huggingface.export import write_hf_export
from lcpt.model.pretrained import write_export
from lcpt.model.weights import DTYPES

EXAMPLE = """examples:
  lcpt export --checkpoint runs/demo --output runs/demo/export
  lcpt export --checkpoint runs/demo --output exports/demo-hf --format hf --license apache-2.0

In Python, lcpt.model.load_pretrained("runs/demo/export") is the model. lcpt evaluate takes the folder as its
--checkpoint, too."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, **CHECKPOINT)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--format", choices=("lcpt", "hf"), default="lcpt", help="whose tools open it (lcpt)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (fp32); bf16 halves the file, and rounds"
    )
    parser.add_argument("--license", metavar="ID", help="for the model card of --format hf, such as apache-2.0")
    args = parser.parse_args()
    if args.format == "hf":
        content = write_hf_export(args.checkpoint, args.output, args.dtype, args.license)["lcpt"]
    else:
        if args.license is not None:
            raise ValueError("--license is for --format hf; the other format has no model card")
        content = write_export(args.checkpoint, args.output, args.dtype)
    print_table(content, Path(args.output))
    return 0


def print_table(content: dict, output: Path) -> None:
    rows = {"parameters": f"{content['parameters']:,}"} if "parameters" in content else {}
    rows |= {
        "trained": f"{content['step']:,} steps, {content['tokens']:,} tokens, {content['context']:,} a sequence",
        "written to": str(output),
    }
    rows |= {f"  {file.name}": f"{file.stat().st_size:,} bytes" for file in sorted(output.iterdir())}
    width = max(21, *(len(name) + 2 for name in rows))
    for name, value in rows.items():
        print(f"{name:<{width}}{value}")


if __name__ == "__main__":
    sys.exit(main())
