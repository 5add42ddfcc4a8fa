"""The text of a passage cut into subtitles that can be read: how wide, how many lines, for how long.

The limits are those of Netflix's Timed Text Style Guide (https://partnerhelp.netflixstudios.com, "General
Requirements" and "English"), with two columns for a wide character.
"""

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len

SECONDS = 7.0  # a subtitle stays, at most
LINES = 2
COLUMNS = 42  # of a line

# What no line begins with, or ends with: by Unicode's categories, and the small kana.
_NOT_FIRST, _NOT_LAST = {"Pe", "Pf", "Po", "Pd", "Lm"}, {"Ps", "Pi"}
_SMALL_KANA = "ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶ"


@dataclass(frozen=True)
class Cue:
    """A subtitle; times in seconds, to the millisecond."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(text: str, start: float, end: float) -> list[Cue]:
    """The subtitles of what is said from `start` to `end`, each for the share of the time that its width has.

    Lines end between words or, where a script has no spaces between them, between characters. Nothing is dropped.
    """
    units = _units(text)
    width = sum(map(cell_len, units))
    most = int(width * SECONDS / max(end - start, 1e-3))  # columns of the time that one may stay
    per_cue = LINES if most > COLUMNS else 1
    lines = _balanced(units, min(COLUMNS, max(most // per_cue, COLUMNS // 2)))  # few words needn't be torn apart
    found, done = [], 0
    for shown in (lines[i : i + per_cue] for i in range(0, len(lines), per_cue)):
        first, done = done, done + sum(map(cell_len, shown))
        begin, until = (round(start + (end - start) * x / width, 3) for x in (first, done))
        found.append(Cue(begin, min(until, round(begin + SECONDS, 3)), tuple(line.strip() for line in shown)))
    return found


def joined(texts: Iterable[str]) -> str:
    """Passages in one line, with a space between two unless both are of a script that has none, as Chinese."""
    whole = ""
    for text in texts:
        both = whole and _spaceless(_telling(reversed(whole))) and _spaceless(_telling(text))
        whole += text if both or not whole else f" {text}"
    return whole


def _telling(characters: Iterable[str]) -> str:
    """The first character that belongs to one kind of script: quotation marks and dashes belong to all."""
    return next((c for c in characters if unicodedata.east_asian_width(c) != "A"), "")


def _spaceless(character: str) -> bool:
    """Whether it is of Chinese or Japanese; Korean, as wide, has spaces."""
    wide = character and unicodedata.east_asian_width(character) in "WFH"
    return bool(wide) and "HANGUL" not in unicodedata.name(character, "")


def _units(text: str) -> list[str]:
    """What a line can end behind: words, each with the space before it, or single characters."""
    units: list[str] = []
    for word in text.split():
        parts = [word[0]]
        for last, this in pairwise(word):
            kind = unicodedata.category(this)
            together = (
                not (_spaceless(last) or _spaceless(this))
                or kind in _NOT_FIRST
                or kind[0] == "M"
                or this in _SMALL_KANA
                or unicodedata.category(last) in _NOT_LAST
            )
            if together and cell_len(parts[-1] + this) <= COLUMNS:
                parts[-1] += this
            else:
                parts.append(this)
        units += [f" {parts[0]}" if units else parts[0], *parts[1:]]
    return units


def _filled(units: list[str], columns: int) -> list[str]:
    """Lines of so many columns, each as full as can be; a unit too wide has its own."""
    lines: list[str] = []
    width = 0
    for unit in units:
        width += cell_len(unit)
        if lines and width <= columns:
            lines[-1] += unit
        else:
            lines.append(unit)
            width = cell_len(unit.lstrip())
    return lines


def _balanced(units: list[str], columns: int) -> list[str]:
    """As few lines as `_filled` makes, as equal in width as can be, so that no word is left alone in the last."""
    fewest = len(_filled(units, columns))
    return _filled(units, bisect_left(range(columns), True, key=lambda x: len(_filled(units, x)) <= fewest))
