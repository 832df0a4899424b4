"""tools/generate.py on a model that was never trained: what it prints is noise, but the right noise."""

import shutil

import pytest
import torch

from lcpt.data import Tokenizer

PROMPT = "The old house"


@pytest.fixture
def generate(call_tool, run_folder):
    return lambda *arguments: call_tool("generate", "--checkpoint", run_folder, "--prompt", PROMPT, *arguments)


def test_the_likeliest_continuation(generate, run_folder, model):
    """Token by token on whole sequences, without a cache."""
    code, out, err = generate("--temperature", 0, "--max-tokens", 9)
    tokenizer = Tokenizer(run_folder / "checkpoints/step-00000007/tokenizer.model")
    tokens = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    for _ in range(9):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token == tokenizer.bos_id:
            break
        tokens.append(token)
    assert (code, err) == (0, "") and out == tokenizer.decode(tokens[1:]) + "\n" and out.startswith(PROMPT)


def test_the_same_seed_gives_the_same_text(generate):
    first, again, other = (generate("--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other and first.startswith(PROMPT)


def test_the_newest_whole_step_writes_where_the_newest_is_gone(generate, run_folder):
    expected = generate("--seed", 1)[1]  # both steps hold the same weights
    shutil.rmtree(run_folder / "checkpoints/step-00000007")
    code, out, err = generate("--seed", 1)
    assert (code, out) == (0, expected) and err.count("\n") == 1
    assert err.startswith("warning: ") and err.endswith("taking step-00000003\n")


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--max-tokens", 0], "--max-tokens 0"),
        (["--temperature", -1], "--temperature -1"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(generate, arguments, part):
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and part in err and err.count("\n") == 1
