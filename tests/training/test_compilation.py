"""Blocks compile whole, at every ZeRO stage, and compute the same. Backend aot_eager: no compiler is promised here."""

import os
import subprocess
import sys

import pytest
import torch

from lcpt.training.compilation import compile_blocks

SETTINGS = [
    "training.micro_batch=3",
    "training.global_batch_tokens=192",
    "training.max_steps=4",
    "training.precision=bf16",
]


def graphs(config, yaml):
    """-> (graphs, graph breaks) of a run."""
    from torch._dynamo.utils import counters

    from lcpt.training import compilation, job

    compilation.BACKEND = "aot_eager"
    counters.clear()
    assert job.run(config, yaml) == 0
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    "stage, overrides",
    [
        (1, []),
        pytest.param(2, ["model.activation_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param(3, [], marks=pytest.mark.slow),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, list) else str(x),
)
def test_no_graph_breaks_and_equal_losses(train_ranks, run_ranks, tiny_yaml, valid_folder, tmp_path, stage, overrides):
    """With validation, whose last batch is smaller."""
    from lcpt.config import load_config, to_yaml

    # On a CPU packed documents are attended to one by one, outside of the graph.
    fixed = [f"data.valid_path={valid_folder}", "data.mask_documents=false"]
    settings = [*SETTINGS, f"parallel.zero_stage={stage}", *fixed, *overrides]
    eager = train_ranks(1, *settings)
    config = load_config(tiny_yaml, [f"run.dir={tmp_path}/compiled", *settings, "training.compile=true"])
    [(n_graphs, breaks)] = run_ranks(lambda: graphs(config, to_yaml(config)), 1, timeout=120)
    assert n_graphs >= 2 and breaks == 0
    compiled = train_ranks(1, *settings, "training.compile=true", dir=tmp_path / "compiled")  # complete: its rows
    assert [row["loss"] for row in compiled.rows] == pytest.approx([row["loss"] for row in eager.rows], rel=1e-5)
    assert compiled.rows[-1]["valid_loss"] == pytest.approx(eager.rows[-1]["valid_loss"], rel=1e-5)


def test_auto_compiles_on_a_gpu_only():
    class Block(torch.nn.Module):
        def forward(self, x):
            return x

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block()])
    compile_blocks(model, "auto", torch.device("cpu"))
    assert "forward" not in vars(model.blocks[0])
    compile_blocks(model, "true", torch.device("cpu"))
    assert "forward" in vars(model.blocks[0])


TRITON = """
import torch
from torch._dynamo.utils import counters
from lcpt.attention import AttentionConfig
from lcpt.model import GPT, ModelConfig
from lcpt.training import compilation

torch.manual_seed(0)
model = GPT(ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=64, attention=AttentionConfig(block_size=16)))
tokens = torch.randint(64, (1, 40))
losses = []
for setting in ("false", "true"):
    compilation.BACKEND = "aot_eager"
    compilation.compile_blocks(model, setting, torch.device("cpu"))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    losses.append(loss.item())
assert losses[0] == losses[1], losses
assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
"""


def test_a_block_whose_kernels_are_triton_compiles_whole():
    """In Triton's interpreter, which a process chooses when it starts."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
