import threading

from hypothesis import given
from hypothesis import strategies as st

from flexjax.memory.ledger import Ledger
from flexjax.policy import Kind, Tier
from tests.common import held_on

HOLDS = st.lists(
    st.tuples(st.sampled_from(Tier), st.sampled_from(Kind), st.integers(-50, 100))
)


@given(HOLDS, HOLDS)
def test_peaks_are_the_most_that_was_held_since_the_start(before, after):
    ledger, now = Ledger(), dict.fromkeys(Tier, 0)

    def hold_all(holds) -> None:
        for tier, kind, nbytes in holds:
            ledger.hold(tier, kind, nbytes)
            now[tier] += nbytes
            peak[tier] = max(peak[tier], now[tier])

    for holds in (before, after):
        ledger.start()
        peak = dict(now)
        hold_all(holds)
        for tier in Tier:
            assert held_on(ledger, tier) == now[tier]
            assert sum(ledger.held(tier, kind) for kind in Kind) == now[tier]
            assert ledger.peak(tier) == peak[tier]


@given(
    st.lists(
        st.tuples(st.sampled_from(Tier), st.sampled_from(Tier), st.integers(1, 1 << 40))
    )
)
def test_transfers_add_up_by_link(moves):
    ledger = Ledger()
    for source, target, nbytes in moves:
        ledger.move(source, target, nbytes)
    links = {(source, target) for source, target, _ in moves}
    assert ledger.moved() == {
        link: sum(nbytes for *used, nbytes in moves if tuple(used) == link)
        for link in links
    }
    ledger.start()
    assert ledger.moved() == {}


def test_what_threads_count_at_the_same_time_is_all_counted():
    ledger = Ledger()

    def count() -> None:
        for _ in range(2000):
            ledger.hold(Tier.HOST, Kind.WEIGHTS, 3)
            ledger.hold(Tier.HOST, Kind.WEIGHTS, -2)
            ledger.move(Tier.DISK, Tier.HOST, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held_on(ledger, Tier.HOST) == 8000
    assert ledger.moved() == {(Tier.DISK, Tier.HOST): 8000}
    assert 8000 <= ledger.peak(Tier.HOST) <= 8000 + 4 * 3
