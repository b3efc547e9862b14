import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from bench.bounds import (
    COMPUTE,
    DISK_READ,
    DISK_WRITE,
    FROM_DEVICE,
    TO_DEVICE,
    bounds_s,
    fraction,
    phase_report,
)
from flexjax.policy import Tier

LINKS = [f"{a.value}->{b.value}" for a, b in itertools.permutations(Tier, 2)]
RESOURCES = [DISK_READ, DISK_WRITE, TO_DEVICE, FROM_DEVICE]

moves = st.dictionaries(st.sampled_from(LINKS), st.integers(0, 1 << 40))
rates = st.dictionaries(st.sampled_from(RESOURCES), st.floats(1e6, 1e12))
all_rates = st.fixed_dictionaries({name: st.floats(1e6, 1e12) for name in RESOURCES})
seconds = st.floats(1e-6, 1e6)


@hypothesis.given(moves, rates, seconds, seconds)
def test_the_fraction_is_of_the_largest_bound(moved, rates, compute_s, measured_s):
    bounds = bounds_s(moved, rates, compute_s)
    phase = {"seconds": measured_s, "bytes_moved": moved, "busy_s": {}}
    report = phase_report(phase, rates, compute_s)
    assert report["bound_s"] == bounds
    assert all(bounds[report["bound_by"]] >= bound for bound in bounds.values())
    fastest_s = report["fraction_of_bound"] * measured_s
    assert fastest_s == pytest.approx(max(bounds.values()))


@hypothesis.given(moves, rates, seconds)
def test_twice_the_bytes_take_twice_the_time(moved, rates, compute_s):
    once = bounds_s(moved, rates, compute_s)
    twice = bounds_s({link: 2 * n for link, n in moved.items()}, rates, compute_s)
    assert twice[COMPUTE] == compute_s
    for resource in once.keys() - {COMPUTE}:
        assert twice[resource] == pytest.approx(2 * once[resource])


@hypothesis.given(moves, all_rates, seconds)
def test_every_byte_between_tiers_is_bounded_by_one_resource(moved, rates, compute_s):
    bounds = bounds_s(moved, rates, compute_s)
    nbytes = sum(rates[name] * bounds.get(name, 0.0) for name in RESOURCES)
    assert nbytes == pytest.approx(sum(moved.values()))


def test_a_link_without_a_rate_bounds_nothing():
    assert bounds_s({"host->device": 1 << 30}, {}, 2.0) == {COMPUTE: 2.0}


def test_a_bound_is_bytes_by_bytes_per_second():
    rates = {DISK_READ: 2e9, DISK_WRITE: 1e9}
    moved = {"disk->device": 4_000_000_000, "host->disk": 500_000_000}
    assert bounds_s(moved, rates, 1.0) == {
        DISK_READ: 2.0,
        DISK_WRITE: 0.5,
        COMPUTE: 1.0,
    }


def test_a_phase_that_did_not_run_has_no_fraction():
    idle = {"seconds": 0.0, "bytes_moved": {}, "busy_s": {}}
    report = phase_report(idle, {}, 0.0)
    assert report["fraction_of_bound"] is None
    assert fraction(1.0, 2.0) == 0.5
