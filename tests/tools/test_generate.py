"""tools/generate.py on a model that was never trained: what it prints is noise, but the right noise."""

import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcpt.data import Tokenizer
from lcpt.model import GPT, ModelConfig
from lcpt.model.generation import Sampling
from lcpt.model.generation import generate as continuation
from lcpt.model.pretrained import Pretrained, write_pretrained

ROOT = Path(__file__).parents[2]
PROMPT = "The old house"


@pytest.fixture
def generate(call_tool, run_folder):
    def call(*arguments, prompt=("--prompt", PROMPT)):
        return call_tool("generate", "--checkpoint", run_folder, *prompt, *arguments)

    return call


@pytest.fixture
def tokenizer(run_folder):
    return Tokenizer(run_folder / "checkpoints/step-00000007/tokenizer.model")


def greedy(model, tokenizer, prompt, count):
    """Token by token on whole sequences, without a cache."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(count):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token == tokenizer.bos_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])


def test_the_likeliest_continuation(generate, model, tokenizer):
    code, out, err = generate("--temperature", 0, "--max-tokens", 9)
    assert code == 0 and out == greedy(model, tokenizer, PROMPT, 9) + "\n" and out.startswith(PROMPT)
    assert err.startswith("note: 9 tokens; the first after ") and err.endswith(" tokens/s\n") and err.count("\n") == 1


def test_a_text_ends_with_its_document(generate, model, tokenizer):
    """One token in 330 is the BOS. Of two samples the other goes on."""
    alone = [generate("--seed", seed, "--max-tokens", 4000) for seed in (0, 1)]
    tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PROMPT)]])
    drawn = map(int, continuation(model, tokens, Sampling(0.8), [torch.Generator().manual_seed(0)]))
    new = list(itertools.takewhile(lambda token: token != tokenizer.bos_id, drawn))
    assert alone[0][1] == tokenizer.decode([*tokens[0].tolist(), *new]) + "\n"
    assert alone[0][2].startswith(f"note: {len(new) + 1} tokens; ")
    both = generate("--seed", 0, "--samples", 2, "--max-tokens", 4000)[1]
    assert all(out.removeprefix(PROMPT) in both for _, out, _ in alone)


def test_the_same_seed_gives_the_same_text(generate):
    first, again, other = (generate("--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other and first.startswith(PROMPT)


def test_samples_are_those_of_the_seeds_that_follow(generate):
    options = "--max-tokens", 12, "--top-k", 40, "--top-p", 0.9
    code, out, _ = generate("--seed", 5, "--samples", 3, *options)
    alone = [generate("--seed", seed, *options)[1].removeprefix(PROMPT) for seed in (5, 6, 7)]
    titles = [f"--- sample {n} of 3, seed {n + 4} ---\n" for n in (1, 2, 3)]
    assert code == 0 and out == PROMPT + "\n" + "".join(a + b for a, b in zip(titles, alone, strict=True))
    assert len(set(alone)) == 3


def test_top_k_1_is_the_likeliest(generate):
    assert generate("--top-k", 1)[1] == generate("--temperature", 0)[1] == generate("--top-p", 1e-9)[1]


def test_it_stops_before_a_text(generate):
    whole = generate("--seed", 1, "--max-tokens", 40)[1]
    stop = whole[len(PROMPT) + 8 : len(PROMPT) + 11]
    code, out, _ = generate("--seed", 1, "--max-tokens", 40, "--stop", "never", "--stop", stop)
    assert code == 0 and out == PROMPT + whole[len(PROMPT) :].split(stop)[0] + "\n"


def test_the_newest_whole_step_writes_where_the_newest_is_gone(generate, run_folder):
    expected = generate("--seed", 1)[1]  # both steps hold the same weights
    shutil.rmtree(run_folder / "checkpoints/step-00000007")
    code, out, err = generate("--seed", 1)
    warning, note = err.splitlines()
    assert (code, out) == (0, expected) and note.startswith("note: ")
    assert warning.startswith("warning: ") and warning.endswith("taking step-00000003")


@pytest.fixture
def feed(tmp_path):
    """feed(content) makes the bytes this process's standard input, until the test ends."""
    before = os.dup(0)

    def give(content):
        (tmp_path / "input").write_bytes(content)
        with open(tmp_path / "input", "rb") as file:
            os.dup2(file.fileno(), 0)

    yield give
    os.dup2(before, 0)
    os.close(before)


@pytest.mark.parametrize(
    "prompt", ["", "naïve 鮭🐟\r\n a\n", "The old house " * 60], ids=["empty", "characters", "long"]
)
def test_a_prompt_comes_from_an_argument_a_file_or_standard_input(generate, feed, tmp_path, model, tokenizer, prompt):
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    feed(prompt.encode())
    options = "--temperature", 0, "--max-tokens", 5
    expected = greedy(model, tokenizer, prompt, 5) + "\n"
    for source in (("--prompt", prompt), ("--prompt-file", tmp_path / "prompt.txt"), ("--prompt-file", "-")):
        assert generate(*options, prompt=source)[:2] == (0, expected)


