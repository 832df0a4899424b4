"""linear_cross_entropy, backend="triton", against the float64 definition: loss and both gradients."""

import pytest
import torch
from lcpt_kernels import cross_entropy as module
from lcpt_kernels import linear_cross_entropy, linear_token_losses
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error
from tests.kernels.test_cross_entropy import in_float64
from tests.kernels.triton.conftest import DEVICE

D = 12


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a row."""
    from lcpt_kernels.triton.common import launch_configs

    for others in ("DIFFERENT", "FP32"):
        monkeypatch.setattr(launch_configs, others, {})
    monkeypatch.setitem(launch_configs.TABLE, "cross_entropy", {2**62: (16, 4, 1)})


def inputs(tokens, vocabulary, *, dtype=torch.float32, size=1.0, ignored=0.3):
    hidden, weight = size * torch.randn(tokens, D), torch.randn(vocabulary, D)
    labels = torch.randint(vocabulary, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    labels[0] = vocabulary - 1
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight)), labels.to(DEVICE)


def results(hidden, weight, labels, factor=1.0, backend="triton", **options):
    loss, count = linear_cross_entropy(hidden, weight, labels, backend=backend, **options)
    return loss.detach(), count, *torch.autograd.grad(factor * loss, [hidden, weight])


@pytest.fixture
def agree(started):
    def check(hidden, weight, labels, tolerance=1e-5, z_loss=0.0, factor=1.0):
        loss, count, *found = results(hidden, weight, labels, factor, z_loss=z_loss)
        assert set(started) == {"cross_entropy_kernel"}
        *leaves, expected, of_gradients = in_float64(hidden, weight, labels, z_loss)
        assert count == (labels >= 0).sum() and loss.dtype == torch.float32
        assert relative_error(loss, expected.detach()) < tolerance
        for x, y in zip(found, torch.autograd.grad(factor * of_gradients, leaves), strict=True):
            assert x.dtype == hidden.dtype and relative_error(x, y) < tolerance  # also false for NaN

    return check


@pytest.mark.parametrize("tokens", [1, 5, 11])
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 48, 77])
def test_every_size(agree, tokens, vocabulary):
    agree(*inputs(tokens, vocabulary))


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_chunks(agree, started, monkeypatch, chunk, dtype, tolerance):
    """Of which the last is shorter."""
    monkeypatch.setattr(module, "LOGITS_IN_TRITON", chunk * 37)
    agree(*inputs(10, 37, dtype=dtype), tolerance)
    assert len(started) == {1: 10, 3: 4, 4: 3, 10: 1, 100: 1}[chunk]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("factor", [1.0, 1 / 7])
def test_16_bits(agree, dtype, z_loss, factor):
    agree(*inputs(21, 67, dtype=dtype), 1e-2, z_loss, factor)


@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
def test_z_loss(agree, z_loss):
    agree(*inputs(9, 37), z_loss=z_loss)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits(agree, size):
    agree(*inputs(9, 37, size=size), 3e-5, z_loss=1e-4)


def test_labels_of_32_bits_and_free_strides():
    hidden, weight, labels = inputs(9, 37)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in (hidden, weight)]
    for_all = torch.stack((labels, labels), dim=1).int()[:, 0]
    for x, y in zip(results(*strided, for_all), results(hidden, weight, labels), strict=True):
        torch.testing.assert_close(x, y)


def test_rows_without_a_label_are_not_read():
    """Their logits are NaN."""
    from lcpt_kernels.triton.fused.cross_entropy import losses_and_gradient_in_place, losses_of_logits

    labels = torch.tensor([3, -1, 36, -100], device=DEVICE)
    logits = torch.randn(4, 48, device=DEVICE)
    logits[labels < 0] = torch.nan
    logits[:, 37:] = torch.nan
    expected = torch.nn.functional.cross_entropy(
        logits[:, :37], labels.clamp_min(-1), ignore_index=-1, reduction="none"
    )
    for losses in (losses_of_logits(logits, labels, 37), losses_and_gradient_in_place(logits, labels, 37, 0.1)):
        torch.testing.assert_close(losses, expected)
    assert not logits[labels < 0].any() and logits[labels >= 0, :37].isfinite().all()


def test_no_labels_and_no_tokens():
    hidden, weight, labels = inputs(4, 37)
    loss, count, *gradients = results(hidden, weight, labels.fill_(-1))
    assert loss == 0 and count == 0 and not any(x.any() for x in gradients)
    loss, count, *gradients = results(hidden[:0], weight, labels[:0])
    assert loss == 0 and count == 0 and not any(x.any() for x in gradients)


def test_a_label_outside_the_vocabulary_is_no_number():
    """The host does not look at labels; a loss of NaN is what the training loop notices."""
    hidden, weight, labels = inputs(4, 37)
    labels[2] = 37
    assert linear_cross_entropy(hidden, weight, labels, backend="triton")[0].isnan()


def test_without_gradients(started):
    hidden, weight, labels = inputs(9, 37)
    expected = linear_cross_entropy(hidden, weight, labels, backend="triton")[0].detach()
    with torch.no_grad():
        found, _ = linear_cross_entropy(hidden, weight, labels, backend="triton")
    losses = linear_token_losses(hidden, weight, labels, backend="triton")
    assert started == 3 * ["cross_entropy_kernel"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(losses, linear_token_losses(hidden, weight, labels, backend="torch"))


def test_the_same_bits_twice(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_IN_TRITON", 4 * 37)
    given = inputs(10, 37, dtype=torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(results(*given), results(*given), strict=True))


def test_what_the_operators_say_of_themselves():
    """Shapes and dtypes without computing, and what they change: PyTorch's own checks."""
    import lcpt_kernels.triton.fused.cross_entropy  # noqa: F401, which defines them

    logits, labels = torch.randn(4, 48, device=DEVICE), torch.tensor([3, -1, 36, 0], device=DEVICE)
    torch.library.opcheck(torch.ops.lcpt_kernels.cross_entropy.default, (logits, labels, 37))
    torch.library.opcheck(torch.ops.lcpt_kernels.cross_entropy_.default, (logits, labels, 37, 0.1))


def test_lengths_share_one_graph():
    """Of a vocabulary that is a multiple of 16; others compile in parts."""
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=count)
    for tokens in (4, 5, 7):
        hidden, weight, labels = inputs(tokens, 48)
        found, expected = (
            torch.autograd.grad(function(hidden, weight, labels, backend="triton")[0], [hidden, weight])
            for function in (compiled, linear_cross_entropy)
        )
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert count.frame_count == 2  # for the first length, and for any
