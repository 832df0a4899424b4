import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")
from lcpt_kernels.triton import report  # noqa: E402

ROW = {
    "kernel": "block_output_kernel", "settings": {"head_dim": 64, "features": 16, "BM": 128, "num_warps": 8},
    "target": "sm_90", "registers": 120, "spill_bytes": 0, "shared_bytes": 59392, "tensor_core_ops": 21,
    "wgmma_serialized": False, "occupancy": 2,
}


@pytest.fixture
def rows(monkeypatch):
    """rows(*rows): what the tool is told instead of compiling."""

    def tell(*rows):
        def of_part(target, part, parts):
            return [row for row in rows if row["target"] == target][part::parts]

        monkeypatch.setattr(report, "rows", of_part)
        monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))

    return tell


def test_a_healthy_report(call_tool, rows, tmp_path):
    rows(ROW, ROW | {"target": "sm_80", "spill_bytes": 36})
    output = tmp_path / "new/kernels.json"
    code, out, err = call_tool("kernel_report", "--targets", "sm_80,sm_90", "--output", output)
    written = json.loads(output.read_text())
    assert code == 0 and "error" not in err and written["schema_version"] == 1
    assert {"versions", "command", "rows"} <= written.keys()
    assert [row["target"] for row in written["rows"]] == ["sm_80", "sm_90"] and written["rows"][1] == ROW
    assert "block_output_kernel" in out and "59,392" in out and "BM=128" in out


@pytest.mark.parametrize("change, named", [
    ({"spill_bytes": 36}, "36 bytes spilled"), ({"wgmma_serialized": True}, "wgmma serialised"),
    ({"occupancy": 0, "shared_bytes": 250_000}, "250000 bytes of shared memory"),
])
def test_a_fault_on_sm_90_is_named(call_tool, rows, tmp_path, change, named):
    rows(ROW | change)
    code, _, err = call_tool("kernel_report", "--targets", "sm_90", "--output", tmp_path / "kernels.json")
    assert code == 1 and named in err and "block_output_kernel" in err and "sm_90" in err
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == [ROW | change]


def test_bad_input(call_tool, monkeypatch, tmp_path):
    code, _, err = call_tool("kernel_report", "--targets", "sm_90,sm_7", "--output", tmp_path / "kernels.json")
    assert code == 2 and "'sm_7'" in err and err.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = call_tool("kernel_report", "--output", tmp_path / "kernels.json")
    assert code == 2 and "TRITON_INTERPRET" in err


def test_one_kernel_is_compiled_as_it_is_started():
    launches = report.launches("sm_90", of="squared", head_dim=64, features=16)
    names = {launch.kernel.__name__ for launch in launches}
    assert {"block_output_kernel", "block_backward_key_kernel", "scan_backward_kernel"} <= names
    launch = next(launch for launch in launches if launch.kernel.__name__ == "normaliser_backward_kernel")
    row = report.row(launch, {"head_dim": 64, "features": 16}, "sm_90")
    assert row.keys() == ROW.keys() and report.fault(row) is None
    assert 16 <= row["registers"] <= 255 and row["spill_bytes"] == 0 and row["occupancy"] >= 1
    assert row["settings"] == {"head_dim": 64, "features": 16, "BM": 64, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize("settings", [
    {"of": "squared", "features": 16},
    {"of": "squared", "features": 16, "gated": True, "local_blocks": 2},
    {"of": "flurka", "features": 16}, {"of": "sparse"}, {"of": "sparse", "kept": False},
    {"of": "heads", "keep_plain": True}, {"of": "sketch", "size": 32}, {"of": "map", "map": "relu"},
    {"of": "summaries", "gated": True},
], ids=str)
def test_a_kernel_is_compiled_once_for_all_lengths(settings):
    """Nothing that it is compiled for depends on the number of tokens."""
    lengths = [{repr(x) for x in report.launches("sm_90", head_dim=64, tokens=n, **settings)}
               for n in (1, 512, 777, 5000)]
    assert all(other == lengths[0] for other in lengths)


def test_tiles_are_those_of_the_target():
    def tiles(target):
        launches = report.launches(target, of="squared", head_dim=128, features=16)
        return {x.kernel.__name__: report.tiles(x) for x in launches}

    assert tiles("sm_90")["block_output_kernel"]["BN"] == 64 and tiles("sm_80")["block_output_kernel"]["BN"] == 32
    assert tiles("sm_90")["scan_kernel"] == tiles("gfx942")["scan_kernel"]


def test_nothing_for_sm_90_spills_or_waits():
    """The first settings; the tool compiles all of them."""
    rows = report.rows("sm_90", first=11)
    faults = [(row["kernel"], row["settings"], fault) for row in rows if (fault := report.fault(row))]
    assert not faults
    assert all(row["tensor_core_ops"] for row in rows if row["kernel"].startswith(("block", "interval")))


@pytest.mark.slow
def test_all_of_it(call_tool, tmp_path):
    output = tmp_path / "kernels.json"
    assert call_tool("kernel_report", "--output", output)[0] == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["target"] for row in rows} == set(report.TARGETS)
    for target in report.TARGETS:
        kernels = [row for row in rows if row["target"] == target]
        assert any("backward" in row["kernel"] for row in kernels)
        assert any(row["tensor_core_ops"] for row in kernels)
