"""Runs language models larger than the accelerator's memory, for throughput.

The public names are loaded when they are first used (PEP 562), so that importing
`flexjax`, or one small module of it, loads no model code.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexjax.llm import LLM
    from flexjax.outputs import CompletionOutput, Logprob, RequestOutput, Scores
    from flexjax.policy import Placement, Policy, Tier
    from flexjax.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "Placement",
    "Policy",
    "RequestOutput",
    "SamplingParams",
    "Scores",
    "Tier",
]

_HOME = {
    "LLM": "llm",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "Placement": "policy",
    "Policy": "policy",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "Scores": "outputs",
    "Tier": "policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
