"""Intervals, rates and scores in words, for tables and pages."""

from ..stats import Interval, number


def signed(value: float, digits: int = 2) -> str:
    """`+0.31`"""
    return number(value, digits, signed=True)


def share(interval: Interval) -> str:
    """`4.5 %`"""
    return f"{number(100 * interval.mean, 1)} %"


def percents(interval: Interval) -> str:
    """`[2.1, 8.0]`, in per cent or points"""
    return _ends(interval, 100, 1)


def rate(interval: Interval) -> str:
    """`4.5 % [2.1, 8.0]`"""
    return f"{share(interval)} {percents(interval)}"


def plain(interval: Interval) -> str:
    """`[1.02, 1.35]`, of a value that is never below 0"""
    return _ends(interval)


def level(interval: Interval) -> str:
    """`1.12 [1.02, 1.35]`"""
    return f"{number(interval.mean)} {plain(interval)}"


def score(interval: Interval) -> str:
    """`62.1 [58.0, 66.0]`"""
    return f"{number(interval.mean, 1)} [{number(interval.low, 1)}, {number(interval.high, 1)}]"


def _ends(interval: Interval, scale: int = 1, digits: int = 2) -> str:
    if interval.n == 1:
        return "[one alone]"
    return f"[{number(scale * interval.low, digits)}, {number(scale * interval.high, digits)}]"
