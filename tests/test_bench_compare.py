import dataclasses
import json
import pathlib
import runpy
import sys
from unittest import mock

import pytest

from bench import compare
from bench.cases import Case
from bench.measure import random_prompts
from bench.memory_cap import Finished
from bench.peers import accelerate_system, weights
from bench.peers.accelerate_system import SCRIPT, Accelerate
from bench.peers.flexjax_system import Flexjax, default_ladders, parse_setting
from bench.peers.report import attempt_to_json, ratio, result_to_json, table
from bench.peers.sweep import PATIENCE, Result, climb, find_best
from bench.peers.system import Attempt, Failed, Job, Measured, Setting
from flexjax.cli import run_command
from flexjax.policy import Policy

JOB = Job(
    prompt_len=8,
    gen_len=16,
    memory_cap_bytes=2_000_000_000,
    weights_bytes=2_600_000_000,
    kv_cache_bytes=31_000_000,
    weights={"store": pathlib.Path("store"), "hf": pathlib.Path("hf")},
)
KILLED = Failed("killed: out of memory", killed_for_memory=True)


def setting(num_rows: int) -> Setting:
    return Setting(("--batch-size", str(num_rows)), num_rows)


def measured(gen_len: int, step_s: float = 1.0) -> Measured:
    return Measured(
        prefill_s=1.0,
        step_s=(step_s,) * (gen_len - 1),
        peak_rss_bytes=1 << 30,
        versions={},
    )


def attempt(num_rows: int, outcome: Measured | Failed, gen_len: int = 16) -> Attempt:
    return Attempt(setting(num_rows), gen_len, outcome)


@dataclasses.dataclass(frozen=True)
class FakeSystem:
    """Has settings, and a largest batch for short and for whole runs."""

    rows: tuple[tuple[int, ...], ...]
    fits_short: int = 1000
    fits_whole: int = 1000
    fastest: int = 1000
    name: str = "fake"
    runs: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def ladders(self, job: Job) -> list[list[Setting]]:
        return [[setting(count) for count in ladder] for ladder in self.rows]

    def run(self, chosen: Setting, gen_len: int) -> Attempt:
        rows = chosen.num_rows
        self.runs.append((rows, gen_len))
        fits = self.fits_whole if gen_len == JOB.gen_len else self.fits_short
        step_s = max(1.0, rows / self.fastest) ** 2
        outcome = measured(gen_len, step_s) if rows <= fits else KILLED
        return Attempt(chosen, JOB.gen_len, outcome)

    def best(self, **options) -> Result:
        return find_best(self, JOB, self.run, sweep_len=4, **options)


def test_throughput_counts_prefill_and_decode():
    whole = Measured(
        prefill_s=3.0, step_s=(1.0, 2.0, 2.0), peak_rss_bytes=1, versions={}
    )
    assert attempt(16, whole, gen_len=4).tokens_per_s == 16 * 4 / 8
    assert attempt(16, whole, gen_len=4).counts


def test_steps_that_were_not_run_go_on_without_the_first():
    short = Measured(
        prefill_s=2.0, step_s=(9.0, 1.0, 3.0), peak_rss_bytes=1, versions={}
    )
    projected = attempt(10, short, gen_len=5)
    assert short.decode_s(5) == 2.0 * 4
    assert projected.tokens_per_s == 10 * 5 / 10
    assert not projected.counts
    assert attempt_to_json(projected)["projected"]


def test_one_token_is_prefill_alone():
    done = attempt(
        4, Measured(prefill_s=2.0, step_s=(), peak_rss_bytes=1, versions={}), gen_len=1
    )
    assert done.counts
    assert done.tokens_per_s == 2.0
    assert attempt_to_json(done)["step_s"] == 0.0


def result(name: str, step_s: float | None) -> Result:
    best = None if step_s is None else attempt(4, measured(16, step_s))
    return Result(name, (best or attempt(4, KILLED),), best)


