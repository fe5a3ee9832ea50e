"""Shared by all tests: no network, the same random numbers each time, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
import sys

# Before anything imports huggingface_hub: a test that reaches for the network fails at once instead of hanging.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest

try:
    import hypothesis
except ImportError:  # a machine lent for its GPU has few packages, and the GPU ring needs none
    pass
else:
    # Derandomised: a failure in CI is the failure that a developer sees. `--hypothesis-profile explore` looks for more.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
    hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
    hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Triton decides when it is imported whether kernels are interpreted: everywhere but in the GPU ring."""
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device; torch is imported only if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch before each test, so that a test gives the same result alone, in any order and in the suite."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
