"""Moesaic: Mixture-of-Experts inference in which low precision is a checked contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.llm import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the API on first use, so that `import moesaic.engine.scheduler` does not import torch."""
    if name in ("LLM", "SamplingParams"):
        from moesaic import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
