"""The model in models/books: it opens, it is small, and it scores what its README says."""

import json
import lzma
import re
from pathlib import Path

import pytest

from lcpt.config import load_config
from lcpt.model import load_pretrained

ROOT = Path(__file__).parents[2]
MODEL, VALID = ROOT / "models/books", ROOT / "data/sample/valid.jsonl.xz"


@pytest.fixture(scope="module")
def figure():
    """figure(name) -> the number of that row of the README's tables."""
    card = (MODEL / "README.md").read_text()
    return lambda name: float(
        re.search(rf"^\| {re.escape(name)} \| ([\d.,]*\d)", card, re.MULTILINE)[1].replace(",", "")
    )


@pytest.fixture
def bits_per_byte(call_program, tmp_path):
    def evaluate(data):
        code, _, err = call_program(
            "tools/evaluate.py", "--checkpoint", MODEL, "--data", data, "--output", tmp_path / "evaluation.json"
        )
        assert code == 0, err
        return json.loads((tmp_path / "evaluation.json").read_text())["bits_per_byte"]

    return evaluate


def test_it_is_what_its_readme_and_its_recipe_say(figure):
    saved = json.loads((MODEL / "config.json").read_text())
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8_000_000
    assert [saved[name] for name in ("parameters", "step", "tokens")] == [
        figure(name) for name in ("parameters", "steps", "tokens")
    ]
    trunk, end = (load_config(ROOT / f"configs/recipes/{name}.yaml") for name in ("books", "books-anneal"))
    assert trunk.model == end.model == load_pretrained(MODEL).config
    assert (end.training.max_steps, end.data.context) == (saved["step"], saved["context"])


def test_it_scores_two_pages_of_an_unseen_book(bits_per_byte, tmp_path):
    with lzma.open(VALID, "rt") as file:
        text = json.loads(file.readline())["text"]
    (tmp_path / "pages.txt").write_text(text[20_000:24_000])
    assert bits_per_byte(tmp_path / "pages.txt") == pytest.approx(1.6843, abs=1e-3)


@pytest.mark.slow
def test_it_scores_what_its_readme_says(bits_per_byte, figure):
    assert bits_per_byte(VALID) == pytest.approx(figure("bits a byte of data/sample/valid.jsonl.xz"), abs=1e-3)


def test_it_writes_words(call_program):
    arguments = "--prompt", "The captain came on deck, and", "--max-tokens", 60, "--temperature", 0.7, "--top-p", 0.9
    code, text, _ = call_program("tools/generate.py", "--checkpoint", MODEL, *arguments)
    words = re.findall(r"[a-z]+", text.lower())
    assert code == 0 and len(words) >= 30 and len(set(words)) >= 15
