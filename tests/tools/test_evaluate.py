"""tools/evaluate.py on a checkpoint that was never trained."""

import contextlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch

from lcpt.checkpoint import Slice, commit_checkpoint, open_partial, write_piece
from lcpt.config import load_config, to_yaml
from lcpt.data import Corpus, Tokenizer, prepare
from lcpt.evaluation import context_gain, perplexity
from lcpt.model import GPT
from lcpt.model.pretrained import open_pretrained, write_export

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, train_folder):
    return save_run(tmp_path_factory.mktemp("run"), train_folder, 330)


def save_run(run, data, vocab_size):
    (run / "tiny.yaml").write_text(
        f"run: {{dir: {run}}}\n"
        f"model: {{n_layers: 2, d_model: 32, n_heads: 2, vocab_size: {vocab_size}, attention: {{block_size: 16}}}}\n"
        f"data: {{path: {data}, context: 64}}\n"
        "training: {global_batch_tokens: 128, valid_tokens: 128}\n"
    )
    config = load_config(run / "tiny.yaml")
    (run / "config.yaml").write_text(to_yaml(config))
    model = GPT(config.model)
    attachments = {"config.yaml": run / "config.yaml", "tokenizer.model": data / "tokenizer.model"}
    weights = [Slice(name, tuple(x.shape), 0, x.flatten()) for name, x in model.state_dict().items()]
    partial = open_partial(run / "checkpoints", 7)
    commit_checkpoint(
        partial, 7, [write_piece(partial, 0, {"weights": weights})], {"step": 7, "tokens": 700}, attachments
    )
    return run


