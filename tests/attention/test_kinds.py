"""Every kind as a module."""

import inspect

import pytest
import torch
from lcpt_kernels.norm_rotary import apply_rotary

from lcpt.attention import ATTENTION, sparse
from lcpt.attention.base import rotary_table
from tests.attention.variants import (
    D_MODEL,
    DECIDING,
    HEAD_DIM,
    HEADS,
    LINEAR,
    NOT_ALL,
    VARIANTS,
    attention_config,
    build,
    rotary,
)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def test_every_kind_is_tested():
    assert {kind for kind, _ in VARIANTS.values()} == set(ATTENTION)
    assert not any(inspect.isabstract(kind) for kind in ATTENTION.values())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 18])
def test_any_length(variant, tokens, kv_heads):
    x = torch.randn(2, tokens, D_MODEL)
    o = build(variant, kv_heads)(x, rotary(tokens))
    assert o.shape == x.shape and o.isfinite().all()


@pytest.mark.parametrize("n", [1, 5, 8])
def test_causality(variant, n):
    module = build(variant)
    x = torch.randn(2, 18, D_MODEL)
    y = torch.cat((x[:, :n], torch.randn(2, 18 - n, D_MODEL)), dim=1).requires_grad_()
    before, after = module(x, rotary(18)), module(y, rotary(18))
    torch.testing.assert_close(before[:, :n], after[:, :n], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, n:], after[:, n:], atol=1e-3)
    after[:, :n].sum().backward()
    assert torch.equal(y.grad[:, n:], torch.zeros_like(y.grad[:, n:]))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_ALL])
def test_sees_every_earlier_token(variant):
    """The last token's output has a gradient to the first: through the state, where there is one."""
    x = torch.randn(1, 18, D_MODEL, requires_grad=True)
    build(variant)(x, rotary(18))[:, -1].square().sum().backward()
    assert (x.grad.norm(dim=-1) > 0).all()


def gradients(module, x, run):
    """Output of run(x), and its gradients to x and to every parameter."""
    x = x.clone().requires_grad_()
    o = run(x)
    torch.manual_seed(1)
    weights = list(module.parameters())
    found = torch.autograd.grad(o, [x, *weights], torch.randn(o.shape, dtype=o.dtype), allow_unused=True)
    return o.detach(), [torch.zeros_like(w) if g is None else g for g, w in zip(found, [x, *weights], strict=True)]


@pytest.mark.parametrize("lengths", [[18], [5, 1, 8, 4], [1, 0, 17]], ids=str)
@pytest.mark.parametrize("gate", ["none", "data"])
def test_packed_documents_are_documents_alone(variant, gate, lengths, monkeypatch):
    """Output and every gradient, with positions that begin anew."""
    monkeypatch.setattr(sparse, "AUX_LOSS_WEIGHT", 0.0)  # which is by the share of all tokens together
    if gate == "data" and variant not in LINEAR:
        pytest.skip("has no gate")
    module, x = build(variant, 2, gate).double(), torch.randn(1, 18, D_MODEL, dtype=torch.float64)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    positions = torch.cat([torch.arange(length) for length in lengths])

    def alone(x):
        return torch.cat(
            [module(document, rotary(document.shape[1])) for document in x.split(lengths, dim=1) if document.shape[1]],
            dim=1,
        )

    found, found_gradients = gradients(
        module, x, lambda x: module(x, rotary_table(positions, HEAD_DIM, 10_000.0), cu_seqlens=ends)
    )
    expected, expected_gradients = gradients(module, x, alone)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [[7, 11], [4, 1, 1, 12]], ids=str)
def test_a_state_continues_a_sequence(variant, pieces):
    """A sequence in pieces, each with the state that the one before it left, equals the whole sequence."""
    module, x = build(variant, kv_heads=2).double().eval(), torch.randn(2, 18, D_MODEL, dtype=torch.float64)
    state, found, start = None, [], 0
    for length in pieces:
        piece = slice(start, start + length)
        o, state = module.extend(x[:, piece], tuple(table[piece] for table in rotary(18)), state)
        found, start = [*found, o], start + length
    torch.testing.assert_close(torch.cat(found, dim=1), module(x, rotary(18)), rtol=1e-9, atol=1e-9)


