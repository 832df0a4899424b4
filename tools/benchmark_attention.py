"""Time and memory of attention alone, method beside method in one run.

A kind of attention is timed as the model runs it: sketch, feature maps, pooling and gate are inside. "squared" is
polysketch's kernel on sketches that are given. Before it is timed, each method is compared with its definition.
Without a GPU it is the time of one thread at work, which the neighbours on a shared machine disturb least."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from lcpt.attention import AttentionConfig
from lcpt.checkpoint.files import replace_text
from lcpt.data.errors import first_line
from lcpt.evaluation.attention_benchmark import DTYPES, MODES, check, measure
from lcpt.evaluation.attention_methods import Layer, baselines, known, methods
from lcpt.evaluation.provenance import header
from lcpt.parallel import groups

EXAMPLE = """example:
  python tools/benchmark_attention.py --methods polysketch,flurka,softmax --contexts 8192,16384 --output attention.json
  python tools/benchmark_attention.py --methods squared,sdpa_cpu --contexts 16384 --device cpu --dtype bf16 \\
      --mode forward_backward --set polysketch.size=32 block_size=256 --output squared.json"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", required=True, metavar="A,B",
                        help=f"{', '.join(known(groups.device()))}; where no baseline is named, all are timed too")
    parser.add_argument("--contexts", required=True, metavar="N,N", help="tokens a sequence")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=groups.device().type)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--mode", default=",".join(MODES), metavar="A,B", help=f"({','.join(MODES)})")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="(1)")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="(4)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed passes of each, in turn (5)")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS",
                        help="after which a method is not repeated at this context, but timed once (60)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="other than the defaults of model.attention: polysketch.size=16 block_size=512")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    try:
        contexts, modes, layer, chosen = read_arguments(args)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        rows = benchmark(contexts, modes, layer, chosen, args.repeats, args.budget)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    replace_text(Path(args.output), json.dumps(header(layer.device) | {"rows": rows}, indent=1) + "\n")
    print_table(rows, args.output)
    return 0


def read_arguments(args: argparse.Namespace) -> tuple[list[int], list[str], Layer, dict]:
    """contexts, modes, layer, methods by name. ValueError in one line."""
    contexts = [int(context) if context.isdecimal() else 0 for context in args.contexts.split(",")]
    if min(contexts) < 1:
        raise ValueError(f"--contexts {args.contexts} is no list of whole numbers ≥ 1; give 8192,16384")
    modes = args.mode.split(",")
    if not set(modes) <= set(MODES):
        raise ValueError(f"--mode {args.mode} is neither {' nor '.join(MODES)}, nor both")
    for name in ("batch", "heads", "head_dim", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be ≥ 1")
    if args.head_dim % 2:
        raise ValueError(f"--head-dim {args.head_dim} must be even, for rotary positions")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; take cpu")
    device = groups.device() if args.device == "cuda" else torch.device("cpu")
    layer = Layer(args.batch, args.heads, args.head_dim, DTYPES[args.dtype], device)
    names = list(dict.fromkeys(args.methods.split(",")))
    if not set(names) & baselines(device).keys():
        names += baselines(device)
    torch.manual_seed(0)
    return contexts, modes, layer, methods(names, read_config(args.set), layer)


def read_config(settings: list[str]) -> AttentionConfig:
    try:
        given = OmegaConf.from_dotlist(settings)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AttentionConfig), given))
    except OmegaConfBaseException as error:
        raise ValueError(f"--set {' '.join(settings)}: {first_line(error)}") from error


def benchmark(contexts, modes, layer, chosen, repeats, budget) -> list[dict]:
    with tqdm(total=len(chosen) * (1 + len(contexts) * len(modes) * (repeats + 1)), unit="pass", disable=None) as bar:
        def progress(name: str) -> None:
            bar.set_description(name)
            bar.update()

        block = max(method.settings.get("block_size", 1) for method in chosen.values())
        for name, method in chosen.items():
            progress(name)
            check(name, method, layer, tokens=3 * block + 17)
        return [row for context in contexts for mode in modes
                for row in measure(chosen, layer, context, mode, repeats, budget, progress)]


def print_table(rows: list[dict], output: str) -> None:
    print(f"{'context':>8} {'mode':18}{'method':14}{'median ms':>11}{'p10':>9}{'p90':>9}{'passes':>8}{'peak MiB':>10}"
          "  times as fast as")
    for row in rows:
        ms = row["milliseconds"]
        others = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in row["speedup"].items())
        print(f"{row['context']:>8} {row['mode']:18}{row['method']:14}{ms['p50']:11.1f}{ms['p10']:9.1f}{ms['p90']:9.1f}"
              f"{row['repeats']:>8}{row['peak_memory_bytes'] / 2**20:10.1f}  {others}")
    print(f"peak: beyond a pass's inputs\nwritten to {output}")


if __name__ == "__main__":
    sys.exit(main())
