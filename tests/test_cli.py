import argparse
import contextlib
import os
import signal
import threading

import pytest

from flexjax import cli
from flexjax.cli import run_command


@pytest.fixture(autouse=True)
def signals_kill():
    """Whatever the tests' own start made of them, as nohup does."""
    before = {
        one: signal.signal(one, signal.SIG_DFL)
        for one in (signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_would_kill_lets_files_be_removed_first(number, capsys):
    cleaned = []

    def main(_args: argparse.Namespace) -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            os.kill(os.getpid(), number)  # as an impatient scheduler does
            cleaned.append(True)

    assert run_command(main, argparse.ArgumentParser(), []) == 128 + number
    assert capsys.readouterr().err == f"ended by {number.name}\n"
    assert cleaned
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_that_was_lost_may_be_sent_again(monkeypatch):
    monkeypatch.setattr(cli, "_CLEANS_UP_WITHIN_S", -1.0)

    def main(_args: argparse.Namespace) -> None:
        with contextlib.suppress(BaseException):  # as a destructor does
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)

    assert run_command(main, argparse.ArgumentParser(), []) == 128 + signal.SIGTERM


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    status = run_command(
        lambda _: os.kill(os.getpid(), signal.SIGHUP), argparse.ArgumentParser(), []
    )
    assert status == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_command_runs_in_any_thread():
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(
            run_command(command(None), argparse.ArgumentParser(), [])
        )
    )
    thread.start()
    thread.join()
    assert statuses == [0]


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
