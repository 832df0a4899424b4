"""Export a trained model as a folder to use and to pass on: model.safetensors, config.json, tokenizer.model.

The weights are whole, named and fp32. Reading them takes neither DeepSpeed nor pickle."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.model.pretrained import write_export

EXAMPLE = """example:
  lcpt export --checkpoint runs/demo --output runs/demo/export

In Python, lcpt.model.load_pretrained("runs/demo/export") is the model. lcpt evaluate takes the folder as its
--checkpoint, too."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN|STEP", help="a run folder, or one of its steps")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args()
    content = write_export(args.checkpoint, args.output)
    print_table(content, Path(args.output))
    return 0


def print_table(content: dict, output: Path) -> None:
    rows = {
        "parameters": f"{content['parameters']:,}",
        "trained": f"{content['step']:,} steps, {content['tokens']:,} tokens, {content['context']:,} a sequence",
        "written to": str(output),
    }
    rows |= {f"  {file.name}": f"{file.stat().st_size:,} bytes" for file in sorted(output.iterdir())}
    for name, value in rows.items():
        print(f"{name:<21}{value}")


if __name__ == "__main__":
    sys.exit(main())
