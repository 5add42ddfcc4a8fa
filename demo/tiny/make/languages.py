"""Words and sentences in other languages, and pairs of a sentence and its English: out of packages of the Python index.

    pip download --no-deps -d PACKAGES django wagtail django-cms django-oscar django-allauth django-filer \\
        django-helpdesk django-registration django-shop django-two-factor-auth django-user-accounts kolibri \\
        mezzanine sphinx wtforms
    pip install wordfreq polib pypinyin unidecode
    python demo/tiny/make/languages.py --packages PACKAGES

The packages bring their translated messages (.po files; BSD and MIT licences), wordfreq the frequencies of words
(Apache 2.0 and CC BY-SA 4.0).
"""

import argparse
import random
import re
import unicodedata
import zipfile
from functools import cache
from itertools import accumulate
from pathlib import Path

LANGUAGES = {"es": "es", "fr": "fr", "it": "it", "ru": "ru", "ar": "ar", "zh": "zh_Hans|zh_CN|zh_hans"}
WORDS = 20_000  # of a language, the most frequent ones
LONGEST = 80  # characters of a message
VALIDATION = 30  # pairs of a language that are held out
SEED = 1


class Language:
    """What is known of one language.

    pairs, validation: (message, its English), distinct, of the first kind for training.
    """

    def __init__(self, code: str, pairs: dict[str, str]) -> None:
        from wordfreq import get_frequency_dict

        self.code = code
        every = sorted((foreign, english) for english, foreign in pairs.items())
        random.Random(SEED).shuffle(every)
        self.validation, self.pairs = every[:VALIDATION], every[VALIDATION:]
        frequencies = {word: share for word, share in get_frequency_dict(code).items() if word.isalpha()}
        self.words = sorted(frequencies, key=lambda word: (-frequencies[word], word))[:WORDS]
        # The square root of the frequency, so that rarer words and their letters come, too.
        self.weights = list(accumulate(frequencies[word] ** 0.5 for word in self.words))

    def sentence(self, rng: random.Random, longest: int) -> str:
        """A message, or words in no order that makes sense, at most so many characters, as it would be said."""
        if rng.random() < 0.4:
            text = said(rng.choice(self.pairs)[0])
        else:
            between = "" if self.code == "zh" else " "
            text = between.join(rng.choices(self.words, cum_weights=self.weights, k=rng.randint(1, 10)))
        if self.code == "zh":
            begin = rng.randrange(max(1, len(text) - longest + 1))
            return text[begin : begin + longest]
        while len(text) > longest:
            text = text.rpartition(" ")[0] or text[:longest]
        return text


def said(text: str) -> str:
    """Lower case, letters and digits with their marks and apostrophes only; Arabic without its vowel marks."""
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    text = re.sub("[\u0640\u064b-\u0652]", "", text)
    return " ".join("".join(c if c.isalnum() or c in "' " else " " for c in text).split())


@cache
def sounds(text: str, language: str) -> str:
    """The text in Latin letters, as it sounds: Chinese in pinyin without tones, the others by Unidecode."""
    from pypinyin import lazy_pinyin
    from unidecode import unidecode

    latin = " ".join(lazy_pinyin(text)) if language == "zh" else unidecode(text)
    return " ".join(re.sub(r"[^a-z' ]", "", latin.lower()).split())


def read_languages(folder: Path) -> dict[str, Language]:
    """The languages, of the translated messages in the wheels of a folder.

    Raises:
        SystemExit: there are too few messages.
    """
    import polib

    pairs: dict[str, dict[str, str]] = {code: {} for code in LANGUAGES}
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                for code, names in LANGUAGES.items():
                    if re.search(rf"locale/({names})/LC_MESSAGES/\w+\.po$", name):
                        for entry in polib.pofile(archive.read(name).decode()).translated_entries():
                            english, foreign = entry.msgid.strip(), entry.msgstr.strip()
                            if usable(english) and usable(foreign):
                                pairs[code].setdefault(english, foreign)
    few = [code for code, found in pairs.items() if len(found) < 10 * VALIDATION]
    if few:
        raise SystemExit(f"{folder}: too few translated messages in {', '.join(few)}; expected wheels that have some")
    return {code: Language(code, found) for code, found in pairs.items()}


def usable(text: str) -> bool:
    return bool(said(text)) and len(text) <= LONGEST and not re.search(r"[%{}<>&_\\/\n\d=|]", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", required=True, type=Path, help="folder of wheels")
    rng = random.Random(0)
    for code, language in read_languages(parser.parse_args().packages).items():
        print(f"{code}: {len(language.pairs)} messages, {len(language.words)} words")
        for _ in range(3):
            text = language.sentence(rng, 40)
            print(f"  {text} | {sounds(text, code)}")
        print(*(f"  {foreign} = {english}" for foreign, english in language.pairs[:3]), sep="\n")


if __name__ == "__main__":
    main()
