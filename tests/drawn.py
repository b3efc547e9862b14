"""Workloads and endings that hypothesis draws, for the tests of schedules."""

from hypothesis import strategies as st

from flexjax.schedule.emit import Alive
from flexjax.workload import Workload


@st.composite
def works(draw: st.DrawFn, *, most_tokens: int = 4) -> Workload:
    """Small workloads: single layers, batches and tokens among them."""
    num_decoder_layers = draw(st.integers(1, 4))
    num_head_blocks = draw(st.integers(1, 3))
    num_batches = draw(st.integers(1, 5))
    prefix_len = draw(st.sampled_from([0, 0, 32]))
    prompt_len = draw(st.integers(1, 70))
    shorter = st.sampled_from([prompt_len, prompt_len, (prompt_len + 1) // 2])
    prompt_lens = tuple(draw(shorter) for _ in range(num_batches))
    ends = draw(st.sets(st.integers(1, num_batches))) | {num_batches}
    return Workload(
        num_decoder_layers=num_decoder_layers,
        num_head_blocks=num_head_blocks,
        num_parts=draw(st.integers(1, 5)),
        layers_ahead=draw(st.integers(1, num_decoder_layers + num_head_blocks - 1)),
        blocks_per_layer=draw(st.integers(1, 3)),
        num_batches=num_batches,
        batch_size=draw(st.integers(1, 6)),
        prompt_len=max(prompt_lens),
        prompt_lens=prompt_lens if len(set(prompt_lens)) > 1 else (),
        prefix_len=prefix_len,
        prefix_ends=tuple(sorted(ends)) if prefix_len else (),
        scores_prefixes=draw(st.booleans()),
        gen_len=draw(st.integers(1, most_tokens)),
        reserves=draw(st.booleans()),
    )


@st.composite
def endings(draw: st.DrawFn, work: Workload) -> list[int]:
    """How many steps each batch lives; all see the prefill."""
    ends = st.integers(1, work.gen_len)
    return [draw(ends) for _ in range(work.num_batches)]


@st.composite
def works_with_endings(draw: st.DrawFn) -> tuple[Workload, list[int]]:
    work = draw(works())
    return work, draw(endings(work))


def until(ends: list[int]) -> Alive:
    """Batches that live as many steps as `ends` says."""
    return lambda step, batch: step < ends[batch]
