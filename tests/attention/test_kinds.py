"""Every kind as a module."""

import inspect

import pytest
import torch
from lcpt_kernels.norm_rotary import apply_rotary

from lcpt.attention import ATTENTION, Attention, AttentionConfig, sparse
from lcpt.attention.base import LinearCost, Projected, rotary_table
from lcpt.attention.fastmax import FastmaxConfig
from lcpt.attention.feature_maps import FEATURE_MAPS
from lcpt.attention.feedforward import FeedforwardConfig
from lcpt.attention.flurka import FlurkaConfig
from lcpt.attention.kernel import KernelConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.summaries import SummariesConfig

BLOCK, D_MODEL, HEADS, HEAD_DIM = 4, 16, 4, 4
VARIANTS = {
    "softmax": ("softmax", {}),
    "softmax-window": ("softmax", {"window": 3}),
    "polynomial-2": ("polynomial", {"degree": 2}),
    "polynomial-2-no-shift": ("polynomial", {"degree": 2, "shift": 0.0}),
    "polynomial": ("polynomial", {}),
    "polynomial-no-shift": ("polynomial", {"shift": 0.0}),
    "polynomial-8": ("polynomial", {"degree": 8}),
    "polysketch": ("polysketch", {"size": 8}),
    "polysketch-2-blocks": ("polysketch", {"size": 8, "local_blocks": 2}),
    "polysketch-learned": ("polysketch", {"size": 8, "sketch": "learned", "levels": 2, "expansion": 3}),
    "polysketch-products": ("polysketch", {"size": 8, "sketch": "linear_products"}),
    "polysketch-no-shift": ("polysketch", {"size": 8, "sketch": "learned", "shift": 0.0}),
    "polysketch-gaussian": ("polysketch", {"size": 8, "sketch": "gaussian"}),
    "polysketch-srht": ("polysketch", {"size": 8, "sketch": "srht"}),
    "kernel-elu1": ("kernel", {"feature_map": "elu1"}),
    "kernel-relu": ("kernel", {"feature_map": "relu", "size": 6}),
    "kernel-favor": ("kernel", {"feature_map": "favor"}),
    "kernel-hedgehog": ("kernel", {"feature_map": "hedgehog"}),
    "kernel-sketch": ("kernel", {"feature_map": "sketch", "size": 9}),
    "lowrank": ("lowrank", {"summaries": SummariesConfig(number=2)}),
    "lowrank-table": ("lowrank", {"summaries": SummariesConfig(number=2, projection="table")}),
    "flurka-elu1": ("flurka", {"summaries": SummariesConfig(number=2)}),
    "flurka-favor": ("flurka", {"summaries": SummariesConfig(number=2), "feature_map": "favor"}),
    "flurka-table": ("flurka", {"summaries": SummariesConfig(2, "table"), "feature_map": "relu"}),
    "flurka-linear": ("flurka", {"summaries": SummariesConfig(3), "feature_map": "hedgehog", "local": "linear"}),
    "flurka-sketch": ("flurka", {"summaries": SummariesConfig(number=2), "feature_map": "sketch", "size": 9}),
    "fastmax-1": ("fastmax", {"order": 1}),
    "fastmax-2": ("fastmax", {"order": 2}),
    "feedforward-ffn": ("feedforward", {"map": "ffn"}),
    "feedforward-oglu": ("feedforward", {"map": "oglu", "layers": 2}),
    "feedforward-aoglu": ("feedforward", {"map": "aoglu"}),
    "sparse_qk-random": ("sparse_qk", {"keep": "random"}),
    "sparse_qk-learned": ("sparse_qk", {"keep": "learned"}),
    "sparse_hash-lsh": ("sparse_hash", {"hash": "lsh", "buckets": 2}),
    "sparse_hash-learned": ("sparse_hash", {"hash": "learned", "buckets": 2}),
    "sparse_hash-window": ("sparse_hash", {"hash": "lsh", "buckets": 2, "window": 3}),
}
FEATURES_IN = {name for _, own in VARIANTS.values() if (name := own.get("feature_map"))}
VARIANTS |= {
    f"{kind}-{name}": (kind, {"feature_map": name, **own})
    for name in FEATURE_MAPS
    if name not in FEATURES_IN
    for kind, own in (("kernel", {}), ("flurka", {"summaries": SummariesConfig(number=2)}))
}
VARIANTS |= {kind: (kind, {}) for kind in ATTENTION if kind not in {kind for kind, _ in VARIANTS.values()}}
NOT_ALL = [name for name in VARIANTS if name.startswith("sparse") or name == "softmax-window"]  # of the earlier tokens
DECIDING = [  # choose keys by scores, so that rounding may change the choice
    "sparse_qk-learned",
    "sparse_hash-lsh",
    "sparse_hash-learned",
    "sparse_hash-window",
]


