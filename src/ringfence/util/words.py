"""Numbers as a person says them: counts with their noun, times, sizes. Does not know what is
counted."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 row`, `2 rows`, `12,000 rows`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def about(seconds: float) -> str:
    """An estimated time: `about 40 seconds`, `about 5 minutes`, `about 3 hours`,
    `about 12 days`."""
    for unit, length, until in (("second", 1, 90), ("minute", 60, 90), ("hour", 3600, 48)):
        if seconds < until * length:
            return f"about {counted(max(1, _rounded(seconds / length)), unit)}"
    return f"about {counted(_rounded(seconds / 86400), 'day')}"


def gib(size: float) -> str:
    """Bytes in GiB, to three digits: `0.27 GiB`, `38.4 GiB`, `1,210 GiB`."""
    number = size / 2**30
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} GiB"


def _rounded(number: float) -> int:
    """Two digits: an estimate has no more."""
    digits = max(0, len(str(int(number))) - 2)
    return int(round(number / 10**digits) * 10**digits)
