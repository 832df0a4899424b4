"""The import graph of lcpt, and its picture: `python docs/architecture_graph.py` draws docs/architecture.png anew.

`tests/test_architecture.py` holds the floors: an import may only run down.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the top; packages on one floor do not import each other
    ("launch", "tools", "benchmarks"),
    ("lcpt.commands",),
    ("lcpt.config",),
    ("lcpt.training", "lcpt.benchmarking"),
    ("lcpt.evaluation", "lcpt.analysis"),
    ("lcpt.model",),
    ("lcpt.attention",),
    ("lcpt_kernels", "lcpt.data", "lcpt.parallel", "lcpt.checkpoint"),
    ("lcpt.utils",),
)
KERNEL_FLOORS = (("report",), ("block_causal", "interval", "fused"), ("common",))  # of lcpt_kernels.triton


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything but tests."""
    found = {}
    for top, base in (
        ("lcpt", ROOT),
        ("lcpt_kernels", ROOT / "kernels"),
        ("launch", ROOT),
        ("tools", ROOT),
        ("benchmarks", ROOT),
    ):
        for path in (base / top).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph() -> dict[str, set[str]]:
    """Each module -> the modules of this project that it imports."""
    found = modules()
    return {name: set(imports(path, set(found))) - {name} for name, path in found.items()}


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """The known modules that a file imports, also inside functions, but not for annotations alone."""
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


def place(name: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """(floor, package) of a module, floor 0 on top; None if it stands on none."""
    for number, packages in enumerate(floors):
        for package in packages:
            if name == package or name.startswith(package + "."):
                return number, package
    return None


def implied(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows a -> c for which there is a chain a -> b -> ... -> c."""

    def reaches(start: str, end: str) -> bool:
        return any(b == end or reaches(b, end) for a, b in arrows if a == start)

    return {(a, c) for a, c in arrows if any(b != c and reaches(b, c) for x, b in arrows if x == a)}


def draw(output: Path) -> None:
    """Draw the packages on their floors. An arrow is an import; one that a chain of others implies is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, int] = {}
    arrows: set[tuple[str, str]] = set()
    files = modules()
    for name, uses in graph().items():
        here = place(name, FLOORS)
        if here is None:
            continue
        lines[here[1]] = lines.get(here[1], 0) + len(files[name].read_text().splitlines())
        for used in uses:
            there = place(used, FLOORS)
            if there is not None and there[1] != here[1]:
                arrows.add((here[1], there[1]))
    centre = {
        package: ((column + 1) / (len(packages) + 1), -floor)
        for floor, packages in enumerate(FLOORS)
        for column, package in enumerate(packages)
    }
    figure, axes = pyplot.subplots(figsize=(11, 9))
    for above, below in sorted(arrows - implied(arrows)):
        far = place(below, FLOORS)[0] - place(above, FLOORS)[0]
        bend = 0.0 if far == 1 else -0.3 if far == 4 else 0.2
        style = {
            "arrowstyle": "-|>",
            "color": "0.72",
            "connectionstyle": f"arc3,rad={bend}",
            "shrinkA": 16,
            "shrinkB": 16,
        }
        axes.annotate("", xy=centre[below], xytext=centre[above], arrowprops=style, zorder=1)
    for package, (x, y) in centre.items():
        label = f"{package}\n{lines.get(package, 0):,} lines"
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef3fa", "edgecolor": "#4a6fa5"}
        axes.text(x, y, label, ha="center", va="center", fontsize=10, bbox=box, zorder=2)
    axes.set(xlim=(0, 1), ylim=(-len(FLOORS) + 0.4, 0.6))
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    draw(ROOT / "docs/architecture.png")
