"""How a command ends: bad input, an interruption, a reader that left, and a fault of our own."""

import subprocess
import sys

import pytest

from lcpt.commands.one_line_errors import one_line_errors


def ending(error):
    @one_line_errors
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (MemoryError(), 2, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_a_user_can_do_is_one_line(error, code, said, capsys):
    assert ending(error)() == code and capsys.readouterr().err == said


def test_a_fault_of_lcpt_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(RuntimeError):
        ending(RuntimeError("a fault"))()
    monkeypatch.setenv("LCPT_TRACEBACK", "1")
    assert ending(ValueError("where?"))() == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ending(ValueError("x"))() == 2 and capsys.readouterr().err == ""


def test_a_reader_may_leave():
    code = (
        "import sys; from lcpt.commands.one_line_errors import one_line_errors\n"
        "def main():\n"
        "    for n in range(10**6): print(n)\n"
        "    return 0\n"
        "sys.exit(one_line_errors(main)())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(2) == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
