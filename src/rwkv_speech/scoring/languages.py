"""What scoring must know of languages: which are written without spaces, and what is counted in their texts."""

import re

# By ISO 639, and as data sets spell them out. Korean has spaces.
_WITHOUT_SPACES = frozenset({
    *("zh", "zho", "cmn", "yue", "wuu", "nan", "hak", "ja", "jpn", "th", "tha", "lo", "lao", "my", "mya", "km", "khm"),
    *("chinese", "mandarin", "cantonese", "japanese", "thai", "burmese", "myanmar", "khmer"),
})  # fmt: skip
# Han with its iteration marks, Kana (also of half width), Bopomofo, Thai, Lao, Burmese, Khmer
_SCRIPTS = (
    "\u3005-\u3007\u3021-\u3029\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U000323af\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u19e0-\u19ff"
)
_CHARACTER = re.compile(f"[{_SCRIPTS}]")
_UNIT = re.compile(rf"[{_SCRIPTS}]|[^\s{_SCRIPTS}]+")
_NEEDLESS_SPACE = re.compile(rf"(?<=[{_SCRIPTS}])\s+|\s+(?=[{_SCRIPTS}])")


def base_language(language: str | None) -> str | None:
    """A language without region and script, in lower case: `zh-CN`, `cmn_hans_cn` -> `zh`, `cmn`."""
    return re.split("[-_]", language.lower())[0] if language else None


def spaced(language: str | None, text: str) -> bool:
    """Whether words are separated by spaces, so that they can be counted: by the language, else by most of the text."""
    if language:
        return base_language(language) not in _WITHOUT_SPACES
    characters = len(_CHARACTER.findall(text))
    return not characters or 2 * characters <= len(units(text))


def units(text: str) -> list[str]:
    """What a mixed error rate counts: each character of a script without spaces, and all other words."""
    return _UNIT.findall(text)


def is_character(unit: str) -> bool:
    """Whether it is a character of a script without spaces, rather than a word."""
    return bool(_CHARACTER.match(unit))


def without_needless_spaces(text: str) -> str:
    """The text without the spaces beside characters of a script that has none."""
    return _NEEDLESS_SPACE.sub("", text)
