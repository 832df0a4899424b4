"""The API pages are built from docstrings without a warning, and every public name is on one."""

import importlib
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("pdoc")  # of the extra `docs`, which make setup installs

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs/build_api.py")
build_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_api)


def page(folder: Path, module: str) -> str:
    return (folder / f"{module.replace('.', '/')}.html").read_text()


def public(module: str) -> dict[str, object]:
    """What a page shows: the names that a package hands on, else the classes and functions that a module defines."""
    found = importlib.import_module(module)
    if names := getattr(found, "__all__", None):
        return {name: getattr(found, name) for name in names}
    own = {name: x for name, x in vars(found).items() if getattr(x, "__module__", None) == module}
    return {name: x for name, x in own.items() if not name.startswith("_")}


def test_pages_are_built_without_a_warning_and_have_every_public_name(tmp_path):
    assert build_api.build(tmp_path) == []
    for module in build_api.PUBLIC:
        text = page(tmp_path, module)
        assert [name for name in public(module) if f'id="{name}"' not in text] == [], module
    assert "tokens int64 [B, T]" in page(tmp_path, "lcpt.model")


@pytest.mark.parametrize("module", build_api.PUBLIC)
def test_every_public_class_and_function_says_what_it_is(module):
    assert importlib.import_module(module).__doc__
    callables = {name: x for name, x in public(module).items() if callable(x)}
    # A dataclass without a docstring is given Name(field: type, ...).
    assert [name for name, x in callables.items() if (x.__doc__ or name).startswith(name)] == []
