"""The documents say what is there: every command, option, name and link in docs/ and the READMEs exists."""

import ast
import inspect
import re
from pathlib import Path

import lcpt_kernels
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "kernels/README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTRACT = (ROOT / "docs/contract.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document):
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if not path.name.startswith("adding")],  # recipes name files that the reader makes
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_of_the_repository_that_is_named_exists(document):
    """Paths in code spans and command lines that begin with one of our folders."""
    named = re.findall(
        r"(?<![\w./-])((?:lcpt|kernels|tools|launch|benchmarks|tests|docs|configs)/[\w./-]*\w\.(?:py|sh|md|yaml|txt|sbatch))",
        document.read_text(),
    )
    assert [path for path in dict.fromkeys(named) if not (ROOT / path).exists()] == []


def command_of(script):
    """The file in lcpt/commands that a script calls."""
    return ROOT / re.search(r"lcpt/commands/\w+\.py", script.read_text()).group()


def test_the_contract_names_options_that_the_tools_have():
    commands = re.findall(r"^    (?:python|deepspeed.*?) ?((?:tools|launch)/\w+\.py)(.*)$", CONTRACT, re.MULTILINE)
    assert len(commands) > 8
    missing = [
        f"{file} {option}"
        for file, arguments in commands
        for option in re.findall(r"--[a-z][a-z-]+", arguments)
        if f'"{option}"' not in command_of(ROOT / file).read_text()
    ]
    assert missing == []


def test_the_contract_names_functions_as_they_are():
    signatures = re.findall(r"^    (\w+_attention)\((.*)\) *(?:#.*)?$", CONTRACT, re.MULTILINE)
    assert {name for name, _ in signatures} == {name for name in lcpt_kernels.__all__ if name.endswith("_attention")}
    for name, arguments in signatures:
        said = ast.parse(f"def f({arguments.removesuffix(', ...')}): pass").body[0].args
        parameters = inspect.signature(getattr(lcpt_kernels, name)).parameters
        assert [x.arg for x in (*said.args, *said.kwonlyargs) if x.arg not in parameters] == [], name
        for keyword, default in zip(said.kwonlyargs, said.kw_defaults, strict=True):
            if default is not None:
                assert parameters[keyword.arg].default == ast.literal_eval(default), (name, keyword.arg)
