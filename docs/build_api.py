"""Build API pages from docstrings with pdoc, into build/api/: `make docs`. A warning is an error."""

from __future__ import annotations

import importlib
import sys
import typing
import warnings
from pathlib import Path

import pdoc

import lcpt

ROOT = Path(__file__).parents[1]
PUBLIC = (  # pages; a package's page has what its __all__ hands on
    "lcpt.config",
    "lcpt.model",
    "lcpt.model.pretrained",
    "lcpt.model.generation",
    "lcpt.model.cost",
    "lcpt.attention",
    "lcpt.attention.base",
    "lcpt.data",
    "lcpt.checkpoint",
    "lcpt.evaluation.text",
    "lcpt.evaluation.perplexity",
    "lcpt.evaluation.windows",
    "lcpt.evaluation.context_gain",
    "lcpt.evaluation.recall",
    "lcpt.evaluation.comparison",
    "lcpt.evaluation.intervals",
    "lcpt_kernels",
)
# Functions with the name of their module, which would get a page of its own.
NOT_PAGES = ("!lcpt.data.prepare", "!lcpt.data.verify", "!lcpt_kernels.gated_activation")


def build(output: Path) -> list[str]:
    """Write the pages into a folder -> what pdoc warns of."""
    pdoc.render.configure(docformat="markdown", footer_text=f"lcpt {lcpt.__version__}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        _resolve_named_tuples()
        pdoc.pdoc(*PUBLIC, *NOT_PAGES, output_directory=output)
    return [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]


def _resolve_named_tuples() -> None:
    """Give types to the annotations of NamedTuples' constructors, which are text without a module to look it up in."""
    for name in PUBLIC:
        for found in vars(importlib.import_module(name)).values():
            if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
                found.__new__.__annotations__ = typing.get_type_hints(found)


def main() -> int:
    output = ROOT / "build/api"
    said = build(output)
    for line in said:
        print(f"error: {line}", file=sys.stderr)
    print(f"written to {output.relative_to(ROOT)}/index.html")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
