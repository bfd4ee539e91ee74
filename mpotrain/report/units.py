"""Numbers for people (no torch)."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """Return a number of bytes with a binary unit, three significant digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            if unit == "B":
                return f"{count} B"
            return f"{value:.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
