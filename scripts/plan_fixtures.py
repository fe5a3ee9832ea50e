"""Published checkpoints without their weights: directories whose safetensors files have real headers and no data.

`tests/plan_fixtures/<name>.json` holds what was published: the repository, its config.json, and every tensor's name,
dtype and shape, where many names stand in one pattern: `{0..60}` counts, `{gate,up}` lists. The data of a written file
is a hole, so that a directory of 700 GB takes the disk space of its headers.

    python -m scripts.plan_fixtures deepseek-v3-fp8 /tmp/deepseek      then: moesaic plan /tmp/deepseek
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moesaic.hardware import Hardware

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "plan_fixtures"
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}
SHARD_BYTES = 5_000_000_000
FEATURES = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"})
CPU = Hardware("a processor with AVX-512 BF16", "cpu", 64 * 10**9, FEATURES)
"""A fixed one: plans for this machine's own differ from machine to machine."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype as safetensors calls it, shape)."""


@dataclass(frozen=True)
class Fixture:
    """name: of its file.  source: the repository that published it.  sidecar: hf_quant_config.json, where there is one.

    parameters: as the repository's index or model page counts them, None where it counts none.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    sidecar: Mapping[str, Any] | None
    tensors: Tensors
    parameters: int | None

    @property
    def nbytes(self) -> int:
        return sum(nbytes(*each) for each in self.tensors.values())


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def read(name: str) -> Fixture:
    """`like` names a fixture whose config this one's amends; the tensors are always complete."""
    held = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    base = dict(read(held["like"]).config) if "like" in held else {}
    config = {key: value for key, value in (base | lists(held["config"])).items() if value is not None}
    tensors: Tensors = {}
    for pattern, what in held["tensors"].items():
        dtype, _, sizes = what.partition(" ")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        for each in expand(pattern):
            if each in tensors:
                raise ValueError(f"{name}: {each} is described twice")
            tensors[each] = (dtype, shape)
    sidecar = lists(held["sidecar"]) if "sidecar" in held else None
    return Fixture(name, held["source"], config, sidecar, tensors, held.get("parameters"))


def expand(pattern: str) -> Iterator[str]:
    """Every name of a pattern, the last braces turning fastest."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else list(alternatives(part)) for i, part in enumerate(parts)]
    return ("".join(each) for each in itertools.product(*choices))


def alternatives(inside: str) -> Iterator[str]:
    for part in inside.split(","):
        first, dots, last = part.partition("..")
        yield from (map(str, range(int(first), int(last) + 1)) if dots else (part,))


def lists(value: Any) -> Any:
    """The same JSON with patterns in lists of names expanded; regular expressions (`re:`) have braces of their own."""
    if isinstance(value, dict):
        return {key: lists(each) for key, each in value.items()}
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [name for each in value for name in ([each] if each.startswith("re:") else expand(each))]
    return value


def shortened(fixture: Fixture, layers: int) -> Fixture:
    """The same checkpoint with its first layers only, and its drafts behind them."""
    count = int(fixture.config["num_hidden_layers"])

    def moved(name: str) -> str | None:
        found = re.search(r"\blayers\.(\d+)\b", name)
        at = int(found.group(1)) if found else 0
        if not found or at < layers:
            return name
        return f"{name[: found.start(1)]}{layers + at - count}{name[found.end(1) :]}" if at >= count else None

    def inside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inside(each) for key, each in value.items()}
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return [new for each in value if (new := moved(each))]
        return value

    config = inside(dict(fixture.config)) | {"num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    tensors = {new: each for name, each in fixture.tensors.items() if (new := moved(name))}
    return replace(fixture, config=config, sidecar=inside(fixture.sidecar), tensors=tensors, parameters=None)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEMSIZE[dtype] * math.prod(shape)


def write(fixture: Fixture, directory: Path) -> None:
    """config.json, the index, and shards of at most `SHARD_BYTES` whose data was never written."""
    directory.mkdir(parents=True, exist_ok=True)
    put(directory / "config.json", fixture.config)
    if fixture.sidecar is not None:
        put(directory / "hf_quant_config.json", fixture.sidecar)
    shards = list(deal(fixture.tensors))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):06}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(directory / file, shard)
    index = {"metadata": {"total_size": fixture.nbytes}, "weight_map": weight_map}
    put(directory / "model.safetensors.index.json", index)


def deal(tensors: Tensors) -> Iterator[Tensors]:
    shard: Tensors = {}
    held = 0
    for name, each in tensors.items():
        if shard and held + nbytes(*each) > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = each
        held += nbytes(*each)
    yield shard


def write_shard(path: Path, shard: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in shard.items():
        end = at + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def put(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in names():
        print(f"usage: python -m scripts.plan_fixtures NAME DIRECTORY\nnames: {', '.join(names())}", file=sys.stderr)
        return 2
    write(read(sys.argv[1]), Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
