"""The forms in which texts are compared."""

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rwkv_speech.scoring.languages import base_language


def lower_case(text: str) -> str:
    """The text in lower case, its words separated by single spaces. Nothing else is changed."""
    return " ".join(text.lower().split())


def as_it_is(text: str) -> str:
    """The text, its words separated by single spaces."""
    return " ".join(text.split())


def normalise_english(text: str) -> str:
    """The text after the English normaliser of Whisper (Radford et al. 2022, appendix C).

    It drops punctuation, bracketed remarks, hesitations and diacritics, expands contractions and titles,
    writes numbers in digits, and puts British spellings into American ones, the last only where
    `normaliser_name` says so. Meant for English alone.
    """
    return " ".join(_english()(text).split())


def normalise_basic(text: str) -> str:
    """The text after Whisper's basic normaliser, marks kept: lower case, NFKC, no punctuation, no bracketed remarks.

    Whisper's own also puts a space in the place of each combining mark that NFKC leaves; that breaks words of Arabic
    with vowels, of Hindi, Thai and others. Full and half width become one; Chinese characters stay as they are.
    """
    return " ".join(_basic()(text).split())


def normaliser_name() -> str:
    """What `normalise_english` is, for those who compare figures.

    transformers has the rules but not the table of spellings; that one comes with the package
    `whisper-normalizer`, where it is installed.
    """
    whole = "Whisper's English normaliser"
    return whole if _spellings() else f"{whole}, British spellings kept"


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "english": normalise_english,
    "basic": normalise_basic,
    "none": as_it_is,
}


def normalizer_for(language: str | None, reference: str) -> str:
    """The normaliser of a language; without one, English if all letters of the reference are Latin, else the basic."""
    if language:
        return "english" if base_language(language) in ("en", "eng", "english") else "basic"
    latin = all(unicodedata.name(c, "").startswith(("LATIN", "MODIFIER")) for c in set(reference) if c.isalpha())
    return "english" if latin else "basic"


@cache
def _english() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer  # takes a second to import

    return EnglishTextNormalizer(_spellings())


@cache
def _basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    normalizer = BasicTextNormalizer()
    normalizer.clean = _without_symbols
    return normalizer


def _without_symbols(text: str) -> str:
    """As Whisper's `remove_symbols`, marks kept."""
    return "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in unicodedata.normalize("NFKC", text))


@cache
def _spellings() -> dict[str, str]:
    package = find_spec("whisper_normalizer")
    if package is None or package.origin is None:
        return {}
    return json.loads((Path(package.origin).parent / "normalizers" / "english.json").read_text(encoding="utf-8"))
