"""Time limits in the spellings of SLURM."""

from __future__ import annotations

import re

_MINUTES = re.compile(r"(?P<m>\d+)(:(?P<s>\d\d?))?")
_HOURS = re.compile(r"(?P<h>\d+):(?P<m>\d\d?):(?P<s>\d\d?)")
_DAYS = re.compile(r"(?P<d>\d+)-(?P<h>\d\d?)(:(?P<m>\d\d?)(:(?P<s>\d\d?))?)?")


def seconds_of(text: str) -> int | None:
    """Return the seconds of a time limit, None where `text` is none.

    Args:
        text: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`,
            `days-hours:minutes` or `days-hours:minutes:seconds`.
    """
    for pattern in (_MINUTES, _HOURS, _DAYS):
        match = pattern.fullmatch(text)
        if match is not None and text.isascii():
            parts = {key: int(value or 0) for key, value in match.groupdict().items()}
            days, hours = parts.get("d", 0), parts.get("h", 0)
            return ((days * 24 + hours) * 60 + parts.get("m", 0)) * 60 + parts.get("s", 0)
    return None
