import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "bench" / "gpu.sh"


def run_script(folder: pathlib.Path, nvidia_smi: str, python: str):
    """The script where `nvidia-smi` and `$PYTHON` do no more than these lines."""
    for name, line in {"nvidia-smi": nvidia_smi, "python": python}.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "OUT": str(folder / "out"),
        "FLEXJAX_CACHE": str(folder / "cache"),
    }
    return subprocess.run(
        [SCRIPT], env=env, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("nvidia_smi", "python", "message"),
    [
        ("exit 9", "exit 1", "there is no NVIDIA GPU here"),
        ("echo GPU, 80000", "exit 1", "has no working JAX"),
        ("echo GPU, 80000", "echo cpu", "JAX sees no GPU"),
    ],
)
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, nvidia_smi, python, message):
    done = run_script(tmp_path, nvidia_smi, python)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path):
    python = """
echo "$*" >>"$OUT.calls"
case "$*" in
  *platform*) echo cuda ;;
  *"import xdist"*) exit 1 ;;
  *copy_routes*) echo refused; exit 5 ;;
  *bench.run*|*bench.predictions*)
    echo "$2: capped at $XLA_PYTHON_CLIENT_MEM_FRACTION" ;;
esac"""
    done = run_script(tmp_path, "echo Some GPU 80GB, 61036", python)
    assert done.returncode == 1
    assert done.stderr == "failed: copy routes: failed with status 5\n"
    for command, count in {"bench.run": 2, "bench.predictions": 1}.items():
        assert done.stdout.count(f"{command}: capped at 0.249997\n") == count
    assert "refused" in done.stdout
    calls = (tmp_path / "out.calls").read_text()
    weights = tmp_path / "cache" / "random-opt-6.7b"
    for call in (
        f"-m checkpoints_tools.synthesize opt-6.7b {weights}\n",
        f"-m checkpoints_tools.convert {weights} {weights}-4bit --weight-bits 4\n",
        f"-m bench.truncated opt-6.7b 12 {weights}-12-layers\n",
        f"-m bench.run --model {weights} --weights host=1",
        f"-m bench.run --model {weights}-4bit --weight-bits 4 --weights host=1",
        f"-m bench.predictions {weights}-12-layers ",
    ):
        assert calls.count(call) == 1, call
