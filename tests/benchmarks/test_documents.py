"""benchmarks/prepare_documents.py and benchmarks/documents.py: what is cut, what differs between runs, the table."""

import importlib
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from lcpt.config import load_config
from lcpt.data import open_text
from lcpt.data.documents import documents
from lcpt.data.manifest import fingerprint_of, load_manifest
from lcpt.data.tokenizer import Tokenizer

WORDS = "the a small old river house walked saw under and quickly never green bird sang to of in 12 345".split()


def paragraph(draw, words):
    return " " + " ".join(draw.choices(WORDS, k=words)) + " . "


def article(draw, number):
    """Sections of a heading and paragraphs, short and long; the first has a heading below its heading."""
    lines = [f" = Article {number} = ", " ", paragraph(draw, 30), paragraph(draw, 200), " "]
    for section in range(3):
        lines += [f" = = Part {section} = = ", f" = = = Below {section} = = = ", " "]
        lines += [paragraph(draw, draw.randint(5, 60)) for _ in range(4)]
    return "\n".join(lines)


def write(path, texts):
    path.write_text(
        "".join(json.dumps({"id": f"{path.stem}-{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    )
    return path


@pytest.fixture
def prepared(call_program, tmp_path):
    draw = random.Random(0)
    articles = write(tmp_path / "wiki.jsonl", [article(draw, n) for n in range(10)])
    books = write(tmp_path / "book.jsonl", [paragraph(draw, 3000)])
    held_out = write(tmp_path / "held-out.jsonl", ["".join(paragraph(draw, 20) for _ in range(700))])
    arguments = ["--articles", articles, "--books", books, "--valid-books", held_out, "--vocab-size", 330]
    code, said, errors = call_program("benchmarks/prepare_documents.py", *arguments, "--output", tmp_path / "data")
    assert code == 0, errors
    assert "articles-valid" in said
    return tmp_path / "data"


def texts_of(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    return [(name, tokenizer.decode(tokens[1:].tolist())) for name, tokens, _ in documents(folder, tokenizer)]


def test_articles_are_cut_at_headings_and_long_paragraphs_and_every_fifth_is_held_out(prepared):
    train, valid = (texts_of(prepared / f"articles-{part}") for part in ("train", "valid"))
    of = [{name.partition("#")[0] for name, _ in part} for part in (train, valid)]
    assert of[1] == {"wiki-4", "wiki-9"} and of[0] == {f"wiki-{n}" for n in range(10)} - of[1]
    source = [json.loads(line) for line in (prepared.parent / "wiki.jsonl").read_text().splitlines()]
    for record in source:
        parts = {
            int(name.partition("#")[2]): text for name, text in train + valid if name.startswith(record["id"] + "#")
        }
        lines = [line for n in sorted(parts) for line in parts[n].split("\n")]
        assert lines == [line.strip() for line in record["text"].split("\n") if line.strip()]
        for text in parts.values():
            *before, last = text.split("\n")
            kinds = [line.startswith("= ") for line in (*before, last)]
            assert kinds == sorted(kinds, reverse=True)  # no heading behind a paragraph
            assert sum(len(line) for line in before if not line.startswith("= ")) < 400 and not last.startswith("= ")
    neighbours = [name.partition("#")[0] for name, _ in train]
    assert sum(a == b for a, b in zip(neighbours, neighbours[1:], strict=False)) < len(train) / 3


def test_held_out_books_are_cut_and_all_parts_have_one_tokenizer(prepared):
    ((_, book),) = texts_of(prepared / "books-valid")
    assert len(book) == 60_000
    hashes = {json.loads(path.read_text())["tokenizer_sha256"] for path in prepared.glob("*/manifest.json")}
    assert len(hashes) == 1


@pytest.fixture
def tiny(prepared, tiny_yaml):
    sources = "[{path: elsewhere/books-train, weight: 0.5}, {path: elsewhere/articles-train, weight: 0.5}]"
    path = prepared.parent / "tiny.yaml"
    text = tiny_yaml.read_text()
    text = text[text.index("model:") :].replace("max_steps: 6", "max_steps: 3").replace("tokens: 256", "tokens: 1024")
    path.write_text(f"run: {{dir: unused}}\ndata: {{sources: {sources}, context: 128}}\n" + text)
    return path


@pytest.fixture
def forked_programs(monkeypatch, run_ranks, call_program):
    """Programs run in forks of this process, which has imported DeepSpeed, and not in processes of their own."""
    for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard"):
        importlib.import_module(module)

    def run(command, check):
        _, program, *arguments = command
        ((code, _, errors),) = run_ranks(lambda: call_program(program, *arguments), 1)
        assert code == 0, errors
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr("lcpt.evaluation.quality_runs.subprocess", SimpleNamespace(run=run))


def test_runs_see_the_same_tokens_and_a_row_is_not_made_again(forked_programs, call_program, prepared, tiny):
    output = prepared.parent / "rows.jsonl"
    arguments = ["--config", tiny, "--variants", "softmax", "--seeds", 3, "--data", prepared]
    arguments += ["--runs", prepared.parent / "runs", "--output", output]
    code, said, errors = call_program("benchmarks/documents.py", *arguments)
    assert code == 0, errors
    masked, unmasked = rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["mask_documents"] for row in rows] == [True, False] and masked["seed"] == unmasked["seed"] == 3
    assert masked["articles"]["loss"] != unmasked["articles"]["loss"]
    assert [row["id"] for row in masked["articles"]["documents"]] and masked["command"][0] == "documents.py"
    assert {row["id"] for row in masked["articles"]["documents"]} == {"wiki-4", "wiki-9"}
    assert sum(row["tokens"] for row in masked["articles"]["documents"]) == masked["articles"]["tokens_scored"]
    configs = [load_config(tiny, row["changes"]) for row in rows]
    assert [config.data.mask_documents for config in configs] == [True, False]
    samples = [[open_text(config.data).sample(n, 3, 128) for n in range(6)] for config in configs]
    assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(*samples, strict=True))
    assert any((a.labels != b.labels).any() for a, b in zip(*samples, strict=True))
    before = output.read_text()
    assert call_program("benchmarks/documents.py", *arguments)[1] in said and output.read_text() == before


def row(seed, masked, loss, fingerprint):
    text = {"loss": loss, "bits_per_byte": loss / 2}
    text["documents"] = [{"id": name, "tokens": 100, "bytes": 200, "nats": 100 * loss} for name in "ab"]
    text["loss_by_position"] = [{"start": 0, "end": 16, "tokens": 200, "loss": loss}]
    key = {"variant": "softmax", "seed": seed, "mask_documents": masked, "fingerprint": fingerprint}
    return key | {"books": text, "articles": text}


def test_the_table_pairs_seeds(call_program, prepared):
    fingerprint = [fingerprint_of(load_manifest(prepared / f"{text}-train")) for text in ("books", "articles")]
    losses = {(0, True): 5.0, (0, False): 5.5, (2, True): 9.0, (1, False): 4.1, (1, True): 4.0}
    rows = [row(*key, loss, fingerprint) for key, loss in losses.items()] + [row(0, True, 1.0, ["other", "data"])]
    output = prepared.parent / "rows.jsonl"
    output.write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, said, _ = call_program("benchmarks/documents.py", "--seeds", 0, 1, "--data", prepared, "--output", output)
    lines = said.splitlines()
    assert code == 0 and "seed 0" in lines[0] and "seed 1" in lines[0] and "seed 2" not in lines[0]
    assert lines[1].split()[:7] == ["books,", "loss", "4.5000", "4.8000", "-0.5000", "-0.1000", "-0.3000"]
    assert lines[1].endswith("-0.3000 (-0.3000 to -0.3000), seeds ± 0.2828")  # documents are alike, seeds are not
    bits = f"{-0.15 / np.log(2):+.4f}"
    seeds = f"seeds ± {0.1 * 2**0.5 / np.log(2):.4f}"
    assert lines[2].startswith("books, bits a byte") and lines[2].endswith(f"{bits} ({bits} to {bits}), {seeds}")
    assert lines[-1].startswith("articles, 0 … 15 before") and lines[-1].split()[-1] == "-0.3000"


def test_missing_data_is_one_line(call_program, tmp_path):
    arguments = ["--data", tmp_path, "--output", tmp_path / "rows.jsonl"]
    code, _, errors = call_program("benchmarks/documents.py", *arguments)
    assert code == 2 and "manifest.json" in errors and len(errors.splitlines()) == 1
