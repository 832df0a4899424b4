import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

triton = pytest.importorskip("triton")
from lcpt_kernels.triton.common import launch_configs  # noqa: E402
from lcpt_kernels.triton.report import compile_report as report  # noqa: E402

from tests.tools.pipelined_kernel import pipelined_kernel  # noqa: E402

ROW = {
    "kernel": "block_forward_kernel",
    "settings": {"head_dim": 64, "features": 16, "BM": 128, "num_warps": 8},
    "target": "sm_90",
    "triton": triton.__version__,
    "registers": 120,
    "spill_bytes": 0,
    "shared_bytes": 59392,
    "tensor_core_ops": 21,
    "wgmma_serialized": False,
    "wgmma_hazards": 0,
    "loops": [
        {"instructions": 192, "tensor_clocks": 128, "special_clocks": 0},
        {"instructions": 40, "tensor_clocks": 0, "special_clocks": 8},
    ],
    "outside_loops": {"instructions": 800, "tensor_clocks": 320, "special_clocks": 16},
    "occupancy": 2,
}


@pytest.fixture
def rows(monkeypatch):
    """rows(*rows): what the tool is told instead of compiling."""

    def tell(*rows):
        def of_part(target, part, parts, keep):
            return [row for row in rows if row["target"] == target][part::parts]

        monkeypatch.setattr(report, "rows", of_part)
        monkeypatch.setattr(
            "lcpt.commands.kernel_report.ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n)
        )

    return tell


def test_a_report_without_faults_exits_with_0(call_tool, rows, tmp_path):
    rows(ROW, ROW | {"target": "sm_80", "spill_bytes": 36})
    output = tmp_path / "new/kernels.json"
    code, out, err = call_tool("kernel_report", "--targets", "sm_80,sm_90", "--output", output)
    written = json.loads(output.read_text())
    assert code == 0 and "error" not in err and written["schema_version"] == 1
    assert {"versions", "command", "rows"} <= written.keys()
    assert [row["target"] for row in written["rows"]] == ["sm_80", "sm_90"] and written["rows"][1] == ROW
    assert "block_forward_kernel" in out and "59,392" in out and "BM=128" in out
    assert "issue/tensor" in out and " 1.5 " in out


@pytest.mark.parametrize(
    "change, named",
    [
        ({"spill_bytes": 36}, "36 bytes spilled"),
        ({"wgmma_serialized": True}, "wgmma serialised"),
        ({"wgmma_hazards": 13}, "13 instructions overwrite registers of an unfinished wgmma"),
        ({"occupancy": 0, "shared_bytes": 250_000}, "250000 bytes of shared memory"),
    ],
)
def test_a_fault_on_sm_90_is_named(call_tool, rows, tmp_path, change, named):
    rows(ROW | change)
    code, _, err = call_tool("kernel_report", "--targets", "sm_90", "--output", tmp_path / "kernels.json")
    assert code == 1 and named in err and "block_forward_kernel" in err and "sm_90" in err
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == [ROW | change]


def test_a_kernel_that_does_not_compile_is_a_row_among_the_others(call_tool, rows, tmp_path):
    broken = {name: ROW[name] for name in ("kernel", "settings", "triton")} | {"error": "K is 8", "target": "gfx942"}
    rows(broken, ROW)
    output = tmp_path / "kernels.json"
    code, out, err = call_tool("kernel_report", "--targets", "gfx942,sm_90", "--output", output)
    assert code == 1 and "does not compile" in out and "for gfx942: K is 8" in err
    assert json.loads(output.read_text())["rows"] == [broken, ROW]


def test_a_compiler_that_dies_leaves_the_rows_of_other_processes(call_tool, rows, monkeypatch, tmp_path):
    rows(ROW)

    def dies(target, part, parts, keep):
        if part:
            raise BrokenProcessPool("terminated abruptly")
        return [ROW]

    monkeypatch.setattr(report, "rows", dies)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    output = tmp_path / "kernels.json"
    code, _, err = call_tool("kernel_report", "--targets", "sm_90", "--output", output)
    assert code == 1 and "a compiling process died: terminated abruptly" in err
    assert ROW in json.loads(output.read_text())["rows"]