def test_the_ratio_is_to_the_best_peer():
    results = [result("flexjax", 1.0), result("a", 4.0), result("b", 2.0)]
    assert ratio(results, "flexjax") == pytest.approx((1 + 15 * 2.0) / (1 + 15))


@pytest.mark.parametrize(
    "results",
    [
        [result("flexjax", 1.0)],
        [result("flexjax", None), result("a", 1.0)],
        [result("flexjax", 1.0), result("a", None)],
    ],
)
def test_there_is_no_ratio_to_nothing(results):
    assert ratio(results, "flexjax") is None


def test_a_ladder_ends_where_memory_does():
    system = FakeSystem(((1, 2, 4, 8),), fits_short=2)
    tried = climb(system.ladders(JOB)[0], lambda s: system.run(s, 4))
    assert [a.setting.num_rows for a in tried] == [1, 2, 4]
    assert tried[-1].outcome == KILLED


def test_a_ladder_ends_where_more_rows_are_no_faster():
    system = FakeSystem((tuple(2**i for i in range(10)),), fastest=8)
    tried = climb(system.ladders(JOB)[0], lambda s: system.run(s, 4))
    fastest = max(tried, key=lambda a: a.tokens_per_s)
    assert len(tried) == tried.index(fastest) + 1 + PATIENCE
    assert fastest.setting.num_rows == 8


def test_the_best_setting_of_all_ladders_runs_once_in_full():
    system = FakeSystem(((1, 2), (3, 5, 8)), fits_short=5)
    best = system.best().best
    assert best is not None
    assert best.setting.num_rows == 5
    assert best.counts
    assert system.runs == [(1, 4), (2, 4), (3, 4), (5, 4), (8, 4), (5, 16)]


def test_what_only_fits_in_short_gives_way_to_the_next_best():
    system = FakeSystem(((1, 2, 4, 8),), fits_whole=2)
    found = system.best()
    assert found.best is not None
    assert found.best.setting.num_rows == 2
    assert system.runs[-3:] == [(8, 16), (4, 16), (2, 16)]
    assert found.attempts[-1] is found.best


def test_a_single_setting_needs_no_sweep():
    system = FakeSystem(((4,),))
    assert system.best().best is not None
    assert system.runs == [(4, 16)]


def test_a_projection_stands_for_a_system_only_if_asked_to():
    system = FakeSystem(((4,),))
    best = system.best(projected=True).best
    assert best is not None
    assert system.runs == [(4, 4)]
    assert attempt_to_json(best)["projected"]


def test_a_short_run_that_is_the_whole_job_is_not_repeated():
    system = FakeSystem(((1, 2),))
    best = find_best(system, JOB, system.run, sweep_len=99).best
    assert best is not None
    assert system.runs == [(1, 16), (2, 16)]


def test_a_system_without_a_run_says_why():
    found = FakeSystem(((4, 8),), fits_short=0).best()
    assert found.best is None
    row = result_to_json(found)
    assert row["killed_for_memory"]
    assert row["tokens_per_s"] is None
    assert "fake" in table([row])
    assert "killed: out of memory" in table([row])


def test_our_cache_takes_the_memory_that_there_is():
    hosted, on_disk = default_ladders(JOB)
    small, _, large = ("--kv-cache host=0.4", "", "--kv-cache host=0.1")
    assert small in str(hosted[0])
    assert large in str(hosted[-1])
    assert all("--kv-cache disk=1" in str(s) for s in on_disk)
    assert all("--weights disk=1" in str(s) for s in (*hosted, *on_disk))


def test_our_weights_stay_in_memory_where_there_is_plenty():
    plenty = dataclasses.replace(JOB, memory_cap_bytes=100_000_000_000)
    for ladder in default_ladders(plenty):
        assert all("--weights device=1" in str(s) for s in ladder)
    assert "--kv-cache host=1" in str(default_ladders(plenty)[0][0])


