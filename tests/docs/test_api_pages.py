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


def test_pages_are_built_without_a_warning_and_have_every_public_name(tmp_path):
    assert build_api.build(tmp_path) == []
    for module in build_api.PUBLIC:
        text = page(tmp_path, module)
        names = getattr(importlib.import_module(module), "__all__", [])
        assert [name for name in names if f'id="{name}"' not in text] == [], module
    assert "tokens int64 [B, T]" in page(tmp_path, "lcpt.model")
