"""A case: a model, a policy and the shape of the prompts, under a name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexjax.models.config import OPTConfig
from flexjax.policy import Policy, from_json, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One whole run.

    Attributes:
        name: what the command line calls it; empty if it was put together there.
        model: a published model's name, a folder, or None for the embedded model.
        policy: not validated: some cases wait for what the engine cannot do yet.
        prompt_len: tokens of every prompt; there is one block of prompts.
        gen_len: tokens that are generated for each.
        cold: whether the page cache is dropped before the run.
        memory_cap_bytes: most memory that the run may take, page cache included.
        note: what the case is there for.
    """

    name: str
    model: str | None
    policy: Policy
    prompt_len: int
    gen_len: int
    cold: bool = False
    memory_cap_bytes: int | None = None
    note: str = ""

    def ensure_fits(self, config: OPTConfig) -> None:
        """Raises ValueError if the model has too few positions for the run."""
        for name, length in (("prompt", self.prompt_len), ("gen", self.gen_len)):
            if length < 1:
                raise ValueError(f"--{name}-len is {length}, expected at least 1")
        most, wanted = config.max_position_embeddings, self.prompt_len + self.gen_len
        if wanted > most:
            raise ValueError(
                f"prompts of {self.prompt_len} tokens and {self.gen_len} new ones need "
                f"{wanted} positions, but the model has {most}; shorten one of them"
            )


def case_to_json(case: Case) -> dict[str, Any]:
    """A JSON object that `case_from_json` reads back."""
    return dataclasses.asdict(case) | {"policy": to_json(case.policy)}


def case_from_json(values: Mapping[str, Any]) -> Case:
    """Reads what `case_to_json` wrote; the policy is validated."""
    return Case(**{**values, "policy": from_json(values["policy"])})
