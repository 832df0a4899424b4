"""Check that an error at the start is one line, the same on both ranks, and leaves no run folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lcpt.checkpoint import find_checkpoint, read_manifest
from lcpt.config import load_config, to_yaml
from lcpt.model.pretrained import write_export
from lcpt.parallel import groups
from lcpt.training.dry_start import dry_start


def mixed(place, more=""):
    """Overrides that mix the training folder with another place."""
    return [
        "data.path=null",
        f"data.sources=[{{{{path: {{train}}, weight: 0.5}}}}, {{{{path: {{{place}}}, weight: 0.5{more}}}}}]",
    ]


CASES = {
    "vocabulary": (["model.vocab_size=329"], ["330", "model.vocab_size=330"]),
    "tokenizers": (["data.valid_path={foreign}"], ["{foreign}", "different tokenizers", "--tokenizer"]),
    "micro-batches": (["training.micro_batch=3"], ["8 sequences", "2 ranks", "micro-batches of 3"]),
    "odd sequences": (["training.global_batch_tokens=96"], ["3 sequences", "2 ranks"]),
    "no corpus": (["data.path={nowhere}"], ["{nowhere}"]),
    "no validation corpus": (["data.valid_path={nowhere}"], ["{nowhere}"]),
    "short corpus": (
        ["data.context=100000", "training.global_batch_tokens=200000", "training.valid_tokens=100000"],
        ["100,000"],
    ),
    "damaged corpus": (["data.path={damaged}"], ["{damaged}", "shard-00000"]),
    "no weights": (["training.init_from={nowhere}"], ["{nowhere}"]),
    "other weights": (
        ["training.init_from={run}", "model.n_layers=3"],
        ["another model", "n_layers is 2 there and 3"],
    ),
    "other shapes": (
        ["training.init_from={run}", "model.d_ff=8"],
        ["another model", "model.d_ff is ", "there and 8 in"],
    ),
    "damaged weights": (["training.init_from={damaged_run}"], ["weights-00000.safetensors"]),
    "damaged export": (["training.init_from={damaged_export}"], ["model.safetensors is damaged", "export"]),
    "other heads": (["training.init_from={run}", "model.n_heads=4"], ["model.n_heads is 2 there and 4"]),
    "tokenizer of weights": (
        ["training.init_from={run}", "data.path={foreign}"],
        ["has another tokenizer than {foreign}", "--tokenizer {run}/checkpoints"],
    ),
    "no such parameter": (
        ["training.parameter_groups=[{{match: '*.attn.*', kind: softmax}}]"],
        ["training.parameter_groups[0], *.attn.* of softmax, matches no parameter; one is "],
    ),
    "no such kind": (["training.parameter_groups=[{{kind: flurka}}]"], ["* of flurka, matches no parameter"]),
    "a rule too late": (
        ["training.parameter_groups=[{{lr_factor: 2}}, {{match: '*.bias'}}]"],
        ["training.parameter_groups[1], *.bias, matches only what earlier ones take"],
    ),
    "all frozen": (
        ["training.parameter_groups=[{{kind: softmax, frozen_steps: 3}}, {{frozen_steps: 2}}]"],
        ["freezes every parameter in the first 2 steps"],
    ),
    "no folder": (["run.dir={file}/run"], ["{file}"]),
    "other rope": (["run.dir={run}", "model.rope_base=500000"], ["{run}", "model.rope_base 10000.0", "500000.0"]),
    "other blocks": (["run.dir={run}", "model.attention.block_size=4"], ["model.attention.block_size 8", "this is 4"]),
    "no place for checkpoints": (["run.dir={dangling}"], ["{dangling}/checkpoints"]),
    "other seed": (["run.dir={run}", "run.seed=5"], ["{run}", "begun with run.seed 0", "this is 5"]),
    "no source": (mixed("nowhere"), ["{nowhere}"]),
    "damaged source": (mixed("damaged"), ["{damaged}", "shard-00000"]),
    "tokenizers of sources": (mixed("foreign"), ["data.sources", "{foreign}", "different tokenizers"]),
    "vocabulary of sources": ([*mixed("valid"), "model.vocab_size=329"], ["330", "model.vocab_size=330"]),
    "one source twice": (mixed("copy"), ["data.sources", "{copy}", "hold the same"]),
    "short source": (
        [*mixed("valid"), "data.context=4096", "training.global_batch_tokens=8192", "training.valid_tokens=4096"],
        ["data.sources: {valid}: ", "less than a window"],
    ),
    "source that runs out": (
        [*mixed("valid", ", max_repeats: 1"), "training.max_steps=1000"],
        ["data.sources: {valid} runs out after step", "of 1,000", "max_repeats"],
    ),
    "tokenizer of validation": (
        [*mixed("valid"), "data.valid_path={foreign}"],
        ["{foreign} and data.sources {train} 0.5, {valid} 0.5", "different tokenizers"],
    ),
    "no named validation set": (["data.valid={{books: {valid}, code: {nowhere}}}"], ["{nowhere}"]),
    "tokenizer of a named set": (
        ["data.valid={{books: {valid}, code: {foreign}}}"],
        ["{foreign} and {train}", "different tokenizers"],
    ),
    "one validation set twice": (
        ["data.valid={{books: {valid}, text: {train}, code: {copy}}}"],
        ["data.valid: text and code hold the same, {copy}"],
    ),
    "other sequences": (["training.micro_batch=2", "training.global_batch_tokens=192"], ["among 1 or 3 ranks"]),
}
FINISHED = {  # what a finished run must not pass over
    "width": (["model.d_model=64"], ["model.d_model 32, this is 64"]),
    "vocabulary": (["model.vocab_size=400"], ["model.vocab_size 330, this is 400"]),
    "data": (["data.path={foreign}"], ["other data than {foreign}"]),
    "task": (["data.path=synthetic:mqar"], ["other data than synthetic:mqar"]),
    "sources": (
        mixed("valid"),
        ["other data than data.sources {train} 0.5, {valid} 0.5", "): with {train};"],
    ),
    "seed": (["run.seed=5"], ["run.seed 0, this is 5"]),
    "context": (["data.context=64"], ["data.context 32, this is 64"]),
    "batch": (["training.global_batch_tokens=512"], ["global_batch_tokens 256, this is 512"]),
    "all at once": (["model.d_model=64", "run.seed=5"], ["model.d_model 32", "run.seed 0"]),
    "rate": (["training.lr=0.1"], ["is complete", "training.lr 0.003, this is 0.1", "training.max_steps"]),
    "fewer steps": (["training.max_steps=2", "training.warmup_steps=1"], ["training.max_steps 3, this is 2"]),
    "precision": (["training.precision=bf16"], ["training.precision fp32, this is bf16"]),
}
CASES |= {
    f"finished, other {name}": (["run.dir={run}", "training.max_steps=3", *overrides], ["{run}", *parts])
    for name, (overrides, parts) in FINISHED.items()
}


def flip(file):
    """Flip a bit near the end of a file."""
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def places(train_ranks, make_corpus, train_folder, valid_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    run = train_ranks(1, "training.max_steps=3", "training.micro_batch=8").dir
    damaged, damaged_run = root / "damaged", root / "damaged_run"
    shutil.copytree(train_folder, damaged)
    shutil.copytree(train_folder, root / "copy")
    shutil.copytree(run, damaged_run)
    [weights] = damaged_run.glob("checkpoints/step-*/weights-00000.safetensors")
    for file in (damaged / "shard-00000.safetensors", weights):
        flip(file)
    write_export(run, root / "damaged_export")
    flip(root / "damaged_export/model.safetensors")
    (root / "file").write_text("no folder")
    (root / "dangling").mkdir()
    (root / "dangling/checkpoints").symlink_to(root / "nowhere")
    return {
        "copy": root / "copy",
        "dangling": root / "dangling",
        "file": root / "file",
        "foreign": make_corpus(seed=9),
        "nowhere": root / "nowhere",
        "run": run,
        "train": train_folder,
        "valid": valid_folder,
        "damaged": damaged,
        "damaged_run": damaged_run,
        "damaged_export": root / "damaged_export",
        "fresh": root / "fresh",
    }


@pytest.fixture(scope="module")
def errors(run_ranks, places, tiny_yaml):
    """case -> the message on each rank; all cases in one job, which an error must leave usable."""
    from lcpt.training.history import History
    from lcpt.training.loop import train
    from lcpt.training.preemption import Preemption
    from lcpt.training.watchdog import Watchdog

    def rank():
        groups.join()
        preemption, watch, found = Preemption(), Watchdog(30, record=print), {}
        for case, (overrides, _) in CASES.items():
            given = [f"run.dir={places['fresh'] / case}", *(text.format(**places) for text in overrides)]
            config = load_config(tiny_yaml, given)
            try:
                train(config, to_yaml(config), History(Path(config.run.dir)), preemption, watch)
            except groups.SetupError as error:
                found[case] = str(error)
        watch.stop()
        groups.leave()
        return found

    return run_ranks(rank, 2)


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_setup_is_one_line_on_all_ranks(errors, places, case):
    messages = [rank.get(case, "") for rank in errors]
    assert messages[0] and messages[0] == messages[1] and "\n" not in messages[0]
    for part in CASES[case][1]:
        assert part.format(**places) in messages[0]
    assert not (places["fresh"] / case).exists()


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_says_the_same_and_changes_nothing(errors, places, tiny_yaml, case):
    before = snapshot(places)
    given = [f"run.dir={places['fresh'] / case}", *(text.format(**places) for text in CASES[case][0])]
    with pytest.raises(groups.SetupError) as caught:
        dry_start(load_config(tiny_yaml, given), 2)
    assert str(caught.value) == errors[0][case]
    assert snapshot(places) == before


def snapshot(places):
    """Every file of the places, with its content and the time of its last change."""
    files = {path for place in places.values() for path in (place, *place.rglob("*")) if path.exists()}
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in files}


def test_an_existing_run_stays_as_it_was(errors, places):
    """Its rows and weights are those of before."""
    assert len((places["run"] / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(json.loads((places["run"] / "starts.json").read_text())) == 1
    read_manifest(find_checkpoint(places["run"]))


def test_an_error_on_one_rank_reaches_all(run_ranks):
    def rank():
        groups.join()
        try:
            with groups.raise_on_all_ranks():
                if groups.rank() == 1:
                    raise ValueError("no such thing")
        except groups.SetupError as error:
            return str(error)
        finally:
            groups.leave()

    assert run_ranks(rank, 2) == ["rank 1: no such thing"] * 2


def test_total_is_in_float64(run_ranks):
    def rank():
        groups.join()
        sums = groups.all_reduce_sum(1e-12, torch.tensor(groups.rank() + 1.0), 1, device=torch.device("cpu"))
        groups.leave()
        return sums

    assert run_ranks(rank, 2) == [pytest.approx([2e-12, 3.0, 2.0], rel=1e-12)] * 2


def test_total_on_one_process_without_a_group():
    assert groups.all_reduce_sum(1.5, 2, device=torch.device("cpu")) == [1.5, 2.0]
    assert (groups.rank(), groups.world_size()) == (0, 1)
