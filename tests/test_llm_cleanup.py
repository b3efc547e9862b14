"""Nothing that a run spilled is left, however it ended."""

import signal
import subprocess
import sys
import textwrap

from flexjax import LLM, Policy
from flexjax.memory.spill import PREFIX
from tests.test_llm import GREEDY, SPILLS


def run_with_signal(number: int, then: str) -> subprocess.CompletedProcess[str]:
    """A process that runs `then`, and sends itself a signal amid its spilling."""
    code = f"""
import os, sys
from flexjax.memory.disk import DiskStore

write, count = DiskStore._write, iter(range(100))

def signal_after(self, *args):
    write(self, *args)
    if next(count) == 5:
        os.kill(os.getpid(), {int(number)})

DiskStore._write = signal_after
"""
    command = [sys.executable, "-c", code + textwrap.dedent(then)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_spill_files_are_gone_after_close(golden, tmp_path):
    spill = tmp_path / "spill"
    llm = LLM(golden("opt-pre-ln").store, policy=SPILLS, offload_dir=spill)
    llm.generate([[5, 6]], GREEDY)
    assert list(spill.iterdir())
    llm.close()
    llm.close()
    assert not list(spill.iterdir())


def test_a_killed_run_leaves_nothing_after_the_next_start(golden, tmp_path):
    spill = tmp_path / "spill"
    store = golden("opt-pre-ln").store
    then = f"""
        from flexjax import LLM, Placement, Policy, SamplingParams
        policy = Policy(kv_cache=Placement(), activations=Placement())
        llm = LLM({str(store)!r}, policy=policy, offload_dir={str(spill)!r})
        llm.generate([[5, 6]], SamplingParams(max_tokens=100, ignore_eos=True))
    """
    run = run_with_signal(signal.SIGKILL, then)
    assert run.returncode == -signal.SIGKILL
    assert list(spill.iterdir())
    with LLM(store, policy=SPILLS, offload_dir=spill) as llm:
        llm.generate([[5, 6]], GREEDY)
        assert len(list(spill.iterdir())) == 1
    assert not list(spill.iterdir())


def test_what_a_killed_run_left_goes_though_the_next_one_spills_nothing(
    golden, tmp_path
):
    left = tmp_path / f"{PREFIX}killed"
    left.mkdir()
    (left / "lock").touch()
    with LLM(golden("opt-pre-ln").store, policy=Policy(), offload_dir=tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_terminated_command_leaves_nothing(golden, tmp_path):
    words = ("--model", golden("opt-pre-ln").store, "--prompt-len", 4, "--gen-len", 150)
    words += ("--kv-cache", "disk=1", "--offload-dir", tmp_path, "--ignore-eos")
    then = f"""
        from flexjax import generate
        from flexjax.cli import run_command
        argv = {[str(word) for word in words]!r}
        sys.exit(run_command(generate.main, generate.build_parser(), argv))
    """
    run = run_with_signal(signal.SIGTERM, then)
    assert run.returncode == 128 + signal.SIGTERM
    assert run.stderr.endswith("ended by SIGTERM\n")
    assert not list(tmp_path.iterdir())
