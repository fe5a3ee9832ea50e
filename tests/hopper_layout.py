"""Arguments of the Hopper kernels: ctypes' structures hold what the CUDA C++ ones declare, field by field."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping

import pytest

from moesaic.errors import UnsupportedError
from moesaic.kernels._hopper import compile as code


def declared_fields(name: str, file: str = "values.cuh") -> list[str]:
    """Of a struct in a source."""
    text = re.sub(r"//[^\n]*", "", code.sources()[file])
    body = text.split(f"struct {name} {{", 1)[1].split("};", 1)[0]
    return [re.findall(r"\w+", each)[-1] for line in body.split(";") if line.strip() for each in line.split(",")]


def check_layouts(kinds: Mapping[str, type[ctypes.Structure]], file: str, defines: Mapping[str, int] = code.NONE,
                  generated: Mapping[str, str] = code.NONE) -> None:  # fmt: skip
    """The same fields in the same order and of the same sizes, by the name of the struct.

    defines, generated: what the file needs to be compiled, as `machine_code` has it.
    """
    lines = [f'#include "{file}"']
    for name, kind in kinds.items():
        fields = [field for field, *_ in kind._fields_]
        assert fields == declared_fields(name, file)
        lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}");')
        for field in fields:
            size = getattr(kind, field).size
            lines.append(f'static_assert(sizeof((({name} *)0)->{field}) == {size}, "{name}.{field}");')
    options = (*code.OPTIONS, *(f"-D{name}={value}" for name, value in defines.items()))
    headers = {**code.sources(), "wgmma.cuh": "", **generated, "main.cu": "\n".join(lines)}
    assert code.compiled(headers, options, "main.cu")
    headers["main.cu"] += f'\nstatic_assert(sizeof({next(iter(kinds))}) == 1, "a wrong one is told");'
    with pytest.raises(UnsupportedError, match="a wrong one is told"):
        code.compiled(headers, options, "main.cu")
