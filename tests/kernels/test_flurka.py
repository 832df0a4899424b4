"""flurka_attention: its own definition; gates, states and packing are in test_streaming.py with the other families'."""

import re

import pytest
import torch
from lcpt_kernels import feature_attention, flurka_attention

from tests.kernels.conftest import relative_error, results


def inputs(t, *, c, r=3, b=2, h=4, hkv=2, d=8, dv=5, m=6, gated=False, massive=False, dtype=torch.float64):
    torch.manual_seed(0)
    n = t // c * r
    made = {
        "q": torch.randn(b, t, h, d),
        "k": torch.randn(b, t, hkv, d),
        "v": torch.randn(b, t, hkv, dv),
        "phi_q": torch.rand(b, t, h, m),
        "phi_summary": torch.rand(b, n, hkv, m),
        "v_summary": torch.randn(b, n, hkv, dv),
    }
    if massive:
        made["mass_summary"] = torch.rand(b, n, hkv)
    if gated:
        made["log_gate"] = -0.3 * torch.rand(b, t, hkv)
    return {name: x.to(dtype) for name, x in made.items()}


@pytest.mark.parametrize("local", ["softmax", "linear"])
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("t", [1, 5, 6, 7, 24, 31])
def test_agrees_with_the_definition(agree, local, local_blocks, t):
    given = inputs(t, c=6, gated=True, massive=True)
    if local == "linear":
        given |= {"q": given["q"].abs(), "k": given["k"].abs()}
    given["gain"] = torch.rand(4, dtype=torch.float64) + 0.5
    agree(flurka_attention, given, 1e-10, block_size=6, local=local, local_blocks=local_blocks, offset=0.7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"local": "linear"},
        {"local": "linear", "scale": 0.3},
    ],
    ids=str,
)
def test_without_gate_gain_or_mass(agree, options):
    given = inputs(31, c=6)
    if options.get("local") == "linear":
        given |= {"q": given["q"].abs(), "k": given["k"].abs()}
    agree(flurka_attention, given, 1e-10, block_size=6, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_precision(agree, dtype, tolerance):
    agree(flurka_attention, inputs(300, c=32, r=8, d=64, dv=64, m=64, dtype=dtype), tolerance, block_size=32)


@pytest.mark.parametrize("norm", [1e-3, 30.0])
def test_large_norms_stay_finite(agree, norm):
    """Scores up to some 2,000: without M, exp would overflow; under a strong gate the row's greatest may have faded."""
    given = inputs(64, c=8, gated=True, dtype=torch.float32)
    given |= {"q": norm * given["q"], "k": norm * given["k"]}
    o, _ = flurka_attention(**given, block_size=8)
    assert o.isfinite().all()
    if norm < 1:
        agree(flurka_attention, given, 1e-5, block_size=8)


def test_a_faded_maximum_is_no_maximum():
    """The first token's score is enormous, and then the gate shuts: what follows is as if it were not there."""
    given = inputs(8, c=8, gated=True, dtype=torch.float32)
    given["k"][:, 0] = 50.0 * given["q"][:, 1, ::2]
    given["log_gate"][:, 1] = -300
    whole, _ = flurka_attention(**given, block_size=8)
    later = {name: x[:, 1:] if x.shape[1] == 8 else x[:, :0] for name, x in given.items()}
    alone, _ = flurka_attention(**later, block_size=8)
    torch.testing.assert_close(whole[:, 1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [-300.0, -95.0, -70.0, 95.0, 300.0])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("gated, state", [(False, 1.0), (True, 1e-30), (True, 0.0)])
def test_scores_that_exp_does_not_hold(level, backend, gated, state):
    """All local scores around `level`: alone in its row, a token's own value is what it gets, whatever its score."""
    given = inputs(33, c=8, gated=gated, dtype=torch.float32)
    given["q"][..., 0], given["k"][..., 0] = 1.0, level
    given["phi_q"] *= state
    options = {"block_size": 8, "scale": 1.0}
    found = results(flurka_attention, given, torch.ones_like(given["q"][..., :5]), options | {"backend": backend})
    exact = {name: x.double() for name, x in given.items()}
    expected = results(flurka_attention, exact, torch.ones(2, 33, 4, 5), options | {"backend": "reference"})
    assert all(x.isfinite().all() for x in found.values())
    assert torch.equal(found["o"][:, 0], given["v"][:, 0].repeat_interleave(2, dim=1))
    for name in ("o", "q", "k", "v"):  # fp32 rounds a score of 300 by 1.5e-5
        assert relative_error(found[name], expected[name]) < 2e-4, name


def test_a_faint_state_beside_faint_scores(agree):
    """Local and state weights of some 10⁻³⁰: neither is above the smallest number, and their ratio is what counts."""
    given = inputs(33, c=8, dtype=torch.float32)
    given["q"][..., 0], given["k"][..., 0] = 1.0, -70.0
    given["phi_q"] *= 1e-30
    agree(flurka_attention, given, 1e-4, block_size=8, scale=1.0)


def test_every_token_its_own_summary_is_feature_attention():
    """r = c and P = I: FLuRKA's kernel constituent, whatever the blocks."""
    torch.manual_seed(0)
    phi_q, phi_k = torch.rand(2, 30, 4, 6).double(), torch.rand(2, 30, 2, 6).double()
    v, gate = torch.randn(2, 30, 2, 5).double(), -0.2 * torch.rand(2, 30, 2).double()
    expected, _ = feature_attention(phi_q, phi_k, v)
    for c, local_blocks in ((6, 1), (6, 2), (8, 2), (64, 1)):
        whole = 30 // c * c
        o, _ = flurka_attention(
            phi_q,
            phi_k,
            v,
            phi_q,
            phi_k[:, :whole],
            v[:, :whole],
            local="linear",
            block_size=c,
            local_blocks=local_blocks,
        )
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    # With a gate, what faded inside a block is the caller's to say.
    expected, _ = feature_attention(phi_q, phi_k, v, log_gate=gate)
    G = gate.unflatten(1, (5, 6)).cumsum(2)
    faded = (G[:, :, -1:] - G).exp().flatten(1, 2)
    o, _ = flurka_attention(
        phi_q,
        phi_k,
        v,
        phi_q,
        phi_k,
        v * faded[..., None],
        mass_summary=faded,
        local="linear",
        log_gate=gate,
        block_size=6,
    )
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def test_mass_and_gain_by_hand():
    """One head, two blocks and a token more, r = 1: the weight of a block is gain · c · φ(q)·φ(k̃)."""
    given = inputs(5, c=2, r=1, b=1, h=1, hkv=1)
    gain = torch.tensor([0.4], dtype=torch.float64)
    o, _ = flurka_attention(**given, gain=gain, block_size=2, local_blocks=2, offset=0.3)
    q, k, v, phi_q, phi_k, v_state = (x[0, :, 0] for x in given.values())
    local = (q[4] @ k[2:].T / 8**0.5).exp()
    state = 0.4 * 2 * (phi_q[4] @ phi_k[:1].T)
    expected = (local @ v[2:] + state @ v_state[:1]) / (0.3 + local.sum() + state.sum())
    torch.testing.assert_close(o[0, 4, 0], expected)


def test_gain_of_heads_that_share_keys():
    given, gain = inputs(31, c=6, massive=True), torch.rand(4, dtype=torch.float64) + 0.5
    alone = {name: x if x.shape[2] == 4 else x.repeat_interleave(2, dim=2) for name, x in given.items()}
    shared, _ = flurka_attention(**given, gain=gain, block_size=6)
    torch.testing.assert_close(flurka_attention(**alone, gain=gain, block_size=6)[0], shared)


def test_gradcheck():
    given = inputs(9, c=2, r=2, b=1, h=2, hkv=1, d=3, dv=2, m=2, gated=True, massive=True)
    names = list(given)

    def run(*tensors):
        return flurka_attention(**dict(zip(names, tensors, strict=True)), block_size=2, offset=0.5)[0]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in given.values()])