def test_bad_utf8_is_named_by_its_place(generate, feed, tmp_path):
    content = "é".encode() + b"caf\xe9 au lait"
    (tmp_path / "prompt.txt").write_bytes(content)
    feed(content)
    argument = os.fsdecode(content)
    for where, prompt, options in (
        ("--prompt", ("--prompt", argument), ()),
        (tmp_path / "prompt.txt", ("--prompt-file", tmp_path / "prompt.txt"), ()),
        ("standard input", ("--prompt-file", "-"), ()),
        ("--stop", ("--prompt", "a"), ("--stop", argument)),
    ):
        said = f"error: {where}: byte 5 (0xe9) is not UTF-8; convert the text to UTF-8\n"
        assert generate(*options, prompt=prompt) == (2, "", said)


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--max-tokens", 0], "--max-tokens 0 must be ≥ 1"),
        (["--temperature", -1], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan must be ≥ 0 and finite"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--top-k", 0], "--top-k 0 must be ≥ 1"),
        (["--top-p", 0], "--top-p 0.0 must be > 0 and ≤ 1"),
        (["--top-p", 1.5], "--top-p 1.5"),
        (["--top-p", "nan"], "--top-p nan"),
        (["--samples", 0], "--samples 0 must be in 1 … 1024"),
        (["--samples", 10**30], "--samples"),
        (["--seed", -1], "--seed -1 must be in 0 … 2^63 - 1"),
        (["--seed", 2**63], "--seed 9223372036854775808"),
        (["--seed", 10**30], "--seed"),
        (["--stop", ""], "--stop is empty"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(generate, arguments, part):
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and part in err and err.count("\n") == 1


@pytest.mark.parametrize("file, reason", [("nowhere.txt", "No such file"), (".", "Is a directory")])
def test_a_prompt_file_that_cannot_be_read(generate, file, reason):
    code, out, err = generate(prompt=("--prompt-file", file))
    assert (code, out) == (2, "") and err.startswith(f"error: --prompt-file: {file} cannot be read: {reason}")


@pytest.mark.parametrize("prompt", [(), ("--prompt", "a", "--prompt-file", "b")], ids=["none", "two"])
def test_there_is_one_prompt(generate, prompt, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate(prompt=prompt)
    assert "--prompt" in capsys.readouterr().err


def test_learned_positions_end(call_tool, tokenizer, tmp_path):
    """Nothing reads the last token: four of the prompt and five new ones are eight positions."""
    learned = GPT(ModelConfig(n_layers=1, d_model=8, n_heads=1, vocab_size=330, positions="learned", max_positions=8))
    trained = Pretrained(folder=tmp_path, model=learned, tokenizer=tokenizer.path, context=8, step=1, tokens=8)
    write_pretrained(trained, tmp_path / "export")
    prompt = tokenizer.decode(tokenizer.encode("The old house walked")[:3])
    common = "generate", "--checkpoint", tmp_path / "export", "--prompt", prompt, "--max-tokens"
    assert call_tool(*common, 5)[0] == 0
    code, out, err = call_tool(*common, 6)
    assert (code, out) == (2, "") and "the prompt is 4 tokens, and --max-tokens 6; " in err and " 8 in all\n" in err


def test_an_interrupted_text_ends_in_one_line(generate, monkeypatch):
    monkeypatch.setattr(GPT, "decode", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = generate()
    assert code == 130 and out.startswith(PROMPT) and err == "error: interrupted\n"


def test_the_largest_seed_has_samples(generate):
    code, out, _ = generate("--seed", 2**63 - 1, "--samples", 2, "--max-tokens", 2)
    assert code == 0 and "sample 1 of 2, seed 9223372036854775807 -" in out and "sample 2 of 2, seed 0 -" in out


def test_text_is_on_the_screen_before_the_next_token_is_made(generate, model, tokenizer, monkeypatch):
    flushed, seen, decode = [], [], GPT.decode

    class Screen(io.StringIO):
        def reconfigure(self, encoding):
            assert encoding == "utf-8"

        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr(GPT, "decode", lambda *arguments: seen.append(flushed[-1]) or decode(*arguments))
    monkeypatch.setattr(sys, "stdout", Screen())
    assert generate("--temperature", 0, "--max-tokens", 9)[0] == 0 and len(seen) == 8
    for n, text in enumerate(seen, start=1):
        whole = greedy(model, tokenizer, PROMPT, n)
        assert whole.startswith(text) and len(whole) - len(text) <= 3  # bytes that may become a character


def test_the_reader_may_leave(run_folder):
    """Of a text without end."""
    command = [sys.executable, ROOT / "tools/generate.py", "--checkpoint", run_folder, "--prompt", PROMPT]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        [*command, "--temperature", "0", "--max-tokens", str(10**30)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    ) as process:
        assert process.stdout.read(len(PROMPT) + 20).startswith(PROMPT.encode())
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
