"""The loop against AdamW written out here, on one process, without DeepSpeed, ranks, micro-batches or chunks."""

import itertools
import math

import numpy as np
import pytest
import torch

from lcpt.checkpoint import find_checkpoint, read_manifest, read_state, read_tensors
from lcpt.config import load_config
from lcpt.data import open_text
from lcpt.model import GPT

MOMENTS = ("exp_avg", "exp_avg_sq")


def plainly(config):
    """-> losses, gradient norms, learning rates, and {"weights", "exp_avg", "exp_avg_sq"} after the last step."""
    training, source = config.training, open_text(config.data)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    state = {group: {n: torch.zeros_like(p) for n, p in model.named_parameters()} for group in MOMENTS}
    losses, norms, rates = [], [], []
    for step in range(training.max_steps):
        nats = count = 0
        for number in range(step * config.sequences, (step + 1) * config.sequences):
            sample = source.sample(number, config.run.seed, config.data.context)
            for start, stop in itertools.pairwise([*sample.starts, config.data.context]):  # each document alone
                logits = model(torch.from_numpy(sample.inputs[None, start:stop]))[0]
                labels = torch.from_numpy(sample.labels[start:stop])
                nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
                count += int((labels >= 0).sum())
        assert count < 0.97 * training.global_batch_tokens  # documents end
        loss = nats / count
        gradients = dict(zip(state["exp_avg"], torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        warmup, after = training.warmup_steps, (step + 1 - training.warmup_steps)
        fraction = (1 + math.cos(math.pi * after / (training.max_steps - warmup))) / 2
        rate = training.lr * min((step + 1) / warmup, 0.1 + 0.9 * fraction if after > 0 else 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = gradients[name] * min(1.0, training.grad_clip / norm)
                mean, square = state["exp_avg"][name], state["exp_avg_sq"][name]
                mean.lerp_(g, 1 - 0.9)
                square.lerp_(g * g, 1 - 0.95)
                decay = training.weight_decay if p.ndim > 1 else 0.0
                direction = (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                p -= rate * (direction + decay * p)
        losses.append(loss.item())
        norms.append(norm)
        rates.append(rate)
    return losses, norms, rates, state | {"weights": model.state_dict()}


@pytest.fixture(scope="module")
def settings(tiny_yaml, make_corpus, train_folder):
    """Overrides: documents of a third to a few sequences, and a limit that clips half of the steps."""
    folder = make_corpus(seed=7, tokenizer=train_folder / "tokenizer.model", sentences=1, count=400)
    short = f"data.path={folder}"
    norms = plainly(load_config(tiny_yaml, ["run.dir=none", short]))[1]
    return [short, f"training.grad_clip={np.median(norms)}"]


@pytest.fixture(scope="module")
def expected(tiny_yaml, settings):
    return plainly(load_config(tiny_yaml, ["run.dir=none", *settings]))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "world, stage, overrides",
    [
        (1, 1, ["training.micro_batch=8"]),
        (1, 1, ["training.micro_batch=2"]),  # 4 accumulated
        (2, 1, ["training.micro_batch=4"]),
        (2, 1, ["training.micro_batch=1", "model.activation_checkpointing=true"]),
        (2, 2, ["training.micro_batch=2"]),
        (2, 3, ["training.micro_batch=2"]),
        (1, 0, ["training.micro_batch=2"]),
        (2, 0, ["training.micro_batch=2"]),
        (2, 1, ["training.micro_batch=2", "parallel.offload_optimizer=true"]),
        (2, 2, ["training.micro_batch=2", "parallel.offload_optimizer=true"]),
        (2, 3, ["training.micro_batch=2", "parallel.offload_optimizer=true"]),
        (4, 2, ["training.micro_batch=1", "model.activation_checkpointing=true"]),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, list) else str(x),
)
def test_equals_adamw_on_one_process(train_ranks, expected, settings, world, stage, overrides):
    """Losses, gradient norms, rates, weights and moments, whatever divides the work."""
    run = train_ranks(world, f"parallel.zero_stage={stage}", *settings, *overrides)
    losses, norms, rates, groups = expected
    assert [row["loss"] for row in run.rows] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in run.rows] == pytest.approx(norms, rel=1e-5)
    assert [row["learning_rate"] for row in run.rows] == pytest.approx(rates, rel=1e-12)
    assert min(norms) < 0.995 * run.config.training.grad_clip < 1.005 * run.config.training.grad_clip < max(norms)
    step = find_checkpoint(run.dir)
    manifest = read_manifest(step)
    for group, tensors in groups.items():
        found = read_tensors(step, manifest, group)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert relative(found[name], tensor) < 1e-3, (group, name)  # Adam magnifies the noise of a tiny gradient
        whole, same = (torch.cat([x[name].flatten() for name in tensors]) for x in (found, tensors))
        assert relative(whole, same) < 1e-5, group


def test_bf16_is_near_fp32(train_ranks, expected, settings):
    run = train_ranks(2, "training.precision=bf16", "training.micro_batch=2", *settings)
    assert [row["loss"] for row in run.rows] == pytest.approx(expected[0], rel=0.01)
    weights = read_tensors(step := find_checkpoint(run.dir), read_manifest(step))
    whole, same = (torch.cat([x[n].flatten() for n in sorted(x)]) for x in (weights, expected[3]["weights"]))
    assert relative(whole, same) < 0.05
    assert not torch.equal(whole, whole.bfloat16().float())  # the fp32 copy, not the rounded one


def test_stopping_early_changes_nothing_before(train_ranks, expected, settings):
    run = train_ranks(1, "training.stop_after_steps=3", "training.micro_batch=8", *settings)
    assert [row["loss"] for row in run.rows] == pytest.approx(expected[0][:3], rel=1e-5)
    assert [row["learning_rate"] for row in run.rows] == pytest.approx(expected[2][:3], rel=1e-12)
    assert read_state(find_checkpoint(run.dir))["step"] == 3


@pytest.mark.parametrize("kind", ["flurka", "lowrank", "sparse_qk", "sparse_hash", "kernel", "feedforward"])
def test_every_kind_goes_on_where_it_stopped(train_ranks, kind):
    """Bit by bit, whatever a kind keeps beside its weights."""
    kind = [
        f"model.attention.kind={kind}",
        "model.attention.pattern=[]",
        "model.attention.kernel.feature_map=favor",
        "training.micro_batch=8",
        "training.max_steps=4",
    ]
    whole = train_ranks(1, *kind)
    stored = read_tensors(step := find_checkpoint(whole.dir), read_manifest(step))
    assert stored.keys() == GPT(whole.config.model).state_dict().keys()
    first = train_ranks(1, "training.stop_after_steps=2", *kind)
    both = train_ranks(1, *kind, dir=first.dir)
    assert [row["loss"] for row in both.rows] == [row["loss"] for row in whole.rows]


def test_a_buffer_travels_with_the_weights(train_ranks):
    """The Gaussian sketch is drawn once, the same on all ranks, and saved."""
    run = train_ranks(2, "model.attention.polysketch.sketch=gaussian", "training.max_steps=3", "training.micro_batch=4")
    weights = read_tensors(step := find_checkpoint(run.dir), read_manifest(step))
    torch.manual_seed(run.config.run.seed)
    model = GPT(run.config.model)
    assert torch.equal(weights["blocks.0.attention.sketch.G"], model.blocks[0].attention.sketch.G)
    assert weights.keys() == model.state_dict().keys()


def test_seeds_differ(train_ranks, expected):
    run = train_ranks(1, "run.seed=1", "training.micro_batch=8", "training.max_steps=3")
    assert abs(run.rows[0]["loss"] - expected[0][0]) > 1e-4
    assert np.isfinite(run.rows[0]["loss"])


def test_start_weights_are_the_same_everywhere(train_ranks):
    """At every stage and on any number of ranks: three steps that move nothing by more than 3e-30."""

    def start(world, stage):
        run = train_ranks(world, f"parallel.zero_stage={stage}", "training.max_steps=3", "training.lr=1e-30")
        return read_tensors(step := find_checkpoint(run.dir), read_manifest(step))

    first = start(1, 1)
    for world, stage in ((2, 0), (2, 1), (2, 2), (2, 3), (4, 3)):
        for name, tensor in start(world, stage).items():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-29)


def test_a_penalty_counts_once(train_ranks):
    """Losses and norms do not depend on how the work is divided, and differ from those without the penalty."""
    kind = ["model.attention.kind=feedforward", "model.attention.pattern=[]", "training.max_steps=4"]

    def run(world, stage, *overrides):
        rows = train_ranks(world, f"parallel.zero_stage={stage}", *kind, *overrides).rows
        return [row["loss"] for row in rows], [row["grad_norm"] for row in rows]

    strong = "model.attention.feedforward.penalty=1e4"  # at first there is nothing to hold
    losses, norms = run(1, 1, "training.micro_batch=8", strong)
    for world, stage in ((2, 0), (2, 3)):
        found = run(world, stage, "training.micro_batch=2", "model.activation_checkpointing=true", strong)
        assert found[0] == pytest.approx(losses, rel=1e-5) and found[1] == pytest.approx(norms, rel=1e-4)
    without = run(1, 1, "training.micro_batch=8", "model.attention.feedforward.penalty=0")
    assert without[0][0] == losses[0] and abs(without[1][-1] - norms[-1]) > 0.01 * norms[-1]
