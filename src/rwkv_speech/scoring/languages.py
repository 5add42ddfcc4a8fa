"""What scoring must know of languages: which are written without spaces."""

import re

# By ISO 639, and as data sets spell them out. Korean has spaces.
_WITHOUT_SPACES = (
    *("zh", "zho", "cmn", "yue", "wuu", "nan", "hak", "ja", "jpn", "th", "tha", "lo", "lao", "my", "mya", "km", "khm"),
    *("chinese", "mandarin", "cantonese", "japanese", "thai", "burmese", "myanmar", "khmer"),
)
# Han with its iteration marks, Kana (also of half width), Bopomofo, Thai, Lao, Burmese, Khmer
_SCRIPTS = (
    "\u3005-\u3007\u3021-\u3029\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U000323af\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u19e0-\u19ff"
)
_UNIT = re.compile(rf"([{_SCRIPTS}])|[^\s{_SCRIPTS}]+")


def spaced(language: str | None, text: str) -> bool:
    """Whether words are separated by spaces, so that they can be counted: by the language, else by most of the text."""
    if language:
        return re.split("[-_]", language.lower())[0] not in _WITHOUT_SPACES
    characters = [unit[1] is not None for unit in _UNIT.finditer(text)]  # else words
    return 2 * sum(characters) <= len(characters)
