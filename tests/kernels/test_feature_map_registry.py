"""A feature map without Triton formulas, without rows of the kernel report or without a benchmark fails here."""

import inspect

import pytest
import torch
from lcpt_kernels.feature_maps import FEATURE_MAPS

from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.fused_steps import steps

pytest.importorskip("triton")
from lcpt_kernels.triton.fused.feature_map_formulas import FORMULAS, Formulas
from lcpt_kernels.triton.report import compile_cases, compile_report


def test_every_map_has_triton_formulas():
    assert FORMULAS.keys() == FEATURE_MAPS.keys()
    for name, formulas in FORMULAS.items():
        assert isinstance(formulas, Formulas), name
        forward, backward = (list(inspect.signature(f.fn).parameters) for f in formulas[:2])
        assert forward == ["z", "g", "x", "PEAK", "D", "M"], name
        assert backward == ["d", "d_second", *forward], name


def test_every_map_is_in_the_kernel_report():
    assert {settings["map"] for settings in compile_cases.SETTINGS if settings["of"] == "map"} == set(FEATURE_MAPS)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_report_compiles_the_formulas_of_the_map(name):
    launches = compile_report.launches("sm_90", of="map", head_dim=64, map=name)
    formulas = [compile_report.constexpr_values(launch)["FORMULA"] for launch in launches]
    assert formulas == list(FORMULAS[name][:2])


def test_every_map_is_in_the_fused_benchmark():
    """And so in the stage `fused` of benchmarks/warm.py, which goes through the same steps."""
    layer = Layer(batch=1, heads=2, head_dim=16, dtype=torch.float32, device=torch.device("meta"))
    timed = steps(layer, 32, block_size=16, summaries=4, sketch=8)
    for name, entry in FEATURE_MAPS.items():
        wanted = {f"{name}, keys", f"{name}, queries"} if entry.options else {name}
        assert wanted <= timed.keys()
        assert all(len(timed[step].inputs) == 1 + len(entry.matrices) for step in wanted)
