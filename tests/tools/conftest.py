import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def call_tool(monkeypatch, capsys):
    """call_tool(name, *arguments) -> (exit code, stdout, stderr) of tools/name.py, in this process."""

    def call(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(TOOLS / f"{name}.py"), *map(str, arguments)])
        code = module.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
