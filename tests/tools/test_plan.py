import json
from math import ceil

import pytest

from lcpt.config import load_config
from lcpt.model.cost import model_cost
from lcpt.model.sequence_cost import layers_by_kind
from lcpt.utils.gpus import GPU_BYTES

BLOCKS = "model.attention.block_size=256"  # small ones are slow to count


@pytest.fixture
def plan(call_tool, tmp_path, tiny_yaml):
    """plan(*arguments) -> (what it said, its report) for the tiny experiment on two GPUs, unless they say otherwise."""

    def call(*arguments):
        output = tmp_path / "new/plan.json"
        given = arguments if "--gpus" in arguments else ("--gpus", 2, *arguments)
        code, out, err = call_tool("plan", "--config", tiny_yaml, "--output", output, BLOCKS, *given)
        assert (code, err) == (0, "")
        return out, json.loads(output.read_text())

    return call


def test_a_plan_has_counts_and_proposals(plan, tiny_yaml):
    out, report = plan()
    assert report["schema_version"] == 1 and report["device"] == "model of 2 x H100-80GB"
    [phase] = report["phases"]
    config = load_config(tiny_yaml, ["run.dir=none", BLOCKS])
    cost = model_cost(config.model, 32)
    assert phase["parameters"] == cost.parameters and f"{cost.parameters:,}" in out
    assert {part: tuple(found.values()) for part, found in phase["flops_per_token"].items()} == cost.flops
    own = phase["configured"]
    assert (own["zero_stage"], own["micro_batch"], own["micro_batches"]) == (1, 1, 4)
    assert own["communication_bytes"] == {"all-gather": 4 * cost.parameters, "all-reduce": 4 * cost.parameters}
    keys = ("zero_stage", "sequence", "micro_batch", "activation_checkpointing")
    settings = {tuple(row[key] for key in keys) for row in phase["proposals"]}
    # Stages, micro-batches of 1, 2, 4, policies; blocks of 256 are longer than half a sequence.
    assert len(settings) == len(phase["proposals"]) == 4 * 3 * 4 and {row["sequence"] for row in own_and(phase)} == {1}
    times = [row["model"]["step_seconds"] for row in phase["proposals"]]
    assert times == sorted(times) and not any(row["offload_optimizer"] for row in phase["proposals"])
    for words in ("attention: polysketch", "all-reduce", "by a model", "limited by", "take: parallel.zero_stage="):
        assert words in out
    assert len([line for line in out.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]) == 10


def own_and(phase):
    return [phase["configured"], *phase["proposals"]]


def test_sequences_are_shared_where_slices_are_long_enough(plan, tmp_path, tiny_yaml):
    """8 sequences on 16 GPUs: two share each at least."""
    picture = tmp_path / "new/sequence.png"
    small = "model.attention.block_size=8"
    out, report = plan("--gpus", 16, "--sequence-plot", picture, small, "parallel.sequence=2")
    [phase] = report["phases"]
    assert phase["configured"]["sequence"] == 2 and phase["configured"]["exchange_bytes"] > 0
    assert phase["configured"]["model"]["seconds"]["exchange"] > 0 and "among 2 ranks a sequence" in out
    assert {row["sequence"] for row in phase["proposals"]} == {2, 4}  # slices of 16 and 8 tokens
    assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in out
    [by_kind, break_even] = report["sequence"]["layers"], report["sequence"]["break_even"]
    sent = [row["bytes"] for row in by_kind if row["kind"] == "polysketch"]
    assert len(sent) == 3 and len(set(sent)) == 1 and f"{sent[0] / 1e6:,.3f}" in out
    # fp32 on one key-value head of two heads of 16: features, and the key of the key shift; q, k, v, o; k, v.
    polysketch = layers_by_kind(load_config(tiny_yaml, ["run.dir=none", small]).model)[0].layer
    state, of_heads, keys = 4 * polysketch.features() * 17, 4 * 2 * 3 * 16, 4 * 2 * 16
    for ranks, found in break_even["polysketch"].items():
        sends = state + 4 * 16 / (int(ranks) - 1)
        assert found == {"Ulysses": ceil(sends * int(ranks) / of_heads), "ring, gathered keys": ceil(sends / keys)}
    assert "polysketch: no more bytes than by Ulysses from" in out