def attention_config(variant, gate="none") -> AttentionConfig:
    kind, own = VARIANTS[variant]
    config = AttentionConfig(kind=kind, block_size=BLOCK)
    for name, value in own.items():
        setattr(getattr(config, kind), name, value)
    config.gate = gate
    return config


LINEAR = [name for name in VARIANTS if issubclass(attention_config(name).attention_of_layer(0), LinearCost)]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def build(variant, kv_heads=HEADS, gate="none", key_shift=True) -> Attention:
    torch.manual_seed(0)
    config = attention_config(variant, gate)
    config.key_shift = key_shift
    return config.attention_of_layer(0)(D_MODEL, HEADS, kv_heads, config)


def rotary(tokens):
    return rotary_table(torch.arange(tokens), HEAD_DIM, 10_000.0)


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


@pytest.mark.parametrize("variant, scale, shift", [("polynomial", 1 / 8, 1.0), ("polynomial-no-shift", 1 / 4, 0.0)])
def test_polynomial_weighs_by_the_fourth_power(variant, scale, shift):
    """One head of 4 coordinates, by hand: w = (q·k/(4 √4) + 1)⁴, or (q·k/4)⁴; the offset is scale⁴."""
    q, k, v = torch.randn(3, 1, 5, HEADS, HEAD_DIM, dtype=torch.float64)
    o = build(variant).attend(Projected(q, k, v))[0]
    weights = (scale * (q[0, :, 1] @ k[0, :, 1].T) + shift).pow(4).tril()
    expected = weights @ v[0, :, 1] / (weights.sum(1, keepdim=True) + scale**4)
    torch.testing.assert_close(o[0, :, 1], expected, rtol=1e-12, atol=1e-12)


POLYSKETCH = [name for name in VARIANTS if name.startswith("polysketch")]


@pytest.mark.parametrize("variant", POLYSKETCH)
def test_polysketch_weighs_as_defined(variant):
    """Near: (q·k/(4 √d) + 1)⁴, without a shift (q·k/d)⁴. Far: e^γ (S(q)·S(k))², one sketch for both."""
    module = build(variant).double()
    torch.nn.init.uniform_(module.gamma, -1, 1)
    q, k, v = torch.randn(3, 1, 11, HEADS, HEAD_DIM, dtype=torch.float64)
    o = module.attend(Projected(q, k, v))[0]
    block = torch.arange(11) // BLOCK
    near = block[None, :] > block[:, None] - VARIANTS[variant][1].get("local_blocks", 1)
    for head in range(HEADS):
        a, b = module.sketch(q)[0, :, head], module.sketch(k)[0, :, head]
        scale, shift = (1 / HEAD_DIM, 0) if variant == "polysketch-no-shift" else (1 / (4 * HEAD_DIM**0.5), 1)
        exact = (scale * (q[0, :, head] @ k[0, :, head].T) + shift).pow(4)
        weights = torch.where(near, exact, module.gamma[head].exp() * (a @ b.T).square()).tril()
        expected = weights @ v[0, :, head] / (weights.sum(1, keepdim=True) + scale**4)
        torch.testing.assert_close(o[0, :, head], expected, rtol=1e-10, atol=1e-10)


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
def test_linear_cost_does_not_grow_with_the_context(variant):
    module = build(variant)
    assert module.attend_flops(1_000) == module.attend_flops(100_000)
    assert module.state_bytes(1_000) == module.state_bytes(100_000)
    assert sum(module.attend_flops(BLOCK)) < sum(module.attend_flops(BLOCK + 1))  # no state inside the first block