def test_our_default_settings_say_policies():
    for ladder in default_ladders(JOB):
        assert [parse_setting(str(each)) for each in ladder] == ladder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--batch-size x", "invalid int"),
        ("--batch-size 0", "at least 1"),
        ("--bach-size 4", "says nothing about a policy"),
        ("--batch-s 4", "says nothing about a policy"),
        ("--weights disk=2", "disk"),
    ],
)
def test_a_setting_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_setting(text)
    assert text in str(caught.value)


def test_given_settings_replace_the_sweep():
    system = Flexjax([setting(4), setting(8)])
    assert system.ladders(JOB) == [[setting(4)], [setting(8)]]


# The command line

ARGS = ["opt-125m", "--memory-cap", "2GB", "--batch-sizes", "8", "--layers", "disk"]
OURS = ["--our-settings", "--batch-size 4 --weights disk=1"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A command line whose children are faked; returns their commands and caps."""
    ran: list[tuple[list[str], int | None]] = []

    def run(command: list[str], cap_bytes: int | None) -> Finished:
        ran.append((command, cap_bytes))
        steps = [1.0] * (int(command[command.index("--gen-len") + 1]) - 1)
        seconds = 3.0 if str(SCRIPT) in command else 1.0
        report = {
            "prefill_s": seconds,
            "prefill": {"seconds": seconds},
            "step_s": steps,
            "peak_rss_bytes": 1 << 30,
            "dtype": "bfloat16",
            "versions": {"torch": "1"},
            "machine": {"versions": {"jax": "1"}},
        }
        path = pathlib.Path(command[command.index("--json") + 1])
        path.write_text(json.dumps(report))
        return Finished(
            returncode=0,
            stdout="",
            stderr="",
            killed_for_memory=False,
            peak_bytes=1 << 30,
        )

    folders = {"store": tmp_path / "store", "hf": tmp_path / "hf"}
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(compare, "run_capped", run)
    monkeypatch.setattr(compare, "ensure_can_cap", lambda cap_bytes: None)
    monkeypatch.setattr(compare, "make_weights", lambda model, formats: folders)
    monkeypatch.setattr(Accelerate, "check", lambda self: None)
    return ran


def status(*argv: str) -> int:
    return run_command(compare.main, compare.build_parser(), argv)


def test_a_comparison_runs_both_under_one_cap_and_reports(machine, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert status(*ARGS, *OURS, "--gen-len", "4", "--json", str(path)) == 0
    assert [cap for _, cap in machine] == [2_000_000_000] * 2
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["systems"]] == ["flexjax", "accelerate"]
    assert report["ratio"] == pytest.approx((4 * 4 / 4) / (8 * 4 / 6))
    assert report["memory_cap_bytes"] == 2_000_000_000
    assert (report["prompt_len"], report["gen_len"]) == (128, 4)
    assert {"model", "machine", "date", "command"} <= set(report)
    assert str(tmp_path) not in report["command"]
    for row in report["systems"]:
        assert not row["projected"]
        assert len(row["tried"]) == 1
    assert "0.75 times" in capsys.readouterr().out


def test_one_system_alone_has_no_ratio(machine, tmp_path):
    path = tmp_path / "result.json"
    assert status(*ARGS, *OURS, "--only", "flexjax", "--json", str(path)) == 0
    assert len(machine) == 1
    assert json.loads(path.read_text())["ratio"] is None


def failing(returncode: int, *, killed: bool, stderr: str):
    def run(command: list[str], cap_bytes: int | None) -> Finished:
        return Finished(
            returncode=returncode,
            stdout="",
            stderr=stderr,
            killed_for_memory=killed,
            peak_bytes=None,
        )

    return run


@pytest.mark.parametrize(
    ("killed", "stderr", "reason"),
    [
        (True, "", "killed: out of memory"),
        (False, "Traceback\nRuntimeError: no\n", "exit status 1: RuntimeError: no"),
        (False, "", "exit status 1: it said nothing"),
    ],
)
def test_a_child_that_fails_is_a_row(machine, monkeypatch, killed, stderr, reason):
    run = failing(1, killed=killed, stderr=stderr)
    monkeypatch.setattr(compare, "run_capped", run)
    made = compare.run_child(Flexjax(), JOB, setting(4), 16)
    assert made.outcome == Failed(reason, killed)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["opt-9b"], "unknown model 'opt-9b'"),
        (["opt-125m", "--only", "deepspeed"], "deepspeed is no part of this"),
        (["opt-125m", "--only", "llama"], "expected flexjax or accelerate"),
        (["opt-125m", "--gen-len", "0"], "--gen-len is 0"),
        (["opt-125m", "--sweep-len", "2"], "--sweep-len is 2"),
        (["opt-125m", "--batch-sizes", "8", "0"], "--batch-sizes has 0"),
        (["opt-125m", "--prompt-len", "2040"], "2048 positions"),
        (["opt-125m", "--our-settings", "--batch-size 0"], "at least 1"),
        (["opt-125m", "--memory-cap", "2 pigs"], "is not a size"),
        (["opt-125m", "--json", "/"], "--json / cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(machine, capsys, argv, message):
    assert status(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not machine


def test_a_cap_that_cannot_be_set_stops_at_once(machine, monkeypatch, capsys):
    def refuse(cap_bytes: int) -> None:
        raise OSError("memory cannot be capped")

    monkeypatch.setattr(compare, "ensure_can_cap", refuse)
    assert status(*ARGS, *OURS) == 2
    assert "memory cannot be capped" in capsys.readouterr().err
    assert not machine


def test_a_peer_that_is_not_installed_is_named_with_what_to_do(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    missing = tmp_path / "no" / "python"
    assert status(*ARGS, "--peers-python", str(missing)) == 2
    assert "make peers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interpreter_without_the_peer_is_no_peer(monkeypatch):
    monkeypatch.setattr(accelerate_system, "PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match="make peers"):
        Accelerate(python=pathlib.Path(sys.executable)).check()


def test_an_interpreter_with_the_peer_is_one(monkeypatch):
    monkeypatch.setattr(accelerate_system, "PACKAGES", ("json", "numpy"))
    Accelerate(python=pathlib.Path(sys.executable)).check()


def test_room_for_both_formats_is_asked_for_before_either_is_made(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    usage = mock.Mock(free=int(1.5 * weights.weights_bytes("opt-125m")))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="not enough space"):
        weights.make_weights("opt-125m", {"store", "hf"})
    assert not list(tmp_path.iterdir())


# The peer's script: it runs elsewhere, with packages that are not here.


@pytest.fixture
def script(monkeypatch):
    for name in ("accelerate", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    sys.modules["torch"].from_numpy = lambda array: array
    return runpy.run_path(str(SCRIPT))


def test_the_script_takes_the_command_that_runs_it(script):
    system = Accelerate(batch_sizes=(8, 16), layers=("disk", "host"))
    for ladder in system.ladders(JOB):
        for each in ladder:
            words = system.command(JOB, each, pathlib.Path("out.json"))
            args = script["build_parser"]().parse_args(words[2:])
            assert args.batch_size == each.num_rows
            assert (args.prompt_len, args.gen_len) == (8, 16)


def test_the_script_makes_the_prompts_that_flexjax_makes(script):
    prompts = script["random_prompts"](50272, 3, 5)
    case = Case(
        name="", model=None, policy=Policy(batch_size=3), prompt_len=5, gen_len=1
    )
    assert prompts.tolist() == random_prompts(case, 50272)


def test_the_script_knows_prompts_from_tokens(script):
    clock = script["StepClock"](4)
    for _ in range(1 + 4):
        clock.put(None)
    clock.end()
    assert len(clock.step_s) == 3
    assert clock.prefill_s + sum(clock.step_s) == pytest.approx(clock.arrivals_s[-1])


def test_only_layers_are_offloaded(script):
    places = script["device_map"](2, "disk", "cpu")
    on_disk = [name for name, place in places.items() if place == "disk"]
    assert on_disk == [f"model.decoder.layers.{i}" for i in range(2)]
