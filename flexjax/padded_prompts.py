"""The token ids of a block of prompts, as its layers take them in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.arrangement import Block
from flexjax.workload import Workload


class PaddedPrompts:
    """Prompts of a block, left-padded; batches that are not full are filled up.

    Args of the constructor:
        prompts: whole ones.
        work: the block's shape; what its batches share are rows of their own.
        pad_token_id: what they are filled up with.

    Raises:
        ValueError: prompts that are to share what they begin with do not.
    """

    def __init__[Tokens: Sequence[int]](
        self, prompts: Block[Tokens], work: Workload, pad_token_id: int
    ) -> None:
        self._pad_token_id = pad_token_id
        self._ids: dict[int, np.ndarray] = {}
        self._start: dict[int, jax.Array] = {}
        self._origin: dict[int, jax.Array] = {}
        shared: dict[int, list[int]] = {}
        for number, batch in enumerate(prompts.batches):
            count, prefix = 0, work.prefix_of(number)
            if prefix is not None:
                count = prompts.shared_by(number)
                begin = shared.setdefault(prefix, list(batch[0][:count]))
                if any(list(prompt[:count]) != begin for prompt in batch):
                    raise ValueError(
                        f"prompts of a block are to begin with the same {count} tokens "
                        "and do not, or not any more; leave prompts alone until the "
                        "run has ended"
                    )
            own = [prompt[count:] for prompt in batch]
            size = (work.batch_size, work.prompt_slots(number))
            self._add(number, own, size, before=count)
        for prefix, begin in shared.items():
            self._add(prefix, [begin], (1, work.prefix_len), before=0)

    def _add(
        self,
        batch: int,
        rows: Sequence[Sequence[int]],
        size: tuple[int, int],
        *,
        before: int,
    ) -> None:
        """Pads `rows`, before each of which so many tokens stand."""
        ids = np.full(size, self._pad_token_id, np.int32)
        start = np.full(size[0], size[1] - 1, np.int32)
        for place, tokens in enumerate(rows):
            start[place] = size[1] - len(tokens)
            ids[place, start[place] :] = tokens
        self._ids[batch], self._start[batch] = ids, jnp.asarray(start)
        self._origin[batch] = jnp.asarray(start - before)

    def token_ids(self, batch: int) -> np.ndarray:
        """Int32 `[batch, slots]`."""
        return self._ids[batch]

    def start(self, batch: int) -> jax.Array:
        """See `Rows.start`."""
        return self._start[batch]

    def origin(self, batch: int) -> jax.Array:
        """See `Rows.origin`."""
        return self._origin[batch]
