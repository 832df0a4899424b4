"""The examples of docs/attention-modules.md, executed in their order; and what the page's table says of arguments."""

import inspect
import re
from pathlib import Path

import lcpt_kernels
import pytest
import torch

from lcpt.attention import AttentionConfig, SoftmaxConfig, build_attention
from lcpt.attention.base import LinearCost

PAGE = (Path(__file__).parents[2] / "docs/attention-modules.md").read_text()


def test_the_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "docs/attention-modules.md", "exec"), names)
    assert len(blocks) == 6
    built = {type(layer) for layer in names["layers"].values()}
    assert len(built) == len(names["layers"]) - 1  # two are the same kind, one of them with a gate


def test_its_options_and_arguments_are_there():
    options = re.search(r"\| option .*?\n\n", PAGE, re.DOTALL).group()
    fields = AttentionConfig.__dataclass_fields__
    named = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", options, re.MULTILINE)
    assert all(name in fields for row in named for name in re.findall(r"\w+", row)) and len(named) == 6
    ours = {
        name
        for f in map(vars(lcpt_kernels).get, lcpt_kernels.__all__)
        if inspect.isfunction(f)
        for name in inspect.signature(f).parameters
    }
    for name in ("scale", "window", "cu_seqlens", "log_gate", "initial_state", "output_final_state", "block_size"):
        assert f"`{name}`" in PAGE and name in ours


def test_a_layer_has_the_class_that_its_options_ask_for():
    assert type(build_attention("softmax", 32, 2, softmax=SoftmaxConfig(window=4))).__name__ == "WindowSoftmax"
    layer = build_attention("kernel", 32, 4, 2, head_dim=6)
    assert isinstance(layer, LinearCost) and layer.qkv.weight.shape == ((4 + 2 * 2) * 6, 32)
    assert build_attention("softmax", 32, 2)(torch.randn(1, 5, 32), None).shape == (1, 5, 32)


@pytest.mark.parametrize(
    "arguments, options, said",
    [
        (("softmaxx", 32, 2), {}, "knows no kind 'softmaxx'"),
        (("softmax", 32, 3), {}, "d_model 32 is no multiple of 2 · n_heads = 6"),
        (("softmax", 32, 4, 3), {}, "n_heads 4 is no multiple of n_kv_heads 3"),
        (("softmax", 32, 4, 0), {}, "n_heads 4 is no multiple of n_kv_heads 0"),
        (("softmax", 32, 4), {"gate": "data"}, "have no state to gate"),
    ],
)
def test_what_does_not_fit_is_named(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        build_attention(*arguments, **options)
