"""Check compiling ahead of time. It changes its process for good, so each test starts its own."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ELU1 = """
from lcpt.benchmarking.fused_steps import steps
from lcpt.benchmarking.compile_only import forward_backward
def work():
    step = steps(warm.LAYER, warm.TOKENS)["elu1"]
    forward_backward(lambda x: step.function(x, backend="triton"), step.inputs)
warm.WORK["fused"] = work
"""


@pytest.fixture
def run(tmp_path):
    """run(program) -> what it prints as JSON, in a process with an empty cache that the test's other processes share;
    the program knows benchmarks/warm.py as `warm`."""

    def call(program):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONPATH": f"{ROOT}:{ROOT}/kernels:{ROOT}/benchmarks",
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        }
        start = "import json, warm\nfrom lcpt.benchmarking.compile_only import compile_only\n"
        done = subprocess.run([sys.executable, "-c", start + program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def cached(tmp_path):
    return {file.name for file in (tmp_path / "cache").glob("*/*.cubin")}


def test_each_part_compiles_its_share(run, tmp_path):
    assert run(f"{ELU1}print(json.dumps(warm.warm(['fused'], 'sm_90', 0, 2)))") == [2, {}]
    assert len(cached(tmp_path)) == 1
    assert run(f"{ELU1}print(json.dumps(warm.warm(['fused'], 'sm_90', 1, 2)))") == [2, {}]
    assert cached(tmp_path) == {"feature_map_forward_kernel.cubin", "feature_map_backward_kernel.cubin"}


def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_compiled(run, tmp_path):
    broken = (
        "from lcpt_kernels.triton.fused import feature_map_forward\n"
        "def run(*args, **kwargs): raise RuntimeError('no\\nsuch thing')\n"
        "feature_map_forward.feature_map_forward_kernel._do_compile = run\n"
    )
    assert run(f"{ELU1}{broken}print(json.dumps(warm.warm(['fused'], 'sm_90', 0, 1)))") == [
        1,
        {"feature_map_forward_kernel": "RuntimeError: such thing"},
    ]
    assert cached(tmp_path) == {"feature_map_backward_kernel.cubin"}


@pytest.mark.slow
def test_other_sizes_start_the_same_kernels(run):
    """All of stage `attention` and `correct`; none is compiled here."""
    more, every = run("""
import torch
torch.set_num_threads(1)
seen = compile_only("sm_90", -1, 2**40)
warm.run_headline(), warm.run_cases()
before = len(seen.kernels)
warm.TOKENS, warm.LAYER = 2048, warm.replace(warm.LAYER, batch=2)
warm.run_headline(), warm.run_cases()
print(json.dumps([len(seen.kernels) - before, before]))
""")
    assert more == 0 and every > 100


def test_the_stage_fused_starts_the_kernels_of_every_feature_map(run):
    """Every pair of formulas, favor with and without its option, affine also of a sketch's width; none is compiled."""
    forward, backward, wanted = run("""
from lcpt_kernels.feature_maps import FEATURE_MAPS
from lcpt_kernels.triton.fused.feature_map_formulas import FORMULAS
seen = compile_only("sm_90", -1, 2**40)
warm.run_fused()
assert not seen.errors
names = [name for name, _ in seen.kernels]
count = lambda part: sum(f"feature_map_{part}_kernel" in name for name in names)
wanted = len({FORMULAS[name] for name in FEATURE_MAPS}) + sum(len(entry.options) for entry in FEATURE_MAPS.values())
print(json.dumps([count("forward"), count("backward"), wanted]))
""")
    assert forward == backward == wanted + 1


def test_what_gpu_sh_warms_is_known():
    text = (ROOT / "benchmarks/gpu.sh").read_text()
    named = [line.split('"$target" ')[1].split() for line in text.splitlines() if "benchmarks/warm.py" in line]
    known = runpy.run_path(str(ROOT / "benchmarks/warm.py"))["WORK"]
    assert len(named) == 3 and {name for names in named for name in names} == known.keys()
