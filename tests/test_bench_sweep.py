"""The best setting of a system is found, and compared with that of others."""

import dataclasses
import pathlib

import pytest

from bench.peers.flexjax_system import Flexjax, default_ladders, parse_setting
from bench.peers.report import attempt_to_json, ratio, result_to_json, table
from bench.peers.sweep import PATIENCE, Result, climb, find_best
from bench.peers.system import Attempt, Failed, Job, Measured, Setting

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
