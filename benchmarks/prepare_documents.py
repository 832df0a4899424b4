"""Prepare the data of benchmarks/documents.py: books, and short documents cut from articles, with one tokenizer.

Articles are records whose lines are paragraphs or headings "= … =", as in WikiText. A short document is whole
paragraphs of one section, with the headings before them: it ends with its section, or where its paragraphs have 400
characters. Short documents stand in the order of a hash of their names, so that neighbours come from different
articles. Every fifth article is held out. Held-out books are scored on their first 60,000 characters."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from lcpt.data import DataError, find_sources, prepare, read_documents

ENOUGH = 400  # characters of paragraphs in a short document
HELD_OUT = 5  # every fifth article
SCORED = 60_000  # characters of a held-out book
EXAMPLE = """example:
  python benchmarks/prepare_documents.py --articles wikitext-2.jsonl --books data/sample/train.jsonl.xz \\
      --valid-books data/sample/valid.jsonl.xz --output data/prepared/documents"""
Documents = list[tuple[str, str]]  # (id, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--articles", nargs="+", required=True, metavar="FILE|DIR", help="to cut")
    parser.add_argument("--books", nargs="+", required=True, metavar="FILE|DIR", help="to train on")
    parser.add_argument("--valid-books", nargs="+", required=True, metavar="FILE|DIR", help="held out")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="pieces of the tokenizer (4096)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new one")
    args = parser.parse_args()
    output = Path(args.output)
    try:
        output.mkdir(parents=True)
        articles = read(args.articles)
        parts = {
            "books-train": read(args.books),
            "books-valid": [(name, text[:SCORED]) for name, text in read(args.valid_books)],
            "articles-train": cut_all([x for n, x in enumerate(articles, 1) if n % HELD_OUT]),
            "articles-valid": cut_all(articles[HELD_OUT - 1 :: HELD_OUT]),
        }
        for name, documents in parts.items():
            write(output / f"{name}.jsonl", documents)
        trained_on = [output / "books-train.jsonl", output / "articles-train.jsonl"]
        prepare(trained_on, output / "both", vocab_size=args.vocab_size)
        for name in parts:
            done = prepare([output / f"{name}.jsonl"], output / name, tokenizer=output / "both/tokenizer.model")
            manifest = done["manifest"]
            print(f"{name:16}{manifest['documents']:8,} documents {manifest['tokens']:12,} tokens")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read(inputs: list[str]) -> Documents:
    return [document for source in find_sources(inputs).sources for document in read_documents(source)]


def write(path: Path, documents: Documents) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents))


def cut_all(articles: Documents) -> Documents:
    """Cut articles, name their parts ARTICLE#NUMBER, and order the parts by a hash of that name."""
    parts = [(f"{name}#{n}", part) for name, text in articles for n, part in enumerate(cut(text))]
    return sorted(parts, key=lambda part: hashlib.sha256(part[0].encode()).digest())


def cut(text: str) -> Iterator[str]:
    """Cut an article into short documents: together all of its lines that are not blank, in order."""
    lines: list[str] = []
    characters = 0  # of the paragraphs among them
    for line in filter(None, map(str.strip, text.split("\n"))):
        heading = line.startswith("= ") and line.endswith(" =")
        if characters >= ENOUGH or (heading and characters):
            yield "\n".join(lines)
            lines, characters = [], 0
        lines.append(line)
        characters += 0 if heading else len(line)
    if lines:
        yield "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
