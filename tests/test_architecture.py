"""The import graph: no circles, and every import runs down the floors that docs/architecture.md draws."""

import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("architecture_graph", ROOT / "docs/architecture_graph.py")
architecture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architecture)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return architecture.graph()


def upwards(name: str, used: str, floors: tuple[tuple[str, ...], ...]) -> bool:
    above, below = (architecture.place(x, floors) for x in (name, used))
    return above is not None and below is not None and above[1] != below[1] and below[0] <= above[0]


def test_modules_import_each_other_without_a_circle(graph):
    """A package's __init__ only hands names on, so what it imports does not count."""
    handing_on = {name for name, path in architecture.modules().items() if path.name == "__init__.py"}
    order = TopologicalSorter({name: uses - handing_on for name, uses in graph.items() if name not in handing_on})
    order.prepare()  # raises CycleError and names the circle


def test_imports_run_down(graph):
    pairs = [(name, used) for name, uses in graph.items() for used in uses]
    assert [f"{name} imports {used}" for name, used in pairs if upwards(name, used, architecture.FLOORS)] == []


def test_every_package_stands_on_a_floor(graph):
    assert [name for name in graph if name != "lcpt" and architecture.place(name, architecture.FLOORS) is None] == []


def test_kernels_import_nothing_of_lcpt_and_their_families_nothing_of_each_other(graph):
    pairs = [(name, used) for name, uses in graph.items() for used in uses if name.startswith("lcpt_kernels")]
    assert [f"{name} imports {used}" for name, used in pairs if used.startswith("lcpt.")] == []
    short = [tuple(x.removeprefix("lcpt_kernels.triton.") for x in pair) for pair in pairs]
    assert [f"{name} imports {used}" for name, used in short if upwards(name, used, architecture.KERNEL_FLOORS)] == []


def test_importing_the_config_imports_neither_deepspeed_nor_triton():
    code = "import sys, lcpt.config; print({'deepspeed', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
