"""The import graph: no circles, and every import runs down the floors that docs/architecture.md draws."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the top; packages on one floor do not import each other
    {"launch", "tools", "benchmarks"},
    {"lcpt.config"},
    {"lcpt.training", "lcpt.benchmarking"},
    {"lcpt.evaluation", "lcpt.analysis"},
    {"lcpt.model"},
    {"lcpt.attention"},
    {"lcpt_kernels", "lcpt.data", "lcpt.parallel", "lcpt.checkpoint"},
    {"lcpt.utils"},
)
KERNEL_FLOORS = (
    {"report"},
    {"block_causal", "interval", "fused"},
    {"common"},
)


def modules() -> dict[str, Path]:
    found = {}
    for top, base in (("lcpt", ROOT), ("lcpt_kernels", ROOT / "kernels"), ("launch", ROOT), ("tools", ROOT)):
        for path in (base / top).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """The modules of this project that a file names in an import anywhere, also inside a function; but not those that
    it needs for annotations alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield inner if inner in known else node.module


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: set(imports(name, path, set(found))) - {name} for name, path in found.items()}


def floor(name: str, floors: tuple[set[str], ...]) -> tuple[int, str] | None:
    for number, packages in enumerate(floors):
        for package in packages:
            if name == package or name.startswith(package + "."):
                return number, package
    return None


def test_the_packages_import_without_a_circle(graph):
    """A package's __init__ only hands names on, so what it imports does not count."""
    handing_on = {name for name, path in modules().items() if path.name == "__init__.py"}
    order = TopologicalSorter({name: uses - handing_on for name, uses in graph.items() if name not in handing_on})
    order.prepare()  # raises CycleError and names the circle


def test_imports_run_down(graph):
    wrong = []
    for name, uses in graph.items():
        for used in uses:
            above, below = floor(name, FLOORS), floor(used, FLOORS)
            if above is None or below is None or above[1] == below[1]:
                continue
            if below[0] <= above[0]:
                wrong.append(f"{name} imports {used}")
    assert not wrong


def test_every_package_stands_on_a_floor():
    packages = {".".join(name.split(".")[:2]) for name in modules() if name.startswith("lcpt.")}
    assert {package for package in packages if floor(package, FLOORS) is None} == set()


def test_the_kernels_know_nothing_of_lcpt_and_their_families_nothing_of_each_other(graph):
    wrong = []
    for name, uses in graph.items():
        for used in uses if name.startswith("lcpt_kernels") else ():
            short, of = (x.removeprefix("lcpt_kernels.triton.") for x in (name, used))
            above, below = floor(short, KERNEL_FLOORS), floor(of, KERNEL_FLOORS)
            upwards = above and below and above[1] != below[1] and below[0] <= above[0]
            if used.startswith("lcpt.") or upwards:
                wrong.append(f"{name} imports {used}")
    assert not wrong


def test_importing_the_config_imports_neither_deepspeed_nor_triton():
    import subprocess
    import sys

    code = "import sys, lcpt.config; print({'deepspeed', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
