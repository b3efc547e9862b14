import argparse

from bench.command import typed


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--batch-size", "--gpu-batch-size", type=int)
    parser.add_argument("--sizes", nargs="+", type=int, default=(8, 16))
    parser.add_argument("--percent", nargs="+", type=float)
    parser.add_argument("--settings", nargs="+", default=())
    parser.add_argument("--overlap", type=lambda text: text == "true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json")
    return parser


def told(*words: str) -> str:
    args = parser().parse_args(words)
    return typed("bench.x", parser(), args, leave_out={"json", "help"})


def test_a_command_is_told_without_defaults_and_paths():
    assert told() == told("--json", "/a/b.json", "--sizes", "8", "16")
    assert told() == "python -m bench.x"
    assert told("smoke", "--cold") == "python -m bench.x smoke --cold"
    words = ("--model", "/a/b/opt", "--gpu-batch-size", "4", "--sizes", "32")
    expected = "python -m bench.x --model opt --batch-size 4 --sizes 32"
    assert told(*words) == expected


def test_what_is_told_can_be_typed_again():
    words = (
        *("--percent", "0", "12.5", "--settings", "--batch-size 3 --cold", "b c"),
        *("--overlap", "false"),
    )
    told_words = "--percent 0 12.5 --settings '--batch-size 3 --cold' 'b c'"
    assert told(*words) == f"python -m bench.x {told_words} --overlap false"
