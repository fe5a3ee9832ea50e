"""Whether the native kernels can be built here. With a compiler they must be; without, their tests are skipped."""

from __future__ import annotations

import shutil

import pytest

from moesaic.kernels._native import COMPILERS

HAS_COMPILER = any(shutil.which(name) for name in COMPILERS)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")
