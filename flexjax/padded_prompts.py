"""The token ids of a block of prompts, as its layers take them in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.schedule.ops import PREFIX
from flexjax.workload import Workload


class PaddedPrompts:
    """Prompts of a block, left-padded, in batches; the last batch is filled up.

    Args of the constructor:
        prompts: whole ones.
        work: the block's shape.
        pad_token_id: what they are filled up with.
        num_shared: with how many tokens all of them begin; these are a row of their
            own, `PREFIX`.

    Raises:
        ValueError: they do not begin with the same `num_shared` tokens.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        work: Workload,
        pad_token_id: int,
        num_shared: int,
    ) -> None:
        size = (work.num_batches, work.batch_size)
        self._ids = np.full((*size, work.prompt_len), pad_token_id, np.int32)
        start = np.full(size, work.prompt_len - 1, np.int32)
        shared = list(prompts[0][:num_shared])
        for place, prompt in enumerate(prompts):
            if list(prompt[:num_shared]) != shared:
                raise ValueError(
                    f"prompts were said to share {num_shared} tokens, but those of a "
                    "block do not"
                )
            at = divmod(place, work.batch_size)
            start[at] = work.prompt_len + num_shared - len(prompt)
            self._ids[at][start[at] :] = prompt[num_shared:]
        self._start = {number: jnp.asarray(batch) for number, batch in enumerate(start)}
        self._origin = {
            number: jnp.asarray(batch - num_shared)
            for number, batch in enumerate(start)
        }
        if num_shared:
            first = work.prefix_len - num_shared
            self._prefix = np.full((1, work.prefix_len), pad_token_id, np.int32)
            self._prefix[0, first:] = shared
            self._start[PREFIX] = self._origin[PREFIX] = jnp.asarray([first], jnp.int32)

    def token_ids(self, batch: int) -> np.ndarray:
        """Int32 `[batch, slots]`."""
        return self._prefix if batch == PREFIX else self._ids[batch]

    def start(self, batch: int) -> jax.Array:
        """See `Rows.start`."""
        return self._start[batch]

    def origin(self, batch: int) -> jax.Array:
        """See `Rows.origin`."""
        return self._origin[batch]
