"""Reading a config.json that nobody vouches for: typed access, and errors that name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesaic.contracts.spec import SILU, Activation, RopeSpec, Yarn
from moesaic.errors import CheckpointError, UnsupportedError

MISSING: Any = object()
LARGEST, MOST = 1 << 24, 1 << 12


class Fields:
    """A JSON object with typed getters. Every getter raises CheckpointError naming `file: field`."""

    def __init__(self, values: Mapping[str, Any], file: str = "config.json") -> None:
        self.values, self.file = values, file

    def integer(self, name: str, default: Any = MISSING, least: int = 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            raise self.bad(name, f"must be an integer >= {least}, not {value!r:.80}")
        return value

    def number(self, name: str, default: Any = MISSING, above: float = -1e30) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < 1e30:
            raise self.bad(name, f"must be a number{f' above {above:g}' if above > -1e30 else ''}, not {value!r:.80}")
        return float(value)

    def count(self, name: str, default: Any = MISSING, least: int = 1) -> int:
        """How many layers or experts: each costs objects, so the bound is closer than that of a size."""
        value = self.integer(name, default, least)
        if value > MOST:
            raise self.bad(name, f"must be at most {MOST}, not {value}")
        return value

    def flag(self, name: str, default: Any = MISSING) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, f"must be true or false, not {value!r:.80}")
        return value

    def text(self, name: str, default: Any = MISSING) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.bad(name, f"must be a string, not {value!r:.80}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer, a list of integers or null -> a tuple."""
        value = self.get(name, None)
        many = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in many):
            raise self.bad(name, f"must be a non-negative integer or a list of them, not {value!r:.80}")
        return tuple(many)

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self.values.get(name) is not None

    def inner(self, name: str) -> Fields:
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise self.bad(name, f"must be an object, not {value!r:.80}")
        return Fields(value, f"{self.file}: {name}")

    def get(self, name: str, default: Any = MISSING) -> Any:
        """The value; null counts as absent."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is MISSING:
            raise self.bad(name, "is missing")
        return default

    def bad(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{name} {what}", where=self.file, remedy="Restore the file from the model's original repository."
        )


def rope_fields(fields: Fields) -> Fields:
    """The rope settings in either spelling: `rope_parameters` (new), or `rope_theta` with `rope_scaling` (old).

    A `rope_scaling` beside `rope_parameters` wins: that is how people extend the context of a new-style config.
    """
    name = "rope_scaling" if fields.get("rope_scaling", None) else "rope_parameters"
    settings = dict(fields.inner(name).values) if fields.has(name) else {}
    settings.setdefault("rope_theta", fields.get("rope_theta", None))
    return Fields(settings, fields.file)


def read_rope(fields: Fields, dim: int, *, interleaved: bool, default_theta: float = 10000.0,
              default_part: float = 1.0) -> RopeSpec:  # fmt: skip
    """The rotary embedding of a config for heads of `dim`. Raises UnsupportedError for a scaling not implemented."""
    rope = rope_fields(fields)
    theta = rope.number("rope_theta", default_theta, above=1)
    kind = rope.text("rope_type", rope.text("type", "default"))
    part = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", default_part), above=0)
    dim = int(dim * part)
    if part > 1 or dim < 2 or dim % 2:
        raise fields.bad("partial_rotary_factor", f"({part}) must leave an even number of rotated elements, not {dim}")
    if kind == "default":
        return RopeSpec(dim, theta, interleaved)
    if kind == "linear":
        return RopeSpec(dim, theta, interleaved, linear_factor=rope.number("factor", above=0))
    if kind == "yarn":
        return RopeSpec(dim, theta, interleaved, yarn=read_yarn(rope, fields))
    raise UnsupportedError(
        f"rope scaling {kind!r} is not implemented", where=fields.file, remedy="Supported: default, linear, yarn."
    )


def read_yarn(rope: Fields, fields: Fields) -> Yarn:
    """YaRN settings; attention factor from the config, the ratio of its two mscales, or the paper's 0.1 ln s + 1."""
    original = rope.integer("original_max_position_embeddings", fields.get("max_position_embeddings"))
    factor = rope.number("factor", fields.integer("max_position_embeddings") / original, above=0)
    mscale, all_dims = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if rope.has("attention_factor"):
        attention = rope.number("attention_factor")
    elif mscale and all_dims:
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dims)
    else:
        attention = yarn_mscale(factor)
    return Yarn(
        factor, original, rope.number("beta_fast", 32.0) or 32.0, rope.number("beta_slow", 1.0) or 1.0, attention,
        rope.flag("truncate", True),
    )  # fmt: skip


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(s) + 1 (arXiv 2309.00071 eq. 22, with DeepSeek's multiplier m)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_activation(fields: Fields) -> Activation:
    name = fields.text("hidden_act", "silu")
    if name not in ("silu", "swish"):
        raise UnsupportedError(f"activation {name!r} is not implemented", where=fields.file, remedy="Supported: silu.")
    return SILU


def read_dtype(fields: Fields) -> str:
    """The name of the dtype in which the checkpoint says it was saved."""
    return fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
