"""Count the steps that gated DeltaNet needs to learn to recall: an outside reference beside benchmarks/recall.py.

Gated DeltaNet (arXiv 2412.06464) is flash-linear-attention's own PyTorch code, in lcpt's model: the same projections,
key shift and LayerNorms, no positions, then its L2 norms, its two gates, and an RMSNorm of the output times SiLU. Needs
`pip install --no-deps flash-linear-attention fla-core einops`. Rows are those of recall.py, with the variant
gated_deltanet."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcpt.attention import ATTENTION
from lcpt.attention.base import Attention, Projected
from lcpt.config import ConfigError, load_config
from lcpt.data import DataError
from lcpt.evaluation.result_rows import append_row, has_row, read_rows
from lcpt.evaluation.variants import read_variants
from lcpt.parallel.sequence import SequenceSlice
from lcpt.training.learn_recall import learn
from lcpt.utils.provenance import report_header

CONFIGS = Path(__file__).parents[1] / "configs/compare"
VARIANT, CHUNK = "gated_deltanet", 32
EXAMPLE = """example:
  python benchmarks/gated_deltanet.py --tasks mqar_4_32 --output benchmarks/results/recall-cpu.jsonl"""


class GatedDeltaNet(Attention):
    """S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / √d."""

    keep_plain = True

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.beta, self.decay = (nn.Linear(d_model, n_heads) for _ in range(2))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        dt = torch.empty(n_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        nn.init.zeros_(self.decay.weight)
        self.decay.bias.data = dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
        self.output_gate = nn.Linear(d_model, d_model, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

        x = p.x
        assert x is not None and p.q_plain is not None and p.k_plain is not None
        q, k = (F.normalize(y, dim=-1) for y in (p.q_plain, p.k_plain))
        g = -self.A_log.exp() * F.softplus(self.decay(x))
        o, _ = naive_chunk_gated_delta_rule(q, k, F.silu(p.v), g, self.beta(x).sigmoid(), chunk_size=CHUNK)
        return self.norm(o) * F.silu(self.output_gate(x)).unflatten(-1, (self.n_heads, -1)), None

    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        raise NotImplementedError("Gated DeltaNet is measured on one rank")

    def attend_flops(self, context: int) -> tuple[float, float]:
        """Products of a chunk's tokens with each other, and with a state of D × D; backward makes each twice."""
        forward = 2.0 * self.n_heads * self.head_dim * (4 * CHUNK + 3 * self.head_dim)
        return forward, 2 * forward

    def state_bytes(self, context: int) -> int:
        return 4 * self.n_heads * self.head_dim**2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["mqar_4_32", "mqar_16_128"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="rows are added to it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ATTENTION[VARIANT] = GatedDeltaNet
    try:
        for task, changes in read_variants(CONFIGS / "tasks.txt", args.tasks).items():
            for seed in args.seeds:
                key = {"task": task, "variant": VARIANT, "seed": seed}
                if has_row(read_rows(Path(args.output)), **key):
                    continue
                changed = [*changes, f"model.attention.kind={VARIANT}"]
                found = learn(load_config(CONFIGS / "recall.yaml", [*changed, f"run.seed={seed}"]))
                append_row(Path(args.output), report_header(torch.device("cpu")) | key | {"changes": changed} | found)
                print(f"{task}, seed {seed}: {found['steps_to_90']} steps, best {found['best_accuracy']:.1%}")
    except (ConfigError, DataError, ImportError, OSError) as error:
        remedy = "; --help says what to install" if isinstance(error, ImportError) else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
