"""Selective activation checkpointing: no product twice, norms and activations not kept, and torch.compile takes it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lcpt.attention import AttentionConfig
from lcpt.config import load_config
from lcpt.model import GPT
from lcpt.utils.recomputation import recompute
from tests.model.conftest import PUBLISHED, V, config

CONFIGS = PUBLISHED | {
    kind: {"attention": AttentionConfig(kind, block_size=4, gate="none" if kind == "softmax" else "data")}
    for kind in ("softmax", "polysketch", "flurka")
}


def build(options, checkpointing):
    torch.manual_seed(0)
    return GPT(config(**options, activation_checkpointing=checkpointing))


def step(model):
    x = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(0))
    loss = model(x[:, :-1], labels=x[:, 1:])[0]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_are_equal_and_no_product_is_computed_twice(options):
    results, flops = {}, {}
    for checkpointing in (False, "selective", True, "offload"):
        with FlopCounterMode(display=False) as counter:
            results[checkpointing] = step(build(options, checkpointing))
        flops[checkpointing] = counter.get_total_flops()
    for checkpointing in ("selective", True, "offload"):
        assert all(torch.equal(a, b) for a, b in zip(results[False], results[checkpointing], strict=True))
    assert flops["selective"] == flops[False] < flops[True] == flops["offload"]


def saved_bytes(options, checkpointing):
    """Of a forward pass, counted a storage at a time; and the shapes of what was saved."""
    model, saved = build(options, checkpointing), {}

    def count(x):
        saved[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.hidden(torch.zeros(2, 20, dtype=torch.int64))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return [x.untyped_storage().nbytes() for key, x in saved.items() if key not in own]


@pytest.mark.parametrize("kind", ["softmax", "polysketch", "flurka"])
def test_norms_and_activations_are_not_kept(kind):
    """A block keeps less by both norms' results, d_model each, and by GELU(gate) and its product, d_ff each."""
    tokens = 2 * 20
    saved = sum(saved_bytes(CONFIGS[kind], False)) - sum(saved_bytes(CONFIGS[kind], "selective"))
    assert saved >= 2 * 4 * tokens * (2 * 16 + 2 * 40)


@pytest.mark.parametrize("checkpointing", ["selective", "offload"])
def test_a_block_compiles_as_one_graph(checkpointing, monkeypatch):
    monkeypatch.setattr("lcpt.model.feed_forward.PIECE", 16)
    torch._dynamo.reset()
    plain, compiled = (build(CONFIGS["softmax"], checkpointing) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(step(plain), step(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_evaluation_and_decoding_recompute_nothing(monkeypatch):
    monkeypatch.setattr("lcpt.utils.recomputation.checkpoint", None)
    model = build(CONFIGS["polysketch"], "selective")
    with torch.no_grad():
        expected = model(torch.arange(9)[None])
    torch.testing.assert_close(model.prefill(torch.arange(9)[None])[0], expected)


def test_backward_stops_where_nothing_more_is_needed():
    """The product of a closing linear layer runs once, what stands before it twice."""
    calls, linear = [], torch.nn.Linear(4, 4)

    def function(x):
        calls.append("before")
        y = linear(x.sin())
        calls.append("after")
        return y

    recompute(function, torch.ones(3, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "before"]


@pytest.mark.parametrize(
    "said, meant", [("true", True), ("false", False), ("selective", "selective"), ("offload", "offload")]
)
def test_the_setting_is_a_boolean_or_a_word(tmp_path, said, meant):
    (tmp_path / "a.yaml").write_text(
        f"run: {{dir: r}}\ndata: {{path: d}}\nmodel: {{activation_checkpointing: {said}}}\n"
    )
    assert load_config(tmp_path / "a.yaml").model.activation_checkpointing is meant or isinstance(meant, str)
    overridden = load_config(tmp_path / "a.yaml", [f"model.activation_checkpointing={said}"])
    assert overridden.model.activation_checkpointing == meant
    assert type(overridden.model.activation_checkpointing) is type(meant)


@pytest.mark.parametrize("wrong", ["some", "None", "yes please"])
def test_another_word_is_named(wrong):
    with pytest.raises(
        ValueError, match=f"activation_checkpointing is '{wrong}'; it is false, selective, true, offload"
    ):
        config(activation_checkpointing=wrong)
