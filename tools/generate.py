"""Continue a text with a trained model.

The prompt may be as long as memory allows; in layers of linear cost a token takes the same time at any position."""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from lcpt.checkpoint import CheckpointError
from lcpt.model.generation import generate
from lcpt.model.pretrained import open_pretrained
from lcpt.parallel import groups

EXAMPLE = """example:
  python tools/generate.py --checkpoint runs/demo --prompt "It was a dark night" --max-tokens 100"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|STEP|EXPORT",
        help="a run folder, one of its steps, or what export.py wrote",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="(200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (0.8)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (0)")
    args = parser.parse_args()
    try:
        if args.max_tokens < 1 or args.temperature < 0:
            raise ValueError(f"--max-tokens {args.max_tokens} must be ≥ 1, and --temperature {args.temperature} ≥ 0")
        trained = open_pretrained(args.checkpoint)
        tokenizer = trained.open_tokenizer()
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = groups.device()
    prompt = torch.tensor([tokenizer.bos_id, *tokenizer.encode(args.prompt)], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    tokens = generate(trained.model.to(device), prompt, args.temperature, generator)
    text = list(itertools.takewhile(lambda token: token != tokenizer.bos_id, itertools.islice(tokens, args.max_tokens)))
    print(args.prompt + tokenizer.decode([*prompt[1:].tolist(), *text])[len(args.prompt) :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
