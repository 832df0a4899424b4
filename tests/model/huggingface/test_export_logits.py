"""What transformers computes with an export is what lcpt computes: logits, losses and gradients, in every kind."""

import pytest
import torch
import torch.nn.functional as F

from lcpt.attention import AttentionConfig
from lcpt.attention.feedforward import FeedforwardConfig
from lcpt.attention.flurka import FlurkaConfig
from lcpt.attention.kernel import KernelConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.softmax import SoftmaxConfig
from lcpt.attention.sparse import SparseHashConfig, SparseQKConfig
from lcpt.attention.summaries import SummariesConfig
from lcpt.model.huggingface.export import write_hf_export
from tests.model.conftest import CONFIGS, V, config
from tests.model.huggingface.conftest import load, pad


def of(kind, **options):
    return config(attention=AttentionConfig(kind, block_size=4, **options))


KINDS = CONFIGS | {
    "window": of("softmax", softmax=SoftmaxConfig(window=3)),
    "gates": of("polynomial", gate="data", output_norm=True, polynomial=PolynomialConfig(2)),
    "flurka with a table": of("flurka", gate="scalar", flurka=FlurkaConfig(summaries=SummariesConfig(None, "table"))),
    "favor": of("kernel", kernel=KernelConfig("favor")),
    "learned to keep": of("sparse_qk", sparse_qk=SparseQKConfig("learned", window=2)),
    "learned hash": of("sparse_hash", sparse_hash=SparseHashConfig("learned", buckets=4, window=1)),
    "untied": config(tie_embeddings=False),
}


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_lcpts(make_model, name):
    model, ours = make_model(KINDS[name])
    tokens = torch.randint(V, (3, 19))
    found, expected = model(tokens).logits, ours(tokens)
    assert not model.training and model.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cached = model(tokens, use_cache=True).logits
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flurka", "sparse_qk"])
def test_of_bf16_they_are_those_of_lcpts_model_in_bf16(make_export, name):
    whole, ours = make_export(KINDS[name])
    half = whole.with_name("half")
    write_hf_export(whole.with_name("mine-of-lcpt"), half, dtype="bf16")
    tokens = torch.randint(V, (2, 19))
    expected = ours.bfloat16()(tokens)
    for model in (load(half), load(whole).to(torch.bfloat16), load(whole, dtype=torch.bfloat16)):
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(tokens).logits, expected)
    assert load(whole).dtype == torch.float32


@pytest.mark.parametrize("name", ["polysketch", "feedforward", "qwen3"])
def test_loss_and_every_gradient_are_those_of_shifted_labels(make_model, name):
    """-100 counts nothing, and a kind's auxiliary loss gives gradients, as in lcpt's training."""
    model, ours = (x.double().train() for x in make_model(KINDS[name]))
    tokens = torch.randint(V, (3, 19))
    labels = tokens.clone()
    labels[0, 5:9] = labels[2, :7] = -100
    output = model(tokens, labels=labels)
    output.loss.backward()
    total, count = ours(tokens, F.pad(labels[:, 1:], (0, 1), value=-100))
    (total / count).backward()
    assert output.logits.shape == (3, 19, V)
    torch.testing.assert_close(output.loss.double(), (total / count).double(), rtol=1e-5, atol=0)  # summed in fp32
    expected = dict(ours.named_parameters())
    for key, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-7, msg=key)


def test_an_auxiliary_loss_is_in_the_gradient(make_model):
    """Or the test above compares nothing where there is none."""
    model, _ = make_model(of("feedforward", feedforward=FeedforwardConfig(penalty=50.0)))
    tokens = torch.randint(V, (1, 19))
    norms = []
    for mode in (True, False):
        model.zero_grad()
        model.train(mode)(tokens, labels=tokens).loss.backward()
        norms.append(sum(p.grad.norm() for p in model.parameters()))
    assert norms[0] > 1.5 * norms[1]


@pytest.mark.parametrize("name", ["polysketch", "softmax", "sparse_qk", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_model, name, side):
    """On either side, in a batch of unlike lengths: logits, loss and gradients of each row alone."""
    model, ours = (x.double() for x in make_model(KINDS[name]))
    rows = [torch.randint(V, (length,)) for length in (5, 13, 13, 1, 9)]
    tokens, mask = pad(rows, side, 13, 3), pad([torch.ones_like(row) for row in rows], side, 13, 0)
    labels = pad(rows, side, 13, -100)
    output = model(tokens, mask, labels=labels)
    output.loss.backward()
    found, expected = output.logits[mask.bool()].split([len(row) for row in rows]), [ours(row[None])[0] for row in rows]
    total = 0.0
    for row, logits, alone in zip(rows, found, expected, strict=True):
        torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)
        total = total + F.cross_entropy(alone[:-1], row[1:], reduction="sum")
    (total / sum(len(row) - 1 for row in rows)).backward()
    gradients = dict(ours.named_parameters())
    for key, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-7, msg=key)


def test_autocast_changes_nothing(make_model):
    """lcpt computes in the dtype of its weights, and transformers' Trainer may ask for autocast."""
    model, _ = make_model(KINDS["nothing by default"])
    tokens = torch.randint(1, V, (2, 9))
    expected = model(tokens, labels=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, labels=tokens)
        continued = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(continued, model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_logits_of_some_positions(make_model):
    model, _ = make_model()
    tokens = torch.randint(V, (2, 9))
    whole = model(tokens).logits
    for kept in (1, 4):
        torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, whole[:, -kept:])
    chosen = torch.tensor([0, 7])
    torch.testing.assert_close(model(tokens, logits_to_keep=chosen).logits, whole[:, chosen])
    assert torch.equal(model(tokens, return_dict=False)[0], whole)


@pytest.mark.parametrize(
    "mask, named",
    [
        ([[1, 1, 0, 1], [1, 1, 1, 1]], "attention_mask has a hole; padding stands before"),
        ([[1, 1, 1], [1, 1, 1]], r"attention_mask is \[2, 3\]; it must be that of input_ids, \[2, 4\]"),
    ],
    ids=["hole", "shape"],
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_that_is_no_padding_is_refused(make_model, mask, named, use_cache):
    model, _ = make_model()
    with pytest.raises(ValueError, match=named):
        model(torch.randint(V, (2, 4)), torch.tensor(mask), use_cache=use_cache)


def test_what_is_not_there_is_refused(make_model):
    model, _ = make_model()
    with pytest.raises(TypeError, match="position_ids"):  # such as those of packed documents
        model(torch.randint(V, (2, 4)), position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match="vocabulary is that of its tokenizer"):
        model.resize_token_embeddings(99)
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.activation_checkpointing_enable()
