"""Learning rates by group and frozen steps, against AdamW written out here on one process."""

import math

import pytest
import torch

from lcpt.checkpoint import find_checkpoint, read_manifest, read_state, read_tensors
from lcpt.config import ConfigError, load_config
from lcpt.data import open_text
from lcpt.data.batches import batch
from lcpt.model import GPT, load_pretrained
from lcpt.model.pretrained import write_export
from lcpt.training.optimizer import parameter_groups
from lcpt.training.parameter_groups import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN, FACTOR = 3, 0.25
RULES = (
    "training.parameter_groups=[{match: '*.attention.*', kind: polysketch}, "
    f"{{match: '*.bias', lr_factor: 2}}, {{match: '*', frozen_steps: {FROZEN}, lr_factor: {FACTOR}}}]"
)
SETTINGS = [RULES, "training.max_steps=7", "data.mask_documents=false", "training.grad_clip=1.25"]


def share(name, step, warmup):
    """The part of the learning rate that RULES give a parameter at a step."""
    if name.startswith("blocks.0.attention."):
        return 1.0
    if name.endswith(".bias"):
        return 2.0
    return FACTOR * min(1.0, max(0, step - FROZEN) / warmup)


def plainly(config):
    """-> losses, gradient norms and {"weights", "exp_avg", "exp_avg_sq"} after the last step."""
    training, source = config.training, open_text(config.data)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    state = {group: {n: torch.zeros_like(p) for n, p in model.named_parameters()} for group in MOMENTS}
    made = dict.fromkeys(state["exp_avg"], 0)
    losses, norms = [], []
    for step in range(1, training.max_steps + 1):
        drawn = batch(source, config.run.seed, step - 1, config.sequences, config.data.context)
        total, count = model(torch.from_numpy(drawn.inputs), labels=torch.from_numpy(drawn.labels))
        loss = total / count
        gradients = dict(zip(made, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        gradients = {n: g for n, g in gradients.items() if share(n, step, training.warmup_steps)}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        warmup, after = training.warmup_steps, step - training.warmup_steps
        fraction = (1 + math.cos(math.pi * after / (training.max_steps - warmup))) / 2
        rate = training.lr * min(step / warmup, 0.1 + 0.9 * fraction if after > 0 else 1)
        with torch.no_grad():
            for name, g in gradients.items():
                p, g = model.get_parameter(name), g * min(1.0, training.grad_clip / norm)
                mean, square = state["exp_avg"][name], state["exp_avg_sq"][name]
                mean.lerp_(g, 1 - 0.9)
                square.lerp_(g * g, 1 - 0.95)
                made[name] += 1
                decay = training.weight_decay if p.ndim > 1 else 0.0
                corrected = mean / (1 - 0.9 ** made[name]), square / (1 - 0.95 ** made[name])
                direction = corrected[0] / (corrected[1].sqrt() + 1e-8)
                p -= rate * share(name, step, warmup) * (direction + decay * p)
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, state | {"weights": model.state_dict()}


@pytest.fixture(scope="module")
def expected(tiny_yaml):
    return plainly(load_config(tiny_yaml, ["run.dir=none", *SETTINGS]))


def check(run, expected):
    """Losses and norms of all steps; weights and moments of the last, each tensor by itself."""
    losses, norms, groups = expected
    assert [row["loss"] for row in run.rows] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in run.rows] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < 1.2 < 1.3 < max(norms)  # some steps are clipped, by what is not frozen alone
    for group, tensors in groups.items():
        found = read_group(run.dir, group)
        for name, tensor in tensors.items():
            assert float((found[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()) + 1e-9, (group, name)


def read_group(folder, group="weights"):
    step = find_checkpoint(folder)
    return read_tensors(step, read_manifest(step), group)


@pytest.mark.parametrize(
    "world, stage, overrides",
    [
        (1, 0, ["training.micro_batch=2"]),
        pytest.param(1, 1, ["training.micro_batch=8"], marks=pytest.mark.slow),
        pytest.param(2, 1, ["training.micro_batch=2", "parallel.offload_optimizer=true"], marks=pytest.mark.slow),
        (2, 2, ["training.micro_batch=2"]),
        pytest.param(2, 3, ["training.micro_batch=2"], marks=pytest.mark.slow),
        (2, 3, ["training.micro_batch=4", "parallel.offload_optimizer=true"]),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, list) else str(x),
)
def test_equals_adamw_on_one_process(train_ranks, expected, world, stage, overrides):
    run = train_ranks(world, f"parallel.zero_stage={stage}", *SETTINGS, *overrides)
    check(run, expected)
    rates = run.rows[4]["learning_rates"]
    main = run.rows[4]["learning_rate"]
    wanted = {"*.attention.* of polysketch": main, "*.bias": 2 * main, "*": FACTOR * main}
    assert rates == pytest.approx(wanted) and run.rows[2]["learning_rates"]["*"] == 0
    assert run.rows[3]["learning_rates"]["*"] == pytest.approx(FACTOR * run.rows[3]["learning_rate"] / 2)


@pytest.mark.parametrize(
    "stopped, first, then",
    [(2, (2, 3), (1, 1)), pytest.param(3, (1, 0), (2, 3), marks=pytest.mark.slow), (5, (2, 2), (2, 3))],
)
def test_it_goes_on_inside_the_freeze_and_after_it(train_ranks, expected, stopped, first, then):
    """On another number of ranks and at another stage; each parameter counts its own updates."""
    settings = [*SETTINGS, "training.micro_batch=2"]
    begun = train_ranks(first[0], f"parallel.zero_stage={first[1]}", *settings, f"training.stop_after_steps={stopped}")
    saved = read_state(find_checkpoint(begun.dir))
    assert saved["adam_step"] == stopped
    assert set(saved["adam_step_of"].values()) == {max(0, stopped - FROZEN)}
    assert "embedding.weight" in saved["adam_step_of"] and "blocks.0.attention.gamma" not in saved["adam_step_of"]
    check(train_ranks(then[0], f"parallel.zero_stage={then[1]}", *settings, dir=begun.dir), expected)


@pytest.fixture(scope="module")
def source(train_ranks, tmp_path_factory):
    """An export, whose weights are no numbers of bf16."""
    run = train_ranks(1, "training.max_steps=3", "training.micro_batch=8", "run.seed=4")
    write_export(run.dir, folder := tmp_path_factory.mktemp("source") / "export")
    return folder


@pytest.mark.parametrize(
    "world, stage, overrides",
    [
        pytest.param(1, 0, [], marks=pytest.mark.slow),
        (2, 3, []),
        (2, 1, ["training.precision=bf16"]),
        pytest.param(2, 2, ["training.precision=bf16", "parallel.offload_optimizer=true"], marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_stay_bit_by_bit_and_have_no_moments(train_ranks, source, world, stage, overrides):
    settings = [*SETTINGS, f"training.init_from={source}", f"parallel.zero_stage={stage}", *overrides]
    run = train_ranks(world, *settings, f"training.stop_after_steps={FROZEN}")
    before, after = load_pretrained(source).state_dict(), read_group(run.dir)
    frozen = {name for name in before if not name.startswith("blocks.0.attention.") and not name.endswith(".bias")}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    for moment in MOMENTS:
        found = read_group(run.dir, moment)
        assert {name for name in found if not found[name].any()} == frozen
    train_ranks(world, *settings, f"training.stop_after_steps={FROZEN + 1}", dir=run.dir)
    after = read_group(run.dir)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_frozen_gradients_count_in_no_norm(train_ranks):
    run = train_ranks(2, *SETTINGS, "parallel.zero_stage=2", "training.norms_every_steps=1")
    for row in run.rows:
        by_layer = row["gradient_norms"]
        assert math.hypot(*by_layer.values()) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert (by_layer["embedding"] == 0) == (row["step"] <= FROZEN)


def test_the_first_rule_that_fits_counts(tiny_yaml):
    model = GPT(load_config(tiny_yaml, ["run.dir=none"]).model)
    first, second = ParameterGroup("*.qkv.weight", lr_factor=3), ParameterGroup(kind="softmax", frozen_steps=2)
    of = {name: group for group in parameter_groups(model, 0.1, [first, second]) for name in group["names"]}
    assert len(of) == len(list(model.parameters()))
    assert of["blocks.1.attention.qkv.weight"]["rule"] is of["blocks.0.attention.qkv.weight"]["rule"] is first
    assert of["blocks.1.feed_forward.up.weight"]["rule"] is of["blocks.1.attention_norm.weight"]["rule"] is second
    assert of["blocks.0.feed_forward.up.weight"]["rule"].name == of["norm.weight"]["rule"].name == "others"
    assert of["blocks.1.feed_forward.up.weight"]["weight_decay"] == 0.1
    assert of["blocks.1.attention_norm.weight"]["weight_decay"] == 0


@pytest.mark.parametrize(
    "rule, said", [("lr_factor: 0", "lr_factor is 0"), ("frozen_steps: -1", "frozen_steps is -1"), ("lr: 1", "lr")]
)
def test_what_no_group_can_be_is_one_line(tiny_yaml, rule, said):
    with pytest.raises(ConfigError, match=said):
        load_config(tiny_yaml, ["run.dir=r", f"training.parameter_groups=[{{{rule}}}]"])


def test_a_dry_run_tells_the_groups_and_the_source(tiny_yaml, call_program, source):
    settings = "run.dir=none", RULES, f"training.init_from={source}", "model.attention.pattern=[polysketch, flurka]"
    code, said, errors = call_program("launch/pretrain.py", "--config", tiny_yaml, *settings, "--dry-run")
    assert code == 0 and f"would begin with the weights of {source};" in said
    assert "initialised, since it lacks them: blocks 1: attention.feature_map.W, attention.gamma, " in errors
    [line] = [line for line in said.splitlines() if line.startswith("  groups of them")]
    assert "*.attention.* of polysketch: " in line and line.endswith("lr × 0.25, frozen for 3 steps")
