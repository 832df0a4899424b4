"""`lcpt COMMAND`: finds its module, names itself, says in a line what it cannot find."""

import importlib
import sys

import pytest

from lcpt import __version__
from lcpt.commands import main as entry
from lcpt.config import load_config, named_configs


@pytest.fixture
def lcpt(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lcpt", *words])
        code = entry.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_help_and_version(lcpt):
    for words in ((), ("--help",)):
        code, said, _ = lcpt(*words)
        assert code == 0 and all(f"  {name} " in said for name in entry.COMMANDS)
        assert max(map(len, said.splitlines())) <= 120
    assert lcpt("--version") == (0, f"lcpt {__version__}\n", "")


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_has_a_main_and_a_help(name, monkeypatch, capsys):
    module = importlib.import_module(f"lcpt.commands.{entry.COMMANDS[name][0]}")
    monkeypatch.setattr(sys, "argv", ["lcpt", *name.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: lcpt {name}")
    assert callable(module.main)


@pytest.mark.parametrize(
    "words, remark",
    [(("evalute",), "no command 'evalute'"), (("benchmark",), "benchmark attention and benchmark training")],
)
def test_an_unknown_command_is_one_line(lcpt, words, remark):
    code, said, error = lcpt(*words)
    assert (code, said) == (2, "") and remark in error and len(error.splitlines()) == 1


def test_configs_are_found_by_name_in_any_folder(lcpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = lcpt("configs")
    names = [line.split()[0] for line in said.splitlines()]
    assert code == 0 and {"demo", "gpt2-small-32k", "recipes/trunk"} <= set(names) == set(named_configs())
    assert load_config("gpt2-small-32k").data.context == 32768
    (tmp_path / "demo").write_text("run: {dir: mine}\ndata: {path: x}\n")
    assert load_config("demo").run.dir == "mine"  # a file that is there comes first
