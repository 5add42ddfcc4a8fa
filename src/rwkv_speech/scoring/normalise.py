"""The two forms in which texts are compared."""

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def lower_case(text: str) -> str:
    """The text in lower case, its words separated by single spaces. Nothing else is changed."""
    return " ".join(text.lower().split())


def normalise_english(text: str) -> str:
    """The text after the English normaliser of Whisper (Radford et al. 2022, appendix C).

    It drops punctuation, bracketed remarks, hesitations and diacritics, expands contractions and titles,
    writes numbers in digits, and puts British spellings into American ones, the last only where
    `normaliser_name` says so. Meant for English: in other languages read the raw figures.
    """
    return " ".join(_normaliser()(text).split())


def normaliser_name() -> str:
    """What `normalise_english` is, for those who compare figures.

    transformers has the rules but not the table of spellings; that one comes with the package
    `whisper-normalizer`, where it is installed.
    """
    whole = "Whisper's English normaliser"
    return whole if _spellings() else f"{whole}, British spellings kept"


@cache
def _normaliser() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer  # takes a second to import

    return EnglishTextNormalizer(_spellings())


@cache
def _spellings() -> dict[str, str]:
    package = find_spec("whisper_normalizer")
    if package is None or package.origin is None:
        return {}
    return json.loads((Path(package.origin).parent / "normalizers" / "english.json").read_text(encoding="utf-8"))