@pytest.fixture
def export(run_folder, tmp_path):
    write_export(run_folder, tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def evaluate(call_tool, run_folder, valid_folder, tmp_path):
    """evaluate(*arguments) -> (exit code, report or None, what it said on stderr)."""

    def call(*arguments):
        output = tmp_path / "out.json"
        code, _, said = call_tool(
            "evaluate", "--checkpoint", run_folder, "--data", valid_folder, "--output", output, *arguments
        )
        return code, json.loads(output.read_text()) if output.exists() else None, said

    return call


def test_scores_every_byte_once(evaluate, run_folder, valid_folder):
    code, report, _ = evaluate()
    assert code == 0
    manifest = Corpus(valid_folder).manifest
    assert report["bytes_scored"] == manifest["bytes"]
    assert report["tokens_scored"] == manifest["tokens"] - manifest["documents"]  # all but each document's BOS
    assert report["bits_per_byte"] == pytest.approx(
        report["loss"] * report["tokens_scored"] / report["bytes_scored"] / math.log(2)
    )
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert report["loss"] == pytest.approx(math.log(330), rel=0.05)  # an untrained model knows nothing
    assert report["checkpoint"] == str(run_folder / "checkpoints/step-00000007")
    assert report["step"] == 7 and report["window"] == report["stride"] == 64
    assert {part["tokens"] / (part["end"] - part["start"]) for part in report["loss_by_position"]} == {
        report["position_windows"]
    }
    assert report["precision"] == "fp32" and report["last_window"] == "short" and "context_gain" not in report
    low, high = report["bits_per_byte_interval"]
    assert low <= report["bits_per_byte"] <= high


@pytest.mark.parametrize("stride, last", [(64, "short"), (24, "short"), (64, "full"), (24, "full")])
def test_figures_are_those_of_an_independent_windowing_in_float64(stride, last, evaluate, run_folder, valid_folder):
    """For each token the window is found anew: the first, in order, that holds it as a label."""
    _, report, _ = evaluate("--stride", stride, "--last-window", last)
    model, corpus = open_pretrained(run_folder).model.double(), Corpus(valid_folder)
    nats = 0.0
    for number in range(len(corpus)):
        tokens = torch.from_numpy(corpus.document(number)[1].astype(int))
        scored = 0
        while scored < len(tokens) - 1:
            begin = 0 if scored == 0 else scored + stride - 64
            end = min(begin + 64, len(tokens) - 1)
            begin = max(0, end - 64) if last == "full" else begin
            with torch.no_grad():
                log_p = model(tokens[None, begin:end])[0].log_softmax(-1)
            nats -= sum(float(log_p[t - begin, tokens[t + 1]]) for t in range(scored, end))
            scored = end
    assert report["loss"] == pytest.approx(nats / report["tokens_scored"], rel=2e-7)
    assert report["bits_per_byte"] == pytest.approx(nats / corpus.manifest["bytes"] / math.log(2), rel=2e-7)


def test_every_document_has_a_row(evaluate, valid_folder, tmp_path):
    _, report, _ = evaluate("--stride", "48", "--batch", "3")
    corpus = Corpus(valid_folder)
    rows = [json.loads(line) for line in (tmp_path / "out.documents.jsonl").read_text().splitlines()]
    expected = [corpus.document(number) for number in range(len(corpus))]
    assert [row["id"] for row in rows] == [identifier for identifier, *_ in expected]
    assert [row["tokens"] for row in rows] == [len(tokens) - 1 for _, tokens, _ in expected]
    assert [row["bytes"] for row in rows] == [n_bytes for *_, n_bytes in expected]
    assert sum(row["nats"] for row in rows) == pytest.approx(report["loss"] * report["tokens_scored"])


def test_the_same_number_at_any_batch_and_from_text(evaluate, valid_folder, tmp_path):
    corpus = Corpus(valid_folder)
    tokenizer = Tokenizer(corpus.tokenizer)
    with lzma.open(tmp_path / "text.jsonl.xz", "wt", encoding="utf-8") as file:
        for number in range(len(corpus)):
            text = tokenizer.decode(corpus.document(number)[1][1:].tolist())
            file.write(json.dumps({"text": text}) + "\n")
    _, one, _ = evaluate()
    for arguments in (["--batch", 7], ["--batch", 3, "--data", tmp_path / "text.jsonl.xz"]):
        _, other, _ = evaluate(*arguments)
        for key in ("loss", "bits_per_byte", "tokens_scored", "bytes_scored"):
            assert other[key] == pytest.approx(one[key], rel=1e-6)


def test_stride_scores_the_same_tokens_with_more_context(evaluate):
    _, disjoint, _ = evaluate("--context", 32)
    _, sliding, _ = evaluate("--context", 32, "--stride", 8)
    assert sliding["tokens_scored"] == disjoint["tokens_scored"]
    assert sliding["position_windows"] < disjoint["position_windows"]


@pytest.mark.parametrize(
    "arguments, remark",
    [
        (["--checkpoint", "absent"], "absent is no run folder"),
        (["--data", "absent.txt"], "absent.txt"),
        (["--stride", "100"], "stride 100"),
    ],
)
def test_bad_input_is_one_line(evaluate, arguments, remark):
    code, report, said = evaluate(*arguments)
    errors = [line for line in said.splitlines() if "error" in line]
    assert code == 2 and report is None and len(errors) == 1 and remark in errors[0]


def test_an_output_that_cannot_be_written_is_said_before_the_work(evaluate, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for output in (tmp_path / "file/out.json", tmp_path):
        code, _, said = evaluate("--output", output)
        assert code == 2 and str(tmp_path) in said and "scoring" not in said and "Traceback" not in said
    (tmp_path / "scores.documents.jsonl").mkdir()
    code, _, said = evaluate("--output", tmp_path / "scores.json")
    assert code == 2 and "scores.documents.jsonl is a folder" in said


def test_validation_counts_as_evaluation_does(evaluate, tmp_path):
    """Labels, bytes, loss and bits per byte, under a tokenizer that normalises and does not know every character; a
    blank document is in neither."""
    from lcpt.training.validation import Validation

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["It was a dark night when the indented text was quoted here, fine and naive."] * 50),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=3,
    )
    texts = [
        "It was a dark night — naïve 北京 “quoted” ﬁne.\n\n  Indented   text\there.\n" * 4,
        "   \n ",
        "北京 was fine",
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "t.jsonl"], tmp_path / "data", tokenizer=tmp_path / "m.model")
    corpus = Corpus(tmp_path / "data")
    run = save_run(tmp_path, corpus.folder, corpus.vocab_size)
    model = open_pretrained(run).model
    watch, preemption = SimpleNamespace(heartbeat=lambda *_: None), SimpleNamespace(requested_by=None)
    row = Validation(corpus, 10**6, 64, 2).run(model, torch.device("cpu"), watch, preemption)
    assert row["valid_bytes_scored"] == len((texts[0] + texts[2]).encode()) == corpus.manifest["bytes"]
    for data in (corpus.folder, tmp_path / "t.jsonl"):
        _, report, _ = evaluate("--checkpoint", run, "--data", data)
        assert report["tokens_scored"] == row["valid_tokens_scored"]
        assert report["bytes_scored"] == row["valid_bytes_scored"]
        assert report["loss"] == pytest.approx(row["valid_loss"], rel=1e-6)
        assert report["bits_per_byte"] == pytest.approx(row["valid_bits_per_byte"], rel=1e-6)
        rows = [json.loads(line) for line in (tmp_path / "out.documents.jsonl").read_text().splitlines()]
        assert [row["bytes"] for row in rows] == [len(texts[n].encode()) for n in (0, 2)]


