"""Packed documents: each is computed as if it were alone, in every kind, and the host reads no offset on a device.

There is no GPU in these tests. Tensors on "meta" take the paths of a GPU and have no number that a host could read.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from lcpt.attention import ATTENTION, AttentionConfig, sparse
from lcpt.attention.base import LinearCost
from lcpt.attention.feedforward import FeedforwardConfig
from lcpt.attention.flurka import FlurkaConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.softmax import SoftmaxConfig
from lcpt.attention.sparse import SparseHashConfig, SparseQKConfig
from lcpt.model import GPT, ModelConfig

V, BLOCK = 50, 4
LENGTHS = [1, BLOCK, 2, 0, 3 * BLOCK + 1, BLOCK + 1, 7, 2 * BLOCK]  # the last one fills its blocks
T, ENTRIES = sum(LENGTHS), len(LENGTHS) + 4
OWN = {  # options of a kind that change how it treats documents
    "softmax-window": ("softmax", {"softmax": SoftmaxConfig(window=3)}),
    "polynomial-2": ("polynomial", {"polynomial": PolynomialConfig(degree=2)}),
    "polysketch-2-blocks": ("polysketch", {"polysketch": PolysketchConfig(size=8, local_blocks=2)}),
    "flurka-linear": ("flurka", {"flurka": FlurkaConfig(local="linear")}),
    "feedforward-2": ("feedforward", {"feedforward": FeedforwardConfig(layers=2)}),
    "sparse_qk-learned": ("sparse_qk", {"sparse_qk": SparseQKConfig(keep="learned")}),
    "sparse_hash-learned": ("sparse_hash", {"sparse_hash": SparseHashConfig(hash="learned", window=3)}),
    "hybrid": ("polysketch", {"pattern": ["polysketch", "softmax", "flurka"]}),
}
CASES = {kind: (kind, {}) for kind in ATTENTION} | OWN
IN_BATCH = ["sparse_qk-learned", "sparse_hash-learned"]  # are pulled towards a share of all tokens of a batch


def attention_config(case) -> AttentionConfig:
    kind, own = CASES[case]
    own = {"polysketch": PolysketchConfig(size=8), **own}
    config = AttentionConfig(kind=kind, block_size=BLOCK, **own)
    if issubclass(config.attention_of_layer(0), LinearCost):
        config.gate = "data"
    return config


def build(case, **changes) -> GPT:
    """A model whose gates, shifts and balances are not those of the start."""
    attention = attention_config(case)
    shape = {"n_layers": len(attention.pattern) or 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "vocab_size": V}
    torch.manual_seed(0)
    model = GPT(ModelConfig(**shape | {"attention": attention} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def offsets(lengths):
    """int32, the last one repeated to a fixed number of entries, as the training loop does."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.pad(ends, (0, ENTRIES - len(ends)), value=int(ends[-1]))


