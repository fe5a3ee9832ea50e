"""Kimi K2 (arXiv 2507.20534): DeepSeek-V3's architecture with one group of 384 experts and no draft layers."""

from __future__ import annotations

from moesaic.models.deepseek_v3 import describe

__all__ = ["describe"]
