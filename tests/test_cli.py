import argparse

import pytest

from flexjax.cli import run_command


def command(error: BaseException | None):
    def main(_args: argparse.Namespace) -> None:
        if error is not None:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (ValueError("no such\nmodel"), 2, "error: no such model\n"),
        (OSError("disk full"), 2, "error: disk full\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "No such file: 'x'\n"),
        (MemoryError(), 2, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, message, capsys):
    parser = argparse.ArgumentParser()
    assert run_command(command(error), parser, []) == status
    captured = capsys.readouterr()
    assert captured.err.endswith(message)
    assert captured.err.count("\n") == bool(message)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no such model"):
        run_command(
            command(ValueError("no such model")), argparse.ArgumentParser(), ["--debug"]
        )


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(AssertionError):
        run_command(command(AssertionError()), argparse.ArgumentParser(), [])


def test_a_wrong_command_line_has_the_same_status():
    with pytest.raises(SystemExit) as caught:
        run_command(command(None), argparse.ArgumentParser(), ["--nonsense"])
    assert caught.value.code == 2


def test_options_are_not_taken_by_parts_of_their_names(capsys):
    """`--policy FILE` would be `--policy-json FILE`, which writes the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy-json")
    with pytest.raises(SystemExit) as caught:
        run_command(command(None), parser, ["--policy", "policy.json"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --policy" in capsys.readouterr().err
