"""Continue a text with a trained model, and write it as it is made.

The prompt may be as long as memory allows; in layers of linear cost a token takes the same time at any position."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterable
from typing import cast

import torch

from lcpt.commands.arguments import CHECKPOINT
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.data import StreamedText
from lcpt.model import generation
from lcpt.model.generation import Sampling, generate
from lcpt.model.pretrained import open_pretrained
from lcpt.parallel import groups

EXAMPLE = """examples:
  lcpt generate --checkpoint runs/demo --prompt "It was a dark night" --max-tokens 100
  head -n 200 book.txt | lcpt generate --checkpoint runs/demo --prompt-file - --samples 4 --top-p 0.95

A sample ends with --max-tokens, where the model ends the document, or before a --stop. How fast it was is on stderr."""

LIMITS = {  # what an argument must be, and whether it is
    "max_tokens": ("≥ 1", lambda x: x >= 1),
    "samples": ("in 1 … 1024", lambda x: 1 <= x <= 1024),
    "seed": ("in 0 … 2^63 - 1", lambda x: 0 <= x < 2**63),
    **generation.LIMITS,
}


@one_line_errors
def main() -> int:
    args = build_parser().parse_args()
    check(args)
    prompt = read_prompt(args)
    trained = open_pretrained(args.checkpoint)
    tokenizer = trained.open_tokenizer()
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    check_length(len(tokens), args.max_tokens, trained.model.config.max_positions)
    device = groups.device()
    drawn = generate(
        trained.model.to(device),
        torch.tensor([tokens], device=device),
        Sampling(args.temperature, args.top_k, args.top_p),
        [torch.Generator(device).manual_seed(seed) for seed in seeds_of(args)],
    )
    rows = (row.tolist() for _, row in zip(range(args.max_tokens), drawn, strict=False))
    texts = [StreamedText(tokenizer, tokens[1:], args.stop) for _ in range(args.samples)]
    titles = [f"--- sample {n} of {args.samples}, seed {s} ---\n" for n, s in enumerate(seeds_of(args), start=1)]
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8")  # not that of the locale
    print(prompt, end="\n" if args.samples > 1 else "", flush=True)
    speed = write(rows, texts, titles if args.samples > 1 else [""], tokenizer.bos_id)
    print(f"note: {speed}", file=sys.stderr)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, **CHECKPOINT)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--prompt-file", metavar="FILE", help="UTF-8, to its last byte; - is standard input")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="(200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token each time (0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens alone (all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the fewest tokens that have the probability P (1)"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations, made side by side (1)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; may be given several times"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed gives the same text; sample i + 1 is that of seed N + i; CPUs use its low 32 bits (0)",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError naming the first argument that is out of its range."""
    for name, (allowed, holds) in LIMITS.items():
        if (value := getattr(args, name)) is not None and not holds(value):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {allowed}")
    for stop in args.stop:
        if not decode_utf8(os.fsencode(stop), "--stop"):
            raise ValueError("--stop is empty; it must be a text of one character or more")


def check_length(prompt: int, max_tokens: int, max_positions: int | None) -> None:
    """Raise ValueError where the model has learned positions, and too few."""
    if max_positions is not None and prompt + max_tokens - 1 > max_positions:  # nothing reads the last token
        raise ValueError(
            f"the prompt is {prompt} tokens, and --max-tokens {max_tokens}; this model's learned positions serve "
            f"{max_positions} in all"
        )


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt. Raises ValueError where it cannot be read or is not UTF-8."""
    if args.prompt is not None:
        return decode_utf8(os.fsencode(args.prompt), "--prompt")
    where = "standard input" if args.prompt_file == "-" else args.prompt_file
    try:
        with open(0 if args.prompt_file == "-" else args.prompt_file, "rb", closefd=args.prompt_file != "-") as file:
            return decode_utf8(file.read(), where)
    except OSError as error:
        raise ValueError(f"--prompt-file: {where} cannot be read: {error.strerror}") from None


def decode_utf8(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"{where}: byte {error.start} (0x{byte:02x}) is not UTF-8; convert the text to UTF-8"
        ) from None


def seeds_of(args: argparse.Namespace) -> list[int]:
    """Return the seed of each sample, by which it can be made again alone."""
    return [(args.seed + number) % 2**63 for number in range(args.samples)]


def write(rows: Iterable[list[int]], texts: list[StreamedText], titles: list[str], bos_id: int) -> str:
    """Write what `rows`, a token of each text at a time, add to the texts; return how fast they came.

    Texts are written one after another, the first that has not ended while it is made, each below its title.
    """
    began = first = time.perf_counter()
    waiting, running, place, n_rows, n_tokens = list(titles), set(range(len(texts))), 0, 0, 0
    for n_rows, row in enumerate(rows, start=1):
        first = time.perf_counter() if n_rows == 1 else first
        n_tokens += len(running)
        for number in sorted(running):
            if row[number] != bos_id:
                waiting[number] += texts[number].add(row[number])
            if row[number] == bos_id or texts[number].ended:
                waiting[number] += texts[number].finish()
                running.remove(number)
        place = show(waiting, running, place)
        if not running:
            break
    for number in running:
        waiting[number] += texts[number].finish()
    show(waiting, set(), place)
    later, seconds = n_tokens - len(texts), time.perf_counter() - first
    rate = f", then {later / seconds:.1f} tokens/s" if n_rows > 1 else ""
    return f"{n_tokens} tokens; the first after {first - began:.2f} s{rate}"


def show(waiting: list[str], running: set[int], place: int) -> int:
    """Write what waits of the text at `place`, and of those after it once it has ended; return the new place."""
    while place < len(waiting):
        print(waiting[place], end="", flush=True)
        waiting[place] = ""
        if place in running:
            break
        print(flush=True)
        place += 1
    return place


if __name__ == "__main__":
    sys.exit(main())