def test_what_the_compiler_says_is_the_row_s_error(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("first\nthe last line")

    launch = report.launches("sm_90", of="squared", head_dim=64, features=16)[0]
    monkeypatch.setattr(report.triton, "compile", fails)
    row = report.row(launch, {}, "sm_90")
    assert row["error"] == "the last line" and row["kernel"] == "block_state_kernel" == launch.kernel.__name__


def test_bad_input_is_one_line(call_tool, monkeypatch, tmp_path):
    code, _, err = call_tool("kernel_report", "--targets", "sm_90,sm_7", "--output", tmp_path / "kernels.json")
    assert code == 2 and "'sm_7'" in err and err.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = call_tool("kernel_report", "--output", tmp_path / "kernels.json")
    assert code == 2 and "TRITON_INTERPRET" in err


def test_one_kernel_is_compiled_as_it_is_launched(tmp_path):
    launches = report.launches("sm_90", of="squared", head_dim=64, features=16)
    names = {launch.kernel.__name__ for launch in launches}
    assert {"block_forward_kernel", "block_backward_dk_kernel", "block_state_kernel"} <= names
    launch = next(launch for launch in launches if launch.kernel.__name__ == "backward_delta_kernel")
    row = report.row(launch, {"head_dim": 64, "features": 16}, "sm_90", tmp_path / "kept")
    assert row.pop("file") == "kept" and row.keys() == ROW.keys() and report.fault(row) is None
    assert ".target sm_90a" in (tmp_path / "kept.ptx").read_text() and "EXIT" in (tmp_path / "kept.sass").read_text()
    assert 16 <= row["registers"] <= 255 and row["spill_bytes"] == 0 and row["occupancy"] >= 1
    assert row["settings"] == {"head_dim": 64, "features": 16, "BM": 64, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize(
    "settings",
    [
        {"of": "squared", "features": 16},
        {"of": "squared", "features": 16, "gated": True, "local_blocks": 2},
        {"of": "flurka", "features": 16},
        {"of": "sparse"},
        {"of": "sparse", "kept": False},
        {"of": "heads", "keep_plain": True},
        {"of": "heads", "key_shift": True, "streamed": True},
        {"of": "sketch", "size": 32},
        {"of": "map", "map": "relu"},
        {"of": "summaries", "gated": True},
        {"of": "loss", "vocabulary": 1000},
        {"of": "gate", "activation": "silu"},
        {"of": "norm", "bias": True},
    ],
    ids=str,
)
def test_a_kernel_is_compiled_once_for_all_lengths(settings):
    """Nothing that it is compiled for depends on the number of tokens."""
    lengths = [
        {repr(x) for x in report.launches("sm_90", head_dim=64, tokens=n, **settings)} for n in (1, 512, 777, 5000)
    ]
    assert all(other == lengths[0] for other in lengths)


def test_tiles_are_those_of_the_target():
    def tiles(target):
        launches = report.launches(target, of="squared", head_dim=128, features=16)
        return {x.kernel.__name__: report.tiles(x) for x in launches}

    assert tiles("sm_90")["block_forward_kernel"]["BN"] == 64 and tiles("sm_80")["block_forward_kernel"]["BN"] == 32
    assert tiles("sm_90")["block_state_kernel"] == tiles("gfx942")["block_state_kernel"]


def test_a_pipelined_loop_that_computes_its_left_operand_is_found():
    """Why the table gives such loops one stage. Where this fails with a newer compiler, that rule may go."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    arguments = dict(x=x, y=x, out=x.float(), steps=10, BT=64)
    launch = report.specialise(pipelined_kernel, arguments, {"num_warps": 4, "num_stages": 2})
    row = report.row(launch, {}, "sm_90")
    assert row["wgmma_hazards"] and "unfinished wgmma" in report.fault(row)


@pytest.mark.parametrize("type", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_pipelined_on_blackwell_and_registers_are_capped_on_hopper_alone(monkeypatch, type):
    def sizes(target):
        monkeypatch.setattr(launch_configs, "target", lambda: target)
        return [
            launch_configs.tiles(kernel, width, type)
            for kernel in launch_configs.NAMES
            for width in (16, 64, 128, 256, 6144, 12288, 2**20)
        ]

    assert {x["num_stages"] for x in sizes("sm_100")} == {1}
    assert not any("maxnreg" in x for target in ("sm_80", "sm_100", "gfx942") for x in sizes(target))
    if type == torch.bfloat16:
        assert any("maxnreg" in x for x in sizes("sm_90")) and {x["num_stages"] for x in sizes("sm_90")} > {1}


def test_blackwell_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    caplog.set_level("INFO", logger="lcpt_kernels")
    launch_configs.target.cache_clear()
    try:
        assert [launch_configs.target() for _ in range(2)] == ["sm_100"] * 2
    finally:
        launch_configs.target.cache_clear()
    assert [x.message for x in caplog.records if "Blackwell" in x.message] == [
        "Triton kernels run without software pipelining on Blackwell: no GPU has shown that it is right there"
    ]


def test_nothing_for_sm_90_spills_or_waits():
    """The first settings; the tool compiles all of them."""
    rows = report.rows("sm_90", first=15)
    faults = [(row["kernel"], row["settings"], fault) for row in rows if (fault := report.fault(row))]
    assert not faults
    assert all(row["tensor_core_ops"] for row in rows if row["kernel"].startswith(("block", "interval")))


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(call_tool, tmp_path):
    output = tmp_path / "kernels.json"
    assert call_tool("kernel_report", "--output", output)[0] == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["target"] for row in rows} == set(report.TARGETS)
    for target in report.TARGETS:
        kernels = [row for row in rows if row["target"] == target]
        assert any("backward" in row["kernel"] for row in kernels)
        assert any(row["tensor_core_ops"] for row in kernels)