def text(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def labels_of(x):
    """The next token, and none at some places."""
    return x.roll(-1, 1).masked_fill(x % 5 == 0, -1)


def gradients(model, loss):
    weights = list(model.parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm().clamp(min=1e-3)


@pytest.mark.parametrize("recompute", [False, "selective", True, "offload"])
@pytest.mark.parametrize("case", CASES)
def test_documents_are_as_if_alone(case, recompute, monkeypatch):
    """Loss, count and the gradient of every weight are the sums over documents that are run one at a time."""
    if case in IN_BATCH:
        monkeypatch.setattr(sparse, "AUX_LOSS_WEIGHT", 0.0)
    monkeypatch.setattr("lcpt.model.feed_forward.PIECE", 9)
    model, x = build(case, activation_checkpointing=recompute).double(), text(1, T)
    labels, documents = labels_of(x), [n for n in LENGTHS if n]
    loss, count = model(x, labels=labels, cu_seqlens=offsets(LENGTHS))
    alone = [model(a, labels=b) for a, b in zip(x.split(documents, 1), labels.split(documents, 1), strict=True)]
    expected = sum(loss for loss, _ in alone)
    assert count == sum(count for _, count in alone)
    same([loss], [expected], 1e-6)
    same(gradients(model, loss), gradients(model, expected), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_document_changes_no_other(case):
    """Logits of the other documents stay the same to the last bit; its own change from its first token on."""
    model, x = build(case), text(1, T)
    ends = offsets(LENGTHS)
    with torch.no_grad():
        before = model(x, cu_seqlens=ends)
        for start, stop in ((1, 5), (7, 20)):
            changed = x.clone()
            changed[:, start:stop] = (x[:, start:stop] + 1) % V
            after = model(changed, cu_seqlens=ends)
            assert torch.equal(before[:, :start], after[:, :start])
            assert torch.equal(before[:, stop:], after[:, stop:])
            assert (before[:, start:stop] != after[:, start:stop]).any(-1).all()


@pytest.mark.parametrize("case", IN_BATCH)
def test_shares_are_of_the_micro_batch(case):
    """The pull towards a share is by all tokens of a micro-batch, packed or not: a row of equal documents has the
    gradients of a batch of them. It is no sum over documents alone."""
    model, x = build(case).double(), text(5, 7)
    labels = labels_of(x)
    batch, _ = model(x, labels=labels)
    packed, _ = model(x.view(1, -1), labels=labels.view(1, -1), cu_seqlens=offsets([7] * 5))
    same([packed], [batch], 1e-6)
    expected = gradients(model, batch)
    same(gradients(model, packed), expected, 1e-6)
    alone = gradients(model, sum(model(a[None], labels=b[None])[0] for a, b in zip(x, labels, strict=True)))
    assert max((a - b).norm() / b.norm() for a, b in zip(alone, expected, strict=True)) > 1e-3


def test_learned_positions_begin_anew():
    """A row of documents may be longer than the positions; a document may not."""
    attention = AttentionConfig("softmax", key_shift=False, qk_norm="none")
    model = build("softmax", positions="learned", max_positions=max(LENGTHS), attention=attention).double()
    x = text(1, T)
    alone = [model(document) for document in x.split([n for n in LENGTHS if n], 1)]
    torch.testing.assert_close(model(x, cu_seqlens=offsets(LENGTHS)), torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"a sequence of {max(LENGTHS) + 1} tokens exceeds model.max_positions"):
        model(x, cu_seqlens=offsets([max(LENGTHS) + 1, 13, 13]))


def test_compiled_blocks_serve_every_batch():
    """On a CPU the loop over documents is outside the graphs, which do not depend on the offsets."""
    torch._dynamo.reset()
    eager, compiled = (build("polysketch", n_layers=1) for _ in range(2))
    count = CompileCounterWithBackend("aot_eager")
    for block in compiled.blocks:
        block.forward = torch.compile(block.forward, backend=count)
    x, graphs = text(1, T), []
    for lengths in (LENGTHS, [T], [3] * 8 + [T - 24]):
        losses = [model(x, labels=labels_of(x), cu_seqlens=offsets(lengths))[0] for model in (eager, compiled)]
        same(losses[1:], losses[:1], 1e-6)
        same(gradients(compiled, losses[1]), gradients(eager, losses[0]), 1e-5)
        graphs.append(count.frame_count)
    assert graphs[0] == graphs[-1] > 0


def on_device(case, dtype, **changes):
    """A model, tokens and offsets on "meta"."""
    with torch.device("meta"):
        model = build(case, **changes).to(dtype)
        return model, torch.zeros(1, T, dtype=torch.int64), torch.zeros(ENTRIES, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_host_reads_nothing_on_a_device(case, dtype):
    """In a step, whatever is recomputed in backward: a read of a tensor on "meta" is an error."""
    for recompute in (False, "selective", True, "offload"):
        model, x, ends = on_device(case, dtype, activation_checkpointing=recompute)
        loss, _ = model(x, labels=x, cu_seqlens=ends)
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


class BodiesOfOperators(TorchDispatchMode):
    """Runs what an operator of ours does, up to the start of its kernels, and not only what it says of its results."""

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lcpt_kernels":
            self.ran.add(func.name())
            OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["hybrid", "lowrank", "sparse_hash"])
def test_the_host_reads_nothing_to_start_kernels(case, monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: None)
    model, x, ends = on_device(case, torch.bfloat16)
    with BodiesOfOperators() as operators:
        model(x, labels=x, cu_seqlens=ends)[0].backward()
    assert {
        "lcpt_kernels::block_causal_attention_backward",
        "lcpt_kernels::interval_attention_backward",
    } & operators.ran


def test_the_host_reads_nothing_of_learned_positions():
    attention = AttentionConfig("softmax", key_shift=False, qk_norm="none")
    model, x, ends = on_device(
        "softmax", torch.bfloat16, positions="learned", max_positions=max(LENGTHS), attention=attention
    )
    model(x, labels=x, cu_seqlens=ends)[0].backward()


@pytest.mark.parametrize("case", ["softmax", "softmax-window", "polynomial", "sparse_hash"])
def test_on_a_device_a_block_is_one_graph(case):
    torch._dynamo.reset()
    model, x, ends = on_device(case, torch.bfloat16)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    model(x, labels=x, cu_seqlens=ends)[0].backward()