@pytest.mark.parametrize("kind", ["softmax", "polynomial"])
def test_cost_of_quadratic_kinds_grows_with_the_context(kind):
    """A token sees half the context on average: 2 products of T·D, 2 FLOPs a multiply-add."""
    module = build(kind)
    forward, backward = module.attend_flops(1_000)
    assert forward == 2 * 2 * D_MODEL * 1_000 / 2 and backward == 2.5 * forward
    assert module.attend_flops(3_000) == (3 * forward, 3 * backward)
    assert module.state_bytes(1_000) == 4 * 2 * D_MODEL * 1_000


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION if kind != "softmax"])  # PyTorch counts no SDPA on a CPU
def test_stated_flops_are_what_pytorch_counts(kind):
    """Forward, and forward with backward, within 15 %: the column of ones, and tiles on the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    context = 2048
    config = AttentionConfig(block_size=64, polysketch=PolysketchConfig(size=16))
    config.flurka.summaries = config.lowrank.summaries = SummariesConfig(projection="table")
    module = ATTENTION[kind](64, 2, 2, config)
    q, k, v, q_plain, k_plain = (torch.randn(1, context, 2, 32, requires_grad=True) for _ in range(5))
    p = Projected(q, k, v, None, q_plain, k_plain)
    with FlopCounterMode(display=False) as counter:
        o = module.attend(p)[0]
        forward = counter.get_total_flops() / context
        o.sum().backward()
        step = counter.get_total_flops() / context
    stated = module.attend_flops(context)
    assert forward == pytest.approx(stated[0], rel=0.15)
    assert step == pytest.approx(sum(stated), rel=0.15)


def test_pattern_cycles_over_the_layers():
    config = AttentionConfig(kind="polynomial", pattern=["polysketch", "polysketch", "softmax"])
    assert [config.kind_of_layer(n) for n in range(7)] == [
        "polysketch",
        "polysketch",
        "softmax",
        "polysketch",
        "polysketch",
        "softmax",
        "polysketch",
    ]
    assert AttentionConfig(kind="polynomial").kind_of_layer(5) == "polynomial"


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"kind": "flash"}, "'flash'"),
        ({"pattern": ["softmax", "sofmax"]}, "'sofmax'"),
        ({"block_size": 0}, "0"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        AttentionConfig(**wrong)


@pytest.mark.parametrize(
    "config, wrong, named",
    [
        (KernelConfig, {"feature_map": "cosine"}, "'cosine'"),
        (KernelConfig, {"size": 0}, "size is 0"),
        (FastmaxConfig, {"order": 3}, "order is 3"),
        (PolynomialConfig, {"shift": -0.5}, "polynomial.shift is -0.5"),
        (PolynomialConfig, {"degree": 3}, "degree is 3"),
        (FeedforwardConfig, {"map": "mlp"}, "'mlp'"),
        (FeedforwardConfig, {"layers": 0}, "layers is 0"),
        (FlurkaConfig, {"local": "none"}, "'none'"),
        (FlurkaConfig, {"feature_map": "cosine"}, "flurka.feature_map"),
        (SummariesConfig, {"number": 0}, "number is 0"),
        (SummariesConfig, {"projection": "mean"}, "'mean'"),
    ],
)
def test_wrong_settings_of_kernels_are_named(config, wrong, named):
    with pytest.raises(ValueError, match=named):
        config(**wrong)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"sketch": "count"}, "'count'"),
        ({"shift": -1.0}, "polysketch.shift is -1.0"),
        ({"shift": float("nan")}, "polysketch.shift is nan"),
        ({"shift": 0.0}, "sketch linear needs a constant"),
        ({"size": 1}, "size is 1, too small"),
        ({"sketch": "learned", "size": 1}, "size is 1, too small"),
        ({"size": 0}, "size is 0"),
        ({"expansion": 0}, "expansion is 0"),
        ({"levels": 0}, "levels is 0"),
        ({"local_blocks": 3}, "local_blocks is 3"),
    ],
)
def test_wrong_settings_of_polysketch_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        PolysketchConfig(**wrong)


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


def test_a_gate_without_a_state_is_refused():
    with pytest.raises(ValueError, match="no state to gate"):
        AttentionConfig(kind="softmax", gate="data")
    with pytest.raises(ValueError, match="'open'"):
        AttentionConfig(gate="open")
    AttentionConfig(pattern=["polysketch", "softmax"], gate="data")


def polynomial_weights(module, q, k):  # degree 2 alone has a linear cost
    shift = module.coefficients[1] / 2
    scale = 1 / (2 * HEAD_DIM**0.5) if shift else 1 / HEAD_DIM
    return (scale * (q @ k.mT) + shift).square()


def fastmax_weights(module, q, k):
    s = torch.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    return sum(c * s**power for power, c in enumerate(module.coefficients))


def feedforward_weights(module, q, k):
    return module.phi(q.transpose(1, 2)).transpose(1, 2) @ module.phi(k.transpose(1, 2)).permute(0, 2, 3, 1)


def kernel_weights(module, q, k):
    phi_q, phi_k = (module.feature_map(x.transpose(1, 2), is_query) for x, is_query in ((q, True), (k, False)))
    return phi_q.transpose(1, 2) @ phi_k.permute(0, 2, 3, 1)


WEIGHTS = {  # by kind: the weights of q on k [B, H, T, D], [B, H, T, T], near and far alike
    "polynomial": polynomial_weights,
    "fastmax": fastmax_weights,
    "feedforward": feedforward_weights,
    "kernel": kernel_weights,
}


@pytest.mark.parametrize("variant", [name for name in LINEAR if VARIANTS[name][0] in WEIGHTS])
def test_kernels_weigh_as_defined(variant):
    """Weights made from the map alone and one normaliser; blocks change nothing. Kinds that weigh near and far tokens
    otherwise have tests of their own."""
    module = build(variant).double()
    q, k, v = torch.randn(3, 1, 11, HEADS, HEAD_DIM, dtype=torch.float64)
    o = module.attend(Projected(q, k, v))[0]
    weights = WEIGHTS[VARIANTS[variant][0]](module, q.transpose(1, 2), k.transpose(1, 2)).tril()
    assert (weights >= 0).all()
    offset = {"polynomial-2": 1 / (4 * HEAD_DIM), "polynomial-2-no-shift": HEAD_DIM**-2}.get(variant, 0.0)
    expected = weights @ v.transpose(1, 2) / (offset + weights.sum(-1, keepdim=True))
    torch.testing.assert_close(o, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_normalisation_over_the_sequence_would_leak():
    """What the published fastmax does, and this one does not: a later, longer key changes earlier weights."""
    q, k, v = torch.randn(3, 1, 9, HEADS, HEAD_DIM)
    longer = torch.cat((k[:, :-1], 100 * k[:, -1:]), dim=1)
    module = build("fastmax-2")
    assert torch.equal(module.attend(Projected(q, k, v))[0][:, :-1], module.attend(Projected(q, longer, v))[0][:, :-1])

    def published(k):
        k = k / k.norm(dim=-1).amax(dim=1, keepdim=True)[..., None]
        s = torch.einsum("bthd,bshd->bhts", q, k)
        weights = (1 + s + s.square() / 2).tril()
        return (weights @ v.transpose(1, 2) / weights.sum(-1, keepdim=True)).transpose(1, 2)

    assert not torch.allclose(published(k)[:, :-1], published(longer)[:, :-1], atol=1e-2)
