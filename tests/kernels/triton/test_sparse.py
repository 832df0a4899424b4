"""sparse_attention, backend="triton", against the definition: output and every gradient."""

import pytest
import torch
from lcpt_kernels import sparse_attention

from tests.kernels.triton.conftest import DEVICE

T = 75  # over several small tiles of 32 queries, or of 16 keys


@pytest.fixture
def agree(agree_in_intervals, small_tiles):
    return agree_in_intervals(sparse_attention)


def inputs(t, *, past=0, b=1, h=1, hkv=None, d=16, dv=16, seed=0):
    torch.manual_seed(seed)
    hkv = hkv or h
    shapes = {"q": (b, t, h, d), "k": (b, past + t, hkv, d), "v": (b, past + t, hkv, dv)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def shapes(given):
    return {name: (*given[name].shape[:2], given["q"].shape[2]) for name in "qk"}


def kept(given, share=0.5):
    return {f"{name}_keep": (torch.rand(shape) < share).to(DEVICE) for name, shape in shapes(given).items()}


def hashed(given, buckets=3):
    return {f"{name}_bucket": torch.randint(buckets, shape).int().to(DEVICE) for name, shape in shapes(given).items()}


MARKS = {"none": lambda given: {}, "kept": kept, "hashed": hashed,
         "both": lambda given: kept(given, 0.8) | hashed(given, 2),
         "queries": lambda given: {"q_keep": kept(given)["q_keep"]},
         "keys": lambda given: {"k_keep": kept(given)["k_keep"]}}


@pytest.mark.parametrize("past", [0, 37])
@pytest.mark.parametrize("t", [1, 33, T])
@pytest.mark.parametrize("marks", ["none", "kept", "both"])
def test_every_length(agree, marks, t, past):
    given = inputs(t, past=past)
    agree(given, **MARKS[marks](given))


@pytest.mark.parametrize("shape", [
    {"h": 4, "hkv": 2}, {"h": 3, "hkv": 1}, {"b": 2}, {"d": 32, "dv": 48}, {"d": 7, "dv": 2}, {"d": 2, "dv": 20},
], ids=str)
@pytest.mark.parametrize("marks", MARKS)
def test_shapes(agree, marks, shape):
    given = inputs(40, **shape)
    agree(given, **MARKS[marks](given))
