"""The hardware as data, and what this machine is. Torch-free."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags (x86 and Arm) of which any one means that BF16 products run in hardware."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """name: as users say it.  features: instruction sets that contracts may require.  memory: bytes.

    arch: CUDA compute capability times ten, 0 elsewhere.  bandwidth: of memory, bytes/s.  peaks: dense products per
    second (a multiplication and an addition are two), by the dtype of the operands.
    """

    name: str
    device: str
    memory: int
    features: frozenset[str] = frozenset()
    arch: int = 0
    bandwidth: float = 0.0
    peaks: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def native_bf16(self) -> bool:
        return self.device != "cpu" or bool(self.features & NATIVE_BF16)


def gpu(name: str, arch: int, gigabytes: float, bandwidth: float, device: str = "cuda", **peaks: float) -> Hardware:
    """gigabytes: 10^9 bytes.  bandwidth: 10^12 bytes/s.  peaks: 10^12 operations/s."""
    tera = {dtype: peak * 1e12 for dtype, peak in peaks.items()}
    return Hardware(name, device, int(gigabytes * 1e9), frozenset(), arch, bandwidth * 1e12, tera)


GPUS: dict[str, Hardware] = {
    each.name: each
    for each in (
        gpu("a100", 80, 80, 2.04, bf16=312),
        gpu("h100", 90, 80, 3.35, bf16=989, fp8=1979),
        gpu("h200", 90, 141, 4.8, bf16=989, fp8=1979),
        gpu("b200", 100, 180, 8.0, bf16=2250, fp8=4500, fp4=9000),
        gpu("gb300", 103, 279, 8.0, bf16=2500, fp8=5000, fp4=15000),
        gpu("rtx5090", 120, 32, 1.79, bf16=209.5, fp8=419, fp4=1676),
        gpu("mi300x", 0, 192, 5.3, device="hip", bf16=1307, fp8=2615),
    )
}
"""GPUs by the name that a user types: the vendors' data sheets, dense rates. What kernels reach of them is measured in
benchmarks/."""


def local_cpu() -> Hardware:
    """This machine's processor. Memory is what the system says is available now."""
    fields = key_values(Path("/proc/cpuinfo"))
    flags = fields.get("flags", fields.get("Features", ""))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Hardware(name, "cpu", available_memory(), frozenset(flags.split()))


def local_gpu() -> Hardware | None:
    """This machine's first CUDA device, with the rates of its kind where GPUS has them; None where there is none.

    Memory is what is free now. Asks torch, which is imported here so that this file stays light.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    name, (major, minor) = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    known = next((each for each in GPUS.values() if each.name in name.lower().split()), None)
    memory, arch = torch.cuda.mem_get_info(0)[0], 10 * major + minor
    return Hardware(name, "cuda", memory, frozenset(), arch, known.bandwidth if known else 0.0,
                    known.peaks if known else {})  # fmt: skip


def local(device: str) -> Hardware | None:
    """What `auto` (a GPU where there is one), `cpu` or `cuda` means here; None for a GPU that this machine lacks."""
    if device == "cpu":
        return local_cpu()
    return local_gpu() or (local_cpu() if device == "auto" else None)


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
