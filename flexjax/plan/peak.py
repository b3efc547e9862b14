"""The peak bytes of a run, without its schedule: as many or more, and found quickly."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from flexjax.memory.footprint import RunFootprint, cache_rows, hidden_rows
from flexjax.memory.placement import Rows
from flexjax.policy import Kind, Tier
from flexjax.schedule.emit import hidden_stays
from flexjax.schedule.footprint import Bytes
from flexjax.schedule.ops import Cache, Cell, Hidden, Weights

Counted = Counter[tuple[Tier, Kind]]


def peak_from_above(sizes: RunFootprint, *, alike: bool = False) -> Counted:
    """What `flexjax.schedule.footprint.peak_bytes` would say of `zigzag`, or more.

    Beside what is at home, `zigzag` holds `layers_ahead + 1` layers' weights, or in
    place of each `blocks_per_layer` blocks of the head; two caches; and two hidden
    states, or of one batch, whose hidden state stays, one and what is made of it; and
    of prefixes two caches made and two loaded, and the states of all, as they are made
    of their tokens and then of each other.

    Args:
        sizes: of a run.
        alike: all its caches are alike, and all its hidden states.
    """
    work = sizes.work
    last = work.gen_len - 1
    total = Counter(sizes.resident())
    layers = [
        _sum(sizes.loaded(Weights(layer, part), 0) for part in range(work.num_parts))
        for layer in (range(1) if alike else range(work.num_decoder_layers))
    ]
    if not alike:  # else a layer stands for the blocks too, which are no larger
        layers += [
            _sum([sizes.loaded(Weights(layer), 0)] * work.blocks_per_layer)
            for layer in range(work.num_decoder_layers, work.num_layers)
        ]
    _add(total, _most(layers), work.layers_ahead + 1)
    if last > 0:
        caches = _caches(sizes, range(work.num_batches), alike=alike)
        _add_homes(total, sizes, caches, last - 1)
        _add(total, _most([sizes.loaded(cache, last) for cache in caches]), 2)
    if not hidden_stays(sizes.policy.schedule, work):
        _add_homes(total, sizes, _states(sizes, alike=alike), 0)
    _add(total, sizes.loaded(Hidden(0), 0), min(2, work.num_batches))
    for size in sizes.computed(Cell(0, 0, 0)).values():
        _add(total, size, 2)
    cells = [Cell(0, 0, 0), Cell(last, 0, 0)]
    if work.prefixes:
        cells.append(Cell(0, 0, work.prefixes[0]))
        _add_prefixes(total, sizes, alike=alike)
    _add(total, _most([sizes.workspace(cell) for cell in cells]))
    return total


def _add_prefixes(total: Counted, sizes: RunFootprint, *, alike: bool) -> None:
    """Adds what rows share: two made or loaded, of all layers at home."""
    prefixes = sizes.work.prefixes
    computed = sizes.computed(Cell(0, 0, prefixes[0]))
    for buffer, size in computed.items():
        # All states stay, and one more is made of one.
        _add(total, size, 2 if isinstance(buffer, Cache) else len(prefixes) + 1)
    _add(total, sizes.loaded(Hidden(prefixes[0]), 0), len(prefixes))
    if sizes.work.gen_len > 1:
        caches = _caches(sizes, prefixes, alike=alike)
        for cache, count in caches.items():
            _add(total, sizes.stored(cache, 0), count)
        _add(total, _most([sizes.loaded(cache, 1) for cache in caches]), 2)


def _caches(
    sizes: RunFootprint, batches: Sequence[int], *, alike: bool
) -> Mapping[Cache, int]:
    """One of the caches whose rows are on the same tiers, and how many of them are."""
    work, policy = sizes.work, sizes.policy
    if alike:
        return {Cache(0, batches[0]): work.num_decoder_layers * len(batches)}
    first: dict[Rows, Cache] = {}
    layers = range(work.num_decoder_layers)
    caches = itertools.starmap(Cache, itertools.product(layers, batches))
    return Counter(first.setdefault(cache_rows(policy, work, c), c) for c in caches)


def _states(sizes: RunFootprint, *, alike: bool) -> Mapping[Hidden, int]:
    """The same of hidden states."""
    work, policy = sizes.work, sizes.policy
    if alike:
        return {Hidden(0): work.num_batches}
    first: dict[Rows, Hidden] = {}
    states = map(Hidden, range(work.num_batches))
    return Counter(first.setdefault(hidden_rows(policy, work, s), s) for s in states)


def _add_homes(
    total: Counted,
    sizes: RunFootprint,
    counts: Mapping[Cache, int] | Mapping[Hidden, int],
    step: int,
) -> None:
    """Adds what all buffers take up at home, and two of the largest once more."""
    for buffer, count in counts.items():
        _add(total, sizes.stored(buffer, step), count)
    _add(total, _most([sizes.stored(buffer, step) for buffer in counts]), 2)


def _sum(sizes: Iterable[Bytes]) -> Counted:
    total: Counted = Counter()
    for size in sizes:
        _add(total, size)
    return total


def _most(sizes: Iterable[Bytes]) -> Counted:
    """The largest of each kind on each tier."""
    most: Counted = Counter()
    for size in sizes:
        for key, nbytes in size.items():
            most[key] = max(most[key], nbytes)
    return most


def _add(total: Counted, more: Bytes, times: int = 1) -> None:
    for key, nbytes in more.items():
        total[key] += times * nbytes
