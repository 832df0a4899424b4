"""benchmarks/gpu.sh with the tools themselves, on a CPU at sizes for it, in processes that lack some modules."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Of an option that is given twice the last counts.
PYTHON = """#!/bin/bash
real="REAL"; small="--contexts 64,32 --tokens 64 --repeats 1"
case $1 in
    benchmarks/gpu_imports.py) exec $real FOLDER/with_gpu.py "$@" ;;
    benchmarks/check_kernels.py) export TRITON_INTERPRET=1
        exec $real "$@" --small --only "pieces=(256" --repeats 1 --processes 1 ;;
    tools/benchmark_attention.py)
        exec $real "${@//sdpa_flash,sdpa_cudnn*/sdpa_cpu}" $small --device cpu --heads 1 --head-dim 16 --dtype fp32 ;;
    tools/benchmark_training.py) exec $real "$@" $small --configs $CONFIG --sdpa flash ;;
    benchmarks/fused.py) exec $real "$@" --tokens 8192 --heads 1 --only elu1 ;;
    *) exit 9 ;;
esac
"""
WITH_GPU = """
import runpy, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA Test (1)"
torch.cuda.get_device_capability = lambda: (9, 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT = """
import os
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name in os.environ["WITHOUT"].split() else found(name, *more)
"""


@pytest.fixture
def gpu(tmp_path):
    """gpu(run, stages, without) -> (exit code, stdout, stderr, name of a file in the archive -> its text)."""
    files = {
        "python": PYTHON.replace("REAL", sys.executable).replace("FOLDER", str(tmp_path)),
        "with_gpu.py": WITH_GPU,
        "site/sitecustomize.py": WITHOUT,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "python").chmod(0o755)

    def call(run, stages, without, **environment):
        given = {
            "PYTHON": str(tmp_path / "python"),
            "PYTHONPATH": str(tmp_path / "site"),
            "STAGES": stages,
            "WITHOUT": without,
            "RESULTS": str(tmp_path / "results"),
            "OUT": str(tmp_path / "out"),
        }
        done = subprocess.run(
            [ROOT / "benchmarks/gpu.sh", run], env=os.environ | given | environment, capture_output=True, text=True
        )
        name = f"gpu-{run}-nvidia-test-1"
        with tarfile.open(tmp_path / f"out/{name}.tar.gz") as archive:
            members = {
                member.name.removeprefix(f"{name}/"): archive.extractfile(member).read()
                for member in archive
                if member.isfile()
            }
        return done.returncode, done.stdout, done.stderr, members

    return call


def test_quick_needs_few_modules(gpu):
    code, out, err, files = gpu(
        "quick", "correct attention", "omegaconf sentencepiece matplotlib fla deepspeed datasets zstandard tensorboard"
    )
    assert (code, err) == (0, ""), out
    assert "missing import: matplotlib; attention can do less: WHEELS=FOLDER brings it\n" in out
    correct, attention = (json.loads(files[f"{stage}.json"]) for stage in ("correct", "attention"))
    assert correct["rows"] and all(row["passed"] for row in correct["rows"])
    assert [(row["context"], row["mode"], row["method"]) for row in attention["rows"]] == [
        (context, mode, method)
        for context in (64, 32)
        for mode in ("forward", "forward_backward")
        for method in ("squared", "polysketch", "sdpa_cpu")
    ]
    assert files.keys() == {
        "stages.txt",
        *(
            f"{stage}.{end}"
            for stage, end in [
                ("correct", "json"),
                ("correct", "log"),
                ("attention", "json"),
                ("attention", "md"),
                ("attention", "log"),
            ]
        ),
    }


@pytest.mark.slow
def test_full_does_without_a_stage_that_lacks_a_module(gpu):
    code, out, err, files = gpu("full", "training sparse-8 fused", "sentencepiece datasets deepspeed")
    assert code == 1 and err.startswith("error: failed: training (no sentencepiece); ")
    assert "missing import: sentencepiece; training cannot run: WHEELS=FOLDER brings it\n" in out
    assert {"sparse-8.json", "sparse-8.png", "fused.json", "stages.txt"} < files.keys()
    assert "training.json" not in files and b"missing import: sentencepiece" in files["stages.txt"]
    assert json.loads(files["sparse-8.json"])["rows"][0]["settings"]["buckets"] == 8


def test_training_needs_no_more_than_is_checked(gpu, tiny_yaml, tmp_path):
    (tmp_path / "tiny.yaml").write_text("run: {dir: unused}\n" + tiny_yaml.read_text())
    code, out, err, files = gpu(
        "full",
        "training",
        "matplotlib fla deepspeed datasets zstandard tensorboard",
        CONFIG=str(tmp_path / "tiny.yaml"),
    )
    assert (code, err) == (0, ""), out
    assert [row["context"] for row in json.loads(files["training.json"])["rows"]] == [64, 64, 32, 32]
