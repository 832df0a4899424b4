"""benchmarks/quality.sh and what it calls: configs of all variants, rows that are there, bad words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lcpt.config import load_config
from lcpt.evaluation.variants import read_variants

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/compare"
VARIANTS = read_variants(CONFIGS / "variants.txt")


def quality(*words):
    command = ["bash", str(ROOT / "benchmarks/quality.sh"), *map(str, words)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_every_variant_and_every_task_is_a_config():
    for changes in (*VARIANTS.values(), *read_variants(CONFIGS / "tasks.txt").values()):
        load_config(CONFIGS / "recall.yaml", changes)
    for changes in read_variants(CONFIGS / "convert.txt").values():
        load_config(CONFIGS / "convert.yaml", changes)
    for base in ("books", "books-gpu", "documents"):
        load_config(CONFIGS / f"{base}.yaml", VARIANTS["polysketch+softmax"])


def recall_row(seed, steps):
    curve = [{"step": 200, "accuracy": 0.8, "loss": 1.0}]
    row = {"task": "mqar_4_32", "variant": "softmax", "seed": seed, "curve": curve, "cpu_seconds": 10.0}
    return row | {"steps_to_90": steps, "best_accuracy": 0.8}


def test_recall_prints_the_rows_that_are_there(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(recall_row(*x)) + "\n" for x in ((1, None), (0, 75), (2, 100))))
    before = rows.read_text()
    done = quality("recall", "--variants", "softmax", "--tasks", "mqar_4_32", "--output", rows)
    assert done.returncode == 0, done.stderr
    assert "softmax  75 [80%] 100 (50 s)" in done.stdout and rows.read_text() == before


def books_row(variant, seed, nats):
    documents = [{"id": f"d{n}", "tokens": 100, "bytes": 300, "nats": 100 * x} for n, x in enumerate(nats)]
    figures = dict.fromkeys(("loss_last_quarter", "loss_repeated_bigrams", "loss_other_tokens"), 4.0)
    row = {"variant": variant, "seed": seed, "fingerprint": "f", "documents": documents}
    return row | figures | {"evaluation_loss": sum(nats) / len(nats), "loss_rare_bigrams": None}


def test_books_compares_with_the_first_variant(capsys):
    from lcpt.evaluation.quality_rows import print_table

    rows = [books_row("softmax", seed, [5, 6]) for seed in (0, 1)]
    rows += [books_row("polysketch", 1, [4.5, 5.5]), books_row("flurka", 2, [1, 1])]
    print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert "loss − softmax's" in lines[0] and lines[1].split()[:3] == ["softmax", "2", "5.5000"]
    assert "-0.5000 (-0.5000 to -0.5000)" in lines[2]
    assert lines[3].split()[-1] == "4.0000"  # no seed in common: no difference


@pytest.mark.parametrize(
    "words, named",
    [
        (["bookz"], "there is no bookz"),
        (["recall", "--variants", "softmaxx"], "there is no softmaxx"),
        (["recall", "--tasks", "mqar"], "there is no mqar"),
        (["books", "--data", "/nowhere"], "/nowhere/valid/manifest.json"),
    ],
)
def test_bad_words_are_one_line(words, named, tmp_path):
    done = quality(*words, *([] if words == ["bookz"] else ["--output", tmp_path / "rows.jsonl"]))
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
