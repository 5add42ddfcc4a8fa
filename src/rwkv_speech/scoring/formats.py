"""How figures are written, in the terminal and in the report alike."""

import math

ABSENT = "–"


def percent(rate: float, digits: int = 2) -> str:
    """A fraction in percent, without the sign: 0.0813 -> `8.13`."""
    return ABSENT if math.isnan(rate) else f"{100 * rate:.{digits}f}"


def percent_range(interval: tuple[float, float], digits: int = 1) -> str:
    """A pair of fractions in percent: (0.074, 0.089) -> `7.4–8.9`."""
    return ABSENT if math.isnan(interval[0]) else "–".join(percent(bound, digits) for bound in interval)


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it: 5.4 h, 12.0 min, 3.2 s."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def memory(size: int | None) -> str:
    """Bytes in GiB."""
    return ABSENT if size is None else f"{size / 2**30:.2f} GiB"


def figure(value: float | None) -> str:
    """A number to three significant digits."""
    return ABSENT if value is None else f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """`1 word`, `2 words`, `1,200 words`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