def test_poisoned_memory(agree, poisoned):
    agree(flurka_attention, inputs(33, c=6, gated=True), 1e-10, block_size=6)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"local": "polynomial"}, "polynomial"),
        ({"phi_summary": torch.ones(2, 16, 2, 6).double()}, "16 rows"),
        ({"v_summary": torch.ones(2, 15, 2, 4).double()}, "v_summary is (2, 15, 2, 4)"),
        ({"mass_summary": torch.ones(2, 15, 3).double()}, "(2, 15, 3)"),
        ({"block_size": 0}, "block_size 0"),
        ({"summaries": 0}, "summaries 0"),
        ({"phi_summary": torch.ones(2, 0, 2, 6).double()}, "no rows; 5 whole blocks of 6 tokens"),
        ({"summaries": 2}, "15 rows; 2 summaries of each of 5 whole blocks of 6 tokens are 10"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        flurka_attention(**({**inputs(31, c=6), "block_size": 6} | change))


def test_documents_may_leave_summaries_over():
    ends, given = torch.tensor([0, 6, 10, 23, 26]), inputs(26, c=6, b=1, gated=True, massive=True)
    less = {name: x[:, : 3 * 3] if "summary" in name else x for name, x in given.items()}
    expected, _ = flurka_attention(**less, block_size=6, cu_seqlens=ends)
    for more in (given, less):
        found, _ = flurka_attention(**more, block_size=6, cu_seqlens=ends, summaries=3)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="phi_summary has 9 rows; 3 summaries of every whole block of 6 tokens are 12"):
        flurka_attention(**less, block_size=6, cu_seqlens=torch.tensor([0, 26]), summaries=3)
