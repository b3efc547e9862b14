"""Nothing that a run spilled is left, however it ended."""

import signal
import subprocess
import sys
import textwrap

from flexjax import LLM
from tests.test_llm import GREEDY, SPILLS


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
    code = f"""
        import os, signal
        from flexjax import LLM, Placement, Policy, SamplingParams
        from flexjax.memory.disk import DiskStore
        write, count = DiskStore._write, iter(range(100))
        def kill(self, *args):
            write(self, *args)
            if next(count) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        DiskStore._write = kill
        policy = Policy(kv_cache=Placement(), activations=Placement())
        llm = LLM({str(store)!r}, policy=policy, offload_dir={str(spill)!r})
        llm.generate([[5, 6]], SamplingParams(max_tokens=100, ignore_eos=True))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert list(spill.iterdir())
    with LLM(store, policy=SPILLS, offload_dir=spill) as llm:
        llm.generate([[5, 6]], GREEDY)
        assert len(list(spill.iterdir())) == 1
    assert not list(spill.iterdir())
