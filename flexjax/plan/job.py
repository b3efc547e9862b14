"""What is to be generated, in the numbers that a plan needs."""

import dataclasses
import math

from flexjax.arrangement import shape_of
from flexjax.memory.routes import shares_prefixes
from flexjax.plan.closed_form import Lengths
from flexjax.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be generated.

    Attributes:
        prompt_len: tokens of the longest prompt, but for those that it shares.
        gen_len: tokens that each prompt gets.
        num_prompts: of about this length.
        num_shared: tokens with which prompts begin alike.
        rows_per_prefix: how many of them do, on average; 0 stands for all.
        fewest_per_prefix: the same of those that are fewest.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int
    num_shared: int = 0
    rows_per_prefix: int = 0
    fewest_per_prefix: int = 0

    @property
    def lengths(self) -> Lengths:
        return Lengths(
            self.prompt_len,
            self.gen_len,
            self.num_shared,
            self.rows_per_prefix,
            self.fewest_per_prefix,
        )

    def under(self, policy: Policy, *, device_is_host: bool) -> "Job":
        """The same of whole prompts, where the policy's attention cannot share."""
        if shares_prefixes(policy, device_is_host=device_is_host):
            return self
        return Job(
            prompt_len=self.prompt_len + self.num_shared,
            gen_len=self.gen_len,
            num_prompts=self.num_prompts,
        )

    def num_rows(self, policy: Policy) -> int:
        """Rows of all blocks, with those that fill up batches behind a prefix.

        Of a policy whose batches are no larger than the groups are.
        """
        alike = self.rows_per_prefix
        if not 0 < alike < self.num_prompts:
            return self.num_prompts
        size = policy.batch_size
        return math.ceil(self.num_prompts / alike * math.ceil(alike / size)) * size

    def num_blocks(self, policy: Policy) -> float:
        """So many blocks of a policy; one that is not full takes about as long."""
        shape = shape_of(policy, policy.block_size, self.rows_per_prefix)
        rows = shape.batch_size * shape.num_batches
        return max(1.0, self.num_rows(policy) / rows)

    def num_at_once(self, policy: Policy) -> int:
        """Prompts of a block."""
        return max(1, round(self.num_prompts / self.num_blocks(policy)))

    def joined(self, other: "Job") -> "Job":
        """A job that asks for as much as either, of everything."""
        several = [job for job in (self, other) if job.rows_per_prefix]
        return Job(
            prompt_len=max(self.prompt_len, other.prompt_len),
            gen_len=max(self.gen_len, other.gen_len),
            num_prompts=max(self.num_prompts, other.num_prompts),
            num_shared=max(self.num_shared, other.num_shared),
            rows_per_prefix=min((job.rows_per_prefix for job in several), default=0),
            fewest_per_prefix=min(
                (job.fewest_per_prefix for job in several), default=0
            ),
        )


NOTHING = Job(prompt_len=0, gen_len=0, num_prompts=0)