def test_foreign_tokenizer_is_named(evaluate, make_corpus):
    code, report, said = evaluate("--data", make_corpus(seed=9))
    assert code == 2 and report is None and "another tokenizer" in said


def test_an_export_gives_the_numbers_of_its_step(evaluate, run_folder, export):
    step = run_folder / "checkpoints/step-00000007"
    reports = []
    for folder in (step, export):
        code, report, _ = evaluate("--checkpoint", folder)
        assert code == 0 and report.pop("checkpoint") == str(folder) and report["step"] == 7
        del report["tokens_per_second"], report["peak_memory_bytes"]
        reports.append(report)
    assert reports[0] == reports[1] and reports[1]["window"] == 64


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_damaged_export_is_named(evaluate, export, file):
    (export / file).unlink()
    code, report, said = evaluate("--checkpoint", export)
    assert code == 2 and report is None and said.startswith("error: ") and len(said.splitlines()) == 1
    assert str(export / file) in said


def test_the_newest_whole_step_is_scored_where_latest_names_none(evaluate, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    (tmp_path / "copy/checkpoints/latest").write_text("step-00000009\n")
    code, report, said = evaluate("--checkpoint", tmp_path / "copy")
    assert code == 0 and report["step"] == 7 and report["checkpoint"].endswith("step-00000007")
    [line] = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert "step-00000009" in line and line.endswith("taking step-00000007")


def test_damaged_weights_are_named(evaluate, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    weights = next((tmp_path / "copy").glob("checkpoints/step-*/weights-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, report, said = evaluate("--checkpoint", tmp_path / "copy")
    assert code == 2 and report is None and weights.name in said and "sha256" in said


def test_repeated_bigrams_are_counted(evaluate, valid_folder):
    """In windows that hold a document each, all but the first of equal pairs repeat a bigram."""
    _, report, _ = evaluate("--context", 4096)
    found, corpus = report["repeated_bigrams"], Corpus(valid_folder)
    counts = [Counter(itertools.pairwise(corpus.document(n)[1].tolist())) for n in range(len(corpus))]
    held_by = Counter(pair for document in counts for pair in document)
    assert found["tokens"] == sum(n - 1 for document in counts for n in document.values()) > 0
    rare = sum(n - 1 for document in counts for pair, n in document.items() if held_by[pair] == 1)
    assert found["rare"]["tokens"] == rare
    assert found["tokens"] + found["other_tokens"] == report["tokens_scored"]
    nats = found["tokens"] * found["loss"] + found["other_tokens"] * found["other_loss"]
    assert nats == pytest.approx(report["loss"] * report["tokens_scored"], rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(330), rel=0.1)  # an untrained model knows nothing


def test_the_table_names_repeated_bigrams_and_other_tokens(call_tool, run_folder, valid_folder, tmp_path):
    output = tmp_path / "out.json"
    _, said, _ = call_tool("evaluate", "--checkpoint", run_folder, "--data", valid_folder, "--output", output)
    found = json.loads(output.read_text())["repeated_bigrams"]
    assert f"repeated bigrams  {found['loss']:.4f} nats ({found['tokens']:,} tokens); the rare ones: " in said
    assert f"other tokens      {found['other_loss']:.4f} nats ({found['other_tokens']:,} tokens)\n" in said


def test_carried_state_is_one_window(evaluate):
    """Compare pieces with a window as long as the longest document."""
    _, whole, _ = evaluate("--context", 4096)
    code, carried, _ = evaluate("--context", 50, "--carry-state")
    assert code == 0 and carried["carry_state"] and carried["window"] == 50
    assert carried["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert carried["tokens_scored"] == whole["tokens_scored"] and carried["fingerprint"] == whole["fingerprint"]
    assert carried["loss_by_position"][-1]["end"] > 50
    for key in ("tokens", "other_tokens", "loss", "other_loss"):
        assert carried["repeated_bigrams"][key] == pytest.approx(whole["repeated_bigrams"][key], rel=1e-5)
    _, disjoint, _ = evaluate("--context", 50)
    assert disjoint["repeated_bigrams"]["tokens"] < carried["repeated_bigrams"]["tokens"]


def test_context_gain_scores_the_same_tokens_at_every_context(evaluate, tmp_path):
    _, plain, _ = evaluate()
    code, report, _ = evaluate("--context-gain", "--batch", 3)
    gain = report.pop("context_gain")
    assert code == 0 and [part["context"] for part in gain["contexts"]] == [8, 16, 32, 64]
    assert gain["contexts"][0]["gain"] == 0 and gain["documents"] == 4
    assert report["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "out.documents.jsonl").read_text().splitlines()]
    for part in gain["contexts"]:
        nats = sum(row["context_gain"]["nats"][str(part["context"])] for row in rows)
        assert part["loss"] == pytest.approx(nats / gain["targets"])


def test_figures_come_from_the_records_alone(evaluate, tmp_path):
    """From OUT.documents.jsonl, read back, the same report."""
    _, report, _ = evaluate("--context-gain")
    rows = [json.loads(line) for line in (tmp_path / "out.documents.jsonl").read_text().splitlines()]
    again = json.loads(json.dumps(perplexity.report(rows) | {"context_gain": context_gain.report(rows)}))
    for part, written in zip(again["loss_by_position"], report["loss_by_position"], strict=True):
        assert part == {key: value for key, value in written.items() if key != "unigram"}
        assert 0 < written["unigram"] < math.log(330) + 1
    for key in again.keys() - {"loss_by_position"}:
        assert again[key] == report[key], key


@pytest.mark.parametrize(
    "arguments", [["--stride", 48, "--batch", 3], ["--carry-state", "--context", 50], ["--context-gain", "16,64"]]
)
def test_two_ranks_give_the_figures_of_one(arguments, evaluate, run_ranks, run_folder, valid_folder, tmp_path):
    """To the last bit, and only the first rank prints and writes."""
    code, alone, _ = evaluate(*arguments)
    rows = (tmp_path / "out.documents.jsonl").read_text()
    output = tmp_path / "two.json"
    command = ["--checkpoint", run_folder, "--data", valid_folder, "--output", output, *arguments]

    def rank():
        spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools/evaluate.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        sys.argv = ["evaluate.py", *map(str, command)]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            return tool.main(), said.getvalue()

    (first, said), (second, silent) = run_ranks(rank, 2)
    assert code == first == second == 0 and "bits per byte" in said and silent == ""
    together = json.loads(output.read_text())
    for report in (alone, together):
        del report["tokens_per_second"], report["peak_memory_bytes"]
    assert together == alone and (tmp_path / "two.documents.jsonl").read_text() == rows


def test_bf16_is_near_and_named(evaluate):
    _, exact, _ = evaluate()
    code, rounded, _ = evaluate("--precision", "bf16")
    assert code == 0 and rounded["precision"] == "bf16" and rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], abs=0.01)


def test_a_full_last_window_is_another_figure_and_named(evaluate):
    _, short, _ = evaluate()
    code, full, _ = evaluate("--last-window", "full")
    assert code == 0 and full["last_window"] == "full" and full["tokens_scored"] == short["tokens_scored"]
    assert full["loss"] != short["loss"]


def test_a_task_is_asked(evaluate):
    code, report, _ = evaluate("--data", "synthetic:mqar", "--samples", 20, "--batch", 8)
    assert code == 0 and report["schema_version"] == 1 and report["context"] == 64
    assert report["answers"] == 20 * 4 == sum(part["answers"] for part in report["recall_by_distance"])
    assert report["accuracy"] < 0.2 and report["loss"] == pytest.approx(math.log(330), rel=0.05)


@pytest.mark.parametrize(
    "arguments, remark",
    [
        (["--data", "synthetic:mqra"], "did you mean synthetic:mqar"),
        (["--data", "synthetic:mqar", "--stride", "8"], "leave out --stride"),
        (["--data", "synthetic:mqar", "--context", "2"], "need data.context 4"),
        (["--data", "synthetic:mqar", "--samples", "0"], "--samples is 0"),
        (["--data", "synthetic:mqar", "--context-gain"], "leave out --stride, --carry-state, --context-gain"),
        (["--context-gain", "16,x"], "--context-gain 16,x is no list"),
        (["--context-gain", "0"], "--context-gain 0 is no list"),
        (["--context-gain", "4096"], "no document of 4,096 tokens"),
    ],
)
def test_what_does_not_go_together_is_one_line(evaluate, arguments, remark):
    code, report, said = evaluate(*arguments)
    assert code == 2 and report is None and remark in said and len(said.splitlines()) == 1
