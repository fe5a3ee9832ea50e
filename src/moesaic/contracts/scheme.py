"""How numbers are stored and how they travel, as data: weight formats, activation encodings, and schemes.

A *format* says how a weight is stored, an *encoding* how the rows that meet it are. A *scheme* is the pair, under the
name that the field uses. The arithmetic of each lives in `formats/`, one file per name; nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("bf16", "fp8_tensor", "fp8_channel", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "int4")
ENCODINGS = ("bf16", "fp8_tensor", "fp8_token", "fp8_group128", "mxfp8", "nvfp4")
KV_FORMATS = ("bf16", "fp8")
"""How keys, values and latents are cached. `bf16`: in the dtype in which the model computes.  `fp8`: E4M3."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One of FORMATS with what it leaves open.

    group: elements along K that share a scale (int4: 32 or 128).  scale_dtype: how those scales are stored where the
    checkpoint decides (int4).  zero_points: int4 codes are relative to a stored zero point of their group.
    `bf16` stands for "not quantised": the tensor then has the dtype in which the model computes.
    """

    name: str
    group: int = 0
    scale_dtype: str = "float32"
    zero_points: bool = False

    def __str__(self) -> str:
        return f"{self.name}_g{self.group}" if self.group else self.name


@dataclass(frozen=True, slots=True)
class Encoding:
    """One of ENCODINGS. static: its tensor-wide scale was calibrated and comes with the checkpoint."""

    name: str
    static: bool = False

    def __str__(self) -> str:
        return f"{self.name} (static)" if self.static else self.name

    @property
    def by_row(self) -> bool:
        """Whether the codes of a row depend on that row alone; where not, on all that are encoded with it."""
        return self.static or self.name != "fp8_tensor"


@dataclass(frozen=True, slots=True)
class Scheme:
    """The format of a weight and the encoding of the rows that it multiplies."""

    name: str
    weight: WeightFormat
    activation: Encoding

    @property
    def quantized(self) -> bool:
        return self.weight.name != "bf16"


def _scheme(name: str, weight: WeightFormat, activation: str, static: bool = False) -> Scheme:
    return Scheme(name, weight, Encoding(activation, static))


UNQUANTIZED = _scheme("bf16", WeightFormat("bf16"), "bf16")
_INT4, _INT4_32 = WeightFormat("int4", 128, "bfloat16"), WeightFormat("int4", 32, "bfloat16")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        UNQUANTIZED,
        _scheme("fp8", WeightFormat("fp8_block"), "fp8_group128"),
        _scheme("fp8a16", WeightFormat("fp8_block"), "bf16"),
        _scheme("fp8_tensor", WeightFormat("fp8_tensor"), "fp8_tensor"),
        _scheme("fp8_tensor_static", WeightFormat("fp8_tensor"), "fp8_tensor", static=True),
        _scheme("fp8_channel", WeightFormat("fp8_channel"), "fp8_token"),
        _scheme("mxfp8", WeightFormat("mxfp8"), "mxfp8"),
        _scheme("mxfp8a16", WeightFormat("mxfp8"), "bf16"),
        _scheme("mxfp4", WeightFormat("mxfp4"), "bf16"),
        _scheme("mxfp4a8", WeightFormat("mxfp4"), "mxfp8"),
        _scheme("nvfp4", WeightFormat("nvfp4"), "nvfp4", static=True),
        _scheme("nvfp4_dynamic", WeightFormat("nvfp4"), "nvfp4"),
        _scheme("nvfp4a16", WeightFormat("nvfp4"), "bf16"),
        _scheme("w4afp8", _INT4, "fp8_tensor"),
        _scheme("w4afp8_static", _INT4, "fp8_tensor", static=True),
        _scheme("w4afp8_token", _INT4, "fp8_token"),
        _scheme("wna16", _INT4, "bf16"),
        _scheme("wna16_g32", _INT4_32, "bf16"),
    )
}
"""Every scheme by the name that a user types. Checkpoints may bring others (another group, another scale dtype)."""
