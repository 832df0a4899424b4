"""Baselines of a GPU as far as a CPU runs them: their definitions, the mask of a window, what they do without a
library."""

import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from lcpt.benchmarking import attention_baselines as baselines
from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.attention_methods import random_projections

LAYER = Layer(batch=1, heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))


def one_at_a_time(q, k, v, weight, seen):
    """o_t = Σ w(q_t·k_s) v_s / Σ w(q_t·k_s) over the tokens that t sees, [H, T, D] in, by loops."""
    o = torch.zeros_like(v)
    for h in range(q.shape[0]):
        for t in range(q.shape[1]):
            weights = {s: weight(q[h, t] @ k[h, s]) for s in range(t + 1) if seen(t, s)}
            o[h, t] = sum(w * v[h, s] for s, w in weights.items()) / sum(weights.values())
    return o


def random(*size):
    return [torch.randn(size, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_softmax_equals_loops_by_hand(window):
    q, k, v = random(2, 9, 16)
    expected = one_at_a_time(q, k, v, lambda s: (s / 4).exp(), lambda t, s: window is None or t - window < s)
    found = baselines.softmax(q[None], k[None], v[None], window)
    torch.testing.assert_close(found, expected.transpose(0, 1)[None])


def test_based_equals_loops_by_hand():
    q, k, v = random(2, 9, 16)
    expected = one_at_a_time(q, k, v, lambda s: 1 + s / 4 + s**2 / 32, lambda t, s: True)
    found = baselines.based(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    torch.testing.assert_close(found, expected.transpose(0, 1)[None])


def test_linear_attention_equals_a_recurrence_by_hand():
    q, k, v = (x.transpose(0, 1)[None] for x in random(2, 9, 16))
    found = baselines.linear(q, k, v)
    state = torch.zeros(2, 16, 16, dtype=torch.float64)
    for t in range(9):
        state += k[0, t, :, :, None] * v[0, t, :, None, :]
        torch.testing.assert_close(found[0, t], torch.einsum("hf,hfd->hd", q[0, t], state) / baselines.GLA_FEATURES)


@pytest.mark.parametrize("tokens", [1, 128, 300, 1000])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 500])
def test_mask_is_pytorchs_own(tokens, window):
    mask = baselines.causal_mask(tokens, window, torch.device("cpu"))
    expected = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    for name in ("kv_indices", "full_kv_indices"):
        count = getattr(mask, name.replace("indices", "num_blocks"))
        used = torch.arange(getattr(mask, name).shape[-1]) < count[..., None]
        assert torch.equal(getattr(mask, name)[used], getattr(expected, name)[used]), name
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    seen = (s <= t) & (t - s < (window or tokens))
    assert torch.equal(mask.mask_mod(0, 0, t, s).expand_as(seen), seen)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name, window", [("flex", None), ("window", baselines.WINDOW)])
def test_flex_is_its_definition(name, window):
    method = baselines.BASELINES["cuda"][name](LAYER)
    # PyTorch has no backward of it on a CPU.
    given = [x.detach() for x in method.inputs(random_projections(LAYER, 1100))]
    torch.testing.assert_close(method.attend(*given), method.definition(*given))
    assert method.settings.get("window") == window
    assert (baselines.softmax(*given, None) - method.attend(*given)).norm() > 1e-2 or window is None


def test_every_sdpa_backend_is_named_to_pytorch(monkeypatch):
    asked = []

    def note(backends):
        asked.append(backends)
        return torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH])

    monkeypatch.setattr(baselines, "sdpa_kernel", note)
    for name, backend in baselines.SDPA.items():
        method = baselines.BASELINES["cuda"][f"sdpa_{name}"](LAYER)
        given = method.inputs(random_projections(LAYER, 20))
        torch.testing.assert_close(method.attend(*given), method.definition(*given))
        assert asked[-1] == [backend]


@pytest.mark.parametrize("name", ["fla_simple_gla", "fla_based"])
def test_a_library_that_is_not_installed_is_named(monkeypatch, name):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(baselines.Unavailable, match="flash-linear-attention is not installed"):
        baselines.BASELINES["cuda"][name](LAYER)


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("fla_simple_gla", "fla.ops.simple_gla", "chunk_simple_gla"),
        ("fla_based", "fla.ops.based", "fused_chunk_based"),
    ],
)
def test_fla_is_called_as_its_definition_says(monkeypatch, name, module, function):
    """With the library's own conventions: [B, T, H, K], weights scaled by `scale`, or by 1/√K where none is given."""

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        weights = torch.einsum("bthf,bshf->bhts", q, k).tril() * scale
        return torch.einsum("bhts,bshd->bthd", weights, v), None

    def fused_chunk_based(q, k, v, scale=None, use_norm=True):
        assert q.shape[-1] <= 16 and scale is None and use_norm
        s = torch.einsum("bthf,bshf->bhts", q, k) * q.shape[-1] ** -0.5
        w = (1 + s + s**2 / 2).tril()
        return torch.einsum("bhts,bshd->bthd", w, v) / (w.sum(-1).transpose(1, 2)[..., None] + 1e-6)

    stand_in = types.ModuleType(module)
    setattr(stand_in, function, locals()[function])
    monkeypatch.setitem(sys.modules, module, stand_in)
    for package in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setattr(baselines, "find_spec", lambda name: name)
    method = baselines.BASELINES["cuda"][name](LAYER)
    given = method.inputs(random_projections(LAYER, 40))
    torch.testing.assert_close(method.attend(*given), method.definition(*given), rtol=1e-4, atol=1e-5)
    assert all(x.requires_grad for x in given) and given[0].shape[-1] == method.settings["features"]


@pytest.mark.parametrize("name", ["flex_qk", "flex_hash"])
@pytest.mark.parametrize("tokens", [1, 100, 300])
def test_a_mask_by_marks_is_sparse_attention(name, tokens):
    """Also for queries that are dropped, or see no key."""
    method = baselines.BASELINES["cuda"][name](LAYER)
    given = [x.detach() for x in method.inputs(random_projections(LAYER, tokens))]
    found, expected = method.attend(*given), method.definition(*given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.flatten(2).any(-1).all() or tokens == 1
