"""The two tools as a user runs them."""

import json

import pytest
import sentencepiece

from lcpt.data import Corpus


def test_prepare_then_verify(run_tool, jsonl, prepared, tmp_path):
    out = tmp_path / "out"
    done = run_tool(
        "prepare_data.py", "--input", jsonl, "--output", out, "--vocab-size", "600", "--shard-tokens", "9000"
    )
    assert done.returncode == 0 and "documents               20" in done.stdout and "warning" not in done.stderr
    assert Corpus(out).fingerprint == Corpus(prepared).fingerprint
    whole = run_tool("verify_data.py", out)
    assert whole.returncode == 0 and whole.stdout.count("whole") == len(list(out.iterdir()))
    (out / "tokenizer.model").write_bytes(b"x")
    (out / "shard-00001.safetensors").unlink()
    bad = run_tool("verify_data.py", out)
    errors = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert bad.returncode == 1 and len(errors) == 2
    assert "tokenizer.model" in errors[0] and "shard-00001.safetensors: missing" in errors[1]


BAD = {
    "empty corpus": ('{"text": ""}\n', [], "holds no text"),
    "empty corpus, own tokenizer": ('{"text": ""}\n', ["--tokenizer", "MODEL"], "holds no text"),
    "broken JSON": ('{"text": "a"}\n{"text"\n', [], "a.jsonl:2: broken JSON"),
    "large vocabulary": ('{"text": "a few words"}\n', [], "use --vocab-size"),
    "no tokenizer": ('{"text": "a"}\n', ["--tokenizer", "absent.model"], "absent.model: No such file"),
    "no workers": ('{"text": "a"}\n', ["--workers", "0"], "workers 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(run_tool, prepared, tmp_path, case):
    content, options, message = BAD[case]
    (tmp_path / "a.jsonl").write_text(content)
    options = [prepared / "tokenizer.model" if option == "MODEL" else option for option in options]
    done = run_tool("prepare_data.py", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", *options)
    last = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_foreign_tokenizer_that_loses_text_is_said(run_tool, tmp_path):
    text = "two  blanks and\na newline\n" * 20
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(tmp_path / "foreign"), vocab_size=19, minloglevel=3
    )
    model = tmp_path / "foreign.model"
    done = run_tool(
        "prepare_data.py", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", model
    )
    assert done.returncode == 0 and "does not give 1 documents back exactly" in done.stderr


@pytest.mark.parametrize("tool, command", [("prepare_data.py", "lcpt prepare"), ("verify_data.py", "lcpt verify")])
def test_help_has_an_example(run_tool, tool, command):
    done = run_tool(tool, "--help")
    assert done.returncode == 0 and f"{command} " in done.stdout
