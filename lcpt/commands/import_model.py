"""Import a model of GPT-2's, Llama's or Qwen3's architecture, as transformers saves it, as an lcpt export.

Every lcpt command takes the export as its --checkpoint. The folder must hold config.json, safetensors and
tokenizer.json; neither transformers nor a network is needed. What config.json says is carried over or refused by name.
A model that lcpt exported for transformers is read back bit for bit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.model.huggingface.import_folder import Imported, import_folder

EXAMPLE = """example:
  lcpt import --from Qwen3-0.6B --output exports/qwen3
  lcpt generate --checkpoint exports/qwen3 --prompt "It was a dark night"

Models are fetched with `huggingface-cli download` or `git lfs`; lcpt reads what is there."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", required=True, dest="source", metavar="FOLDER", help="as transformers saves a model")
    parser.add_argument("--output", required=True, metavar="EXPORT", help="a new folder")
    args = parser.parse_args()
    print_table(import_folder(args.source, args.output), Path(args.output))
    return 0


def print_table(imported: Imported, output: Path) -> None:
    trained, tokenizer = imported.trained, imported.tokenizer
    model = trained.model
    widened = f" (widened from {', '.join(imported.widened)})" if imported.widened else ""
    rows = {
        "architecture": imported.model_type,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, fp32{widened}",
        "context": f"{trained.context:,} tokens",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens, {model.config.vocab_size:,} embeddings",
        "between documents": f"{tokenizer.bos} (token {tokenizer.bos_id})",
        "written to": str(output),
    }
    rows |= {f"  {file.name}": f"{file.stat().st_size:,} bytes" for file in sorted(output.iterdir())}
    for name, value in rows.items():
        print(f"{name:<21}{value}")


if __name__ == "__main__":
    sys.exit(main())