def test_what_it_proposes_is_a_config(plan, tiny_yaml):
    out, report = plan()
    [line] = [line for line in out.splitlines() if line.startswith("take: ")]
    config = load_config(tiny_yaml, ["run.dir=none", *line.removeprefix("take: ").split()])
    best = report["phases"][0]["proposals"][0]
    assert (config.parallel.zero_stage, config.training.micro_batch) == (best["zero_stage"], best["micro_batch"])
    assert config.parallel.sequence == best["sequence"]


def test_every_phase_is_planned(plan):
    """The second has sequences of twice the length: one rank more would not divide them."""
    out, report = plan("phases=[{until_step: 2}, {data: {context: 64}}]")
    assert [(p["phase"], p["first_step"], p["context"]) for p in report["phases"]] == [(1, 1, 32), (2, 3, 64)]
    assert {row["micro_batch"] for row in report["phases"][1]["proposals"]} == {1, 2}
    assert "1, steps 1 to 2" in out and "2, steps 3 to 6" in out


def test_where_nothing_fits_the_optimizer_goes_to_the_host_or_it_says_so(plan, monkeypatch):
    monkeypatch.setitem(GPU_BYTES, "H100-80GB", 1000)
    out, report = plan()
    assert report["phases"][0]["proposals"] == [] and "nothing fits with 15%" in out
    assert report["phases"][0]["configured"]["fits"] is False and "does not fit with 15% left free" in out


def test_a_micro_batch_that_does_not_divide_is_said_and_others_are_proposed(plan):
    out, report = plan("training.micro_batch=3")
    assert "in micro-batches of 3" in report["phases"][0]["configured"]["error"] and "in micro-batches of 3" in out
    assert len(report["phases"][0]["proposals"]) == 48


def test_the_plot_has_a_row_a_cell(plan, tmp_path, monkeypatch):
    out, report = plan("--plot", tmp_path / "new/plan.png", "training.precision=bf16")
    assert (tmp_path / "new/plan.png").read_bytes()[:4] == b"\x89PNG" and "plan.png" in out
    grid = {(row["context"], row["gpus"]): row for row in report["grid"]}
    assert {gpus for _, gpus in grid} == {1, 2, 4, 8} and {32, 2**11, 2**20} <= {context for context, _ in grid}
    assert all(row["fits"] and row["zero_stage"] > 0 for row in grid.values())


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--gpus", 0], "--gpus is 0"),
        (["--gpus", 8, "--gpu", "H100"], "no GPU 'H100' is known; known are A100-40GB"),
        (["--gpus", 8, "--network", "-1"], "--network is -1.0"),
        (["--gpus", 8, "--network", "nan"], "--network is nan"),
        (["--gpus", 3], "do not divide among 3 ranks in micro-batches of 1; they do among 1, 2, 4 or 8 ranks"),
        (
            ["--gpus", 8, "model.attention.block_size=64", "phases=[{until_step: 2}, {data: {context: 64}}]"],
            "phase 2, steps 3 to 6: 4 sequences",
        ),
        (
            ["--gpus", 8, "parallel.sequence=3"],
            "8 ranks cannot be divided into groups of 3; parallel.sequence can be 1",
        ),
        (
            ["--gpus", 8, "parallel.sequence=8"],
            "leaves each rank 4 tokens of data.context 32, and layers of polysketch",
        ),
        (["--gpus", 8, "--sequence-plot", "x.png", "model.attention.pattern=[softmax]"], "has none of them (softmax)"),
        (["--gpus", 8, "model.d_modl=3"], "unknown key model.d_modl"),
        (["--gpus", 8, "model.d_model=10000000000"], "no memory holds this model"),
        (["--gpus", 8, "--config", "absent.yaml"], "there is no config file absent.yaml"),
    ],
)
def test_bad_input_is_one_line(call_tool, tiny_yaml, tmp_path, arguments, part):
    given = arguments if "--config" in arguments else ["--config", tiny_yaml, *arguments]
    code, out, err = call_tool("plan", *given, "--output", tmp_path / "plan.json")
    assert (code, out) == (2, "") and err.startswith("error: ") and part in err and err.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()
