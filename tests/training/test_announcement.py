"""What a run says at its start and at its end."""

from pathlib import Path

import torch

from lcpt.config import load_config
from lcpt.training.announcement import end_block, start_block

CPU = torch.device("cpu")


def test_the_start_names_run_model_data_and_device():
    config = load_config("gpt2-small-32k", ["run.dir=runs/x", "training.max_steps=2000", "parallel.sequence=2"])
    said = start_block(config, 109_756_524, 0, 1_048_576_000, 8, CPU)
    assert "runs/x: new, to step 2,000, 1,048,576,000 tokens" in said
    assert "109,756,524 parameters, 768 wide; layers: 9 polysketch, 3 softmax" in said
    assert "data/prepared/train, 32,768 tokens of context" in said and "8 ranks, each with " in said
    assert ", 2 to a sequence; bf16, ZeRO stage 1" in said
    assert "runs/x: after step 700, to step 2,000" in start_block(config, 1, 700, 1, 1, CPU)


def test_the_end_names_the_result_and_what_to_do_next():
    said = end_block(Path("runs/x"), {"step": 6, "tokens": 3072, "loss": 6.837, "valid_bits_per_byte": 3.038})
    assert "step 6, 3,072 tokens: loss 6.837, valid 3.038 bits/byte" in said
    assert "lcpt evaluate --checkpoint runs/x --data TEXT" in said
    assert "no loss" in end_block(Path("runs/x"), {"loss": None})
