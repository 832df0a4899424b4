"""A model runs on the kernels as it runs in PyTorch, and nothing in it knows."""

import pytest
import torch
from lcpt_kernels import dispatch

from lcpt.attention import AttentionConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.sparse import SparseHashConfig, SparseQKConfig
from lcpt.model import GPT, ModelConfig
from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE, INTERVAL_KERNELS, KERNELS

T, V = 21, 50
AROUND = {  # the attention kernels of a kind
    "polysketch": "feature_map_forward feature_map_backward",
    "kernel": "feature_map_forward feature_map_backward",
    "feedforward": "feature_map_forward feature_map_backward",
    "lowrank": "pooling_forward pooling_backward",
    "flurka": "feature_map_forward feature_map_backward pooling_forward pooling_backward",
}


def model_of(kind, pattern=(), **changes):
    torch.manual_seed(0)
    attention = AttentionConfig(
        kind,
        list(pattern),
        block_size=16,
        polysketch=PolysketchConfig(size=8),
        polynomial=PolynomialConfig(degree=2),
        sparse_qk=SparseQKConfig(window=2),
        sparse_hash=SparseHashConfig(window=2),
    )
    return GPT(ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=V, attention=attention, **changes)).to(DEVICE)


def outcome(model, **options):
    tokens = torch.randint(V, (1, T + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    loss, _ = model(tokens[:, :-1], labels=tokens[:, 1:], **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    "kind, changes, options",
    [
        ("polysketch", {}, {}),
        ("fastmax", {"n_kv_heads": 1}, {}),
        ("polynomial", {"activation_checkpointing": True}, {}),
        ("kernel", {"n_kv_heads": 1}, {}),
        ("feedforward", {}, {}),
        ("flurka", {}, {}),
        ("polysketch", {"pattern": ["flurka", "softmax", "kernel"]}, {"cu_seqlens": [0, 18, T, T, T]}),
        ("sparse_qk", {}, {}),
        ("sparse_hash", {"n_kv_heads": 1}, {}),
        ("lowrank", {"n_kv_heads": 1}, {}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_in_pytorch(kind, changes, options, started, monkeypatch):
    options = {name: torch.tensor(x, dtype=torch.int32, device=DEVICE) for name, x in options.items()}
    model = model_of(kind, **changes)
    found = outcome(model, **options)
    in_intervals = kind in ("sparse_qk", "sparse_hash", "lowrank")
    assert (INTERVAL_KERNELS if in_intervals else KERNELS) <= set(started)
    own = "flurka" if "pattern" in changes else kind
    norms = ["norm_rotary_forward", "norm_rotary_backward", "shifted_norm_rotary_backward"]
    around = [*norms, *AROUND.get(own, "").split()]
    assert {f"{name}_kernel" for name in around} <= set(started)
    started.clear()
    monkeypatch.setattr(dispatch, "use_triton", lambda *_: False)
    expected = outcome(model, **options)
    assert not started
    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < 2e-4, errors


def test_decoding_goes_on_where_the_kernels_stopped(started):
    model = model_of("polysketch").eval()
    tokens = torch.randint(V, (1, T)).to(DEVICE)
    with torch.no_grad():
        logits, cache = model.prefill(tokens[:, :-1])
        last, _ = model.decode(tokens[:, -1], cache)
        whole = model(tokens)
    assert "block_forward_kernel" in started
    torch.testing.assert_close(torch.cat((logits, last[:, None]), dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, ends", [("polysketch", None), ("flurka", [0, 18, T])])
def test_a_model_is_one_graph(kind, ends):
    model, tokens = model_of(kind), torch.randint(V, (1, T)).to(DEVICE)
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(f(tokens, cu_seqlens=cu_seqlens).square().sum(), list(model.parameters()))
        for f in (compiled, model)
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