def test_output_norm(variant):
    """Every head's output has mean square 1 before the heads are mixed."""
    config = attention_config(variant)
    config.output_norm = True
    torch.manual_seed(0)
    module = config.attention_of_layer(0)(D_MODEL, HEADS, HEADS, config)
    x, seen = torch.randn(2, 9, D_MODEL), []
    module.out.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    module(x, rotary(9))
    squares = seen[0].unflatten(-1, (HEADS, HEAD_DIM)).square().mean(-1)
    squares = squares[squares > 0]  # a sparse head may give nothing at all
    assert squares.max() < 1.001 and squares.median() > 0.99  # where a head gives next to nothing, ε keeps it so


def test_gradients_reach_every_parameter(variant):
    module = build(variant, kv_heads=2)
    if variant == "polysketch-products":  # whose gain of 0 lets nothing through at first
        torch.nn.init.ones_(module.sketch.gain)
    module(torch.randn(2, 18, D_MODEL), rotary(18)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-6, name


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in DECIDING])
def test_bf16_is_near_fp32(variant):
    module, x = build(variant), torch.randn(2, 18, D_MODEL)
    exact = module(x, rotary(18))
    o = module.bfloat16()(x.bfloat16(), rotary(18))
    assert o.dtype == torch.bfloat16
    assert (o.float() - exact).norm() / exact.norm() < 0.05


def test_rope_sees_distances_only():
    """The product of a query rotated by position m and a key rotated by n depends on m - n."""
    table = rotary(20)
    q, k = (torch.randn(HEAD_DIM).expand(1, 20, 1, HEAD_DIM) for _ in range(2))
    scores = (apply_rotary(q, *table)[0, :, 0] @ apply_rotary(k, *table)[0, :, 0].T).detach()
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1  # and they do depend on it


def test_rope_keeps_norms_and_the_first_token():
    x = torch.randn(2, 9, 3, HEAD_DIM)
    rotated = apply_rotary(x, *rotary(9))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, 0], x[:, 0]) and not torch.allclose(rotated[:, 1], x[:, 1])


@pytest.mark.parametrize("variant", ["softmax", "lowrank", "flurka-elu1"])
def test_queries_and_keys_are_shifted_normed_and_rotated(variant):
    module, x = build(variant, kv_heads=2), torch.randn(2, 9, D_MODEL)
    for norm in (module.q_norm, module.k_norm):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(module.key_shift)
    p = module.project(x, rotary(9))
    q, k, _ = module.qkv(x).unflatten(-1, (-1, HEAD_DIM)).split((HEADS, 2, 2), dim=2)
    assert torch.equal(p.last_key, k[:, -1:])
    k = k + module.key_shift.view(2, HEAD_DIM) * torch.nn.functional.pad(k, (0, 0, 0, 0, 1, -1))
    for rows, norm, rotated, plain in ((q, module.q_norm, p.q, p.q_plain), (k, module.k_norm, p.k, p.k_plain)):
        normed = torch.nn.functional.layer_norm(rows, (HEAD_DIM,), norm.weight, norm.bias)
        assert torch.equal(rotated, apply_rotary(normed, *rotary(9)))
        assert plain is None if variant == "softmax" else torch.equal(plain, normed)


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("gate", ["scalar", "data"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gates(variant, gate, kv_heads):
    """Causal, of the length of the input, nearly open at first; shut, a token sees itself alone; it learns."""
    module, x = build(variant, kv_heads, gate, key_shift=False), torch.randn(2, 18, D_MODEL)
    ungated = build(variant, kv_heads, key_shift=False)
    ungated.load_state_dict({n: w for n, w in module.state_dict().items() if not n.startswith("gate")})
    nearly, without = module(x, rotary(18)), ungated(x, rotary(18))
    assert (nearly - without).norm() / without.norm() < 0.02 and not torch.equal(nearly, without)
    y = torch.cat((x[:, :7], torch.randn(2, 11, D_MODEL)), dim=1)
    torch.testing.assert_close(module(y, rotary(18))[:, :7], nearly[:, :7], rtol=0, atol=1e-6)
    nearly.square().sum().backward()
    assert all(p.grad.norm() > 0 for p in module.gate_module.parameters() if p.ndim == 1)
    with torch.no_grad():
        for parameter in module.gate_module.parameters():
            parameter.fill_(-1e4 if parameter.ndim == 1 else 0)
    shut = module(x, rotary(18))
    for t in (0, 5, 17):
        alone = module(x[:, t : t + 1], tuple(table[t : t + 1] for table in rotary(18)))
        torch.testing.assert_close(shut[:, t : t + 1], alone, rtol=1e-4, atol=1e-5)
