"""The hardware as data, and what this machine is. Torch-free."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags (x86 and Arm) of which any one means that BF16 products run in hardware."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """name: as users say it.  features: instruction sets that contracts may require.  memory: bytes."""

    name: str
    device: str
    memory: int
    features: frozenset[str] = frozenset()

    @property
    def native_bf16(self) -> bool:
        return self.device != "cpu" or bool(self.features & NATIVE_BF16)


def local_cpu() -> Hardware:
    """This machine's processor. Memory is what the system says is available now."""
    fields = key_values(Path("/proc/cpuinfo"))
    flags = fields.get("flags", fields.get("Features", ""))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Hardware(name, "cpu", available_memory(), frozenset(flags.split()))


def available_memory() -> int:
    """Bytes that can be taken without swapping, as far as the system tells."""
    line = key_values(Path("/proc/meminfo")).get("MemAvailable", "")
    if line:
        return int(line.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def key_values(path: Path) -> dict[str, str]:
    """The first value of every `key : value` line; empty where there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
