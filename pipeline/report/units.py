"""Bytes in words."""

from __future__ import annotations


def megabytes(count: int) -> str:
    """Bytes in units of 10^6 or 10^9."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
