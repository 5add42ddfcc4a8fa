"""The World tokenizer, held against the one that the `rwkv` package ships."""

import importlib.util
import random
from pathlib import Path

import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.lm.tokenizer import END_OF_TEXT, Tokenizer

# Code point ranges of the scripts that random strings are drawn from.
SCRIPTS = {
    "ascii": [(0x20, 0x7E)],
    "control": [(0x00, 0x1F), (0x7F, 0x9F)],
    "latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x20, 0x20)],
    "greek-cyrillic": [(0x370, 0x3FF), (0x400, 0x4FF), (0x20, 0x20)],
    "arabic-hebrew": [(0x600, 0x6FF), (0x590, 0x5FF), (0x20, 0x20)],
    "indic": [(0x900, 0x97F), (0xB80, 0xBFF), (0xE00, 0xE7F)],
    "cjk": [(0x4E00, 0x9FFF), (0x3000, 0x30FF), (0xFF00, 0xFFEF)],
    "hangul": [(0xAC00, 0xD7A3), (0x1100, 0x11FF)],
    "combining": [(0x61, 0x7A), (0x300, 0x36F)],
    "emoji": [(0x1F300, 0x1FAFF), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F3FB, 0x1F3FF)],
    "any": [(0x00, 0xD7FF), (0xE000, 0x10FFFF)],
}
# fmt: off
WORDS = [
    "the", "of", "and", "transcription", "hello", "Hello", "HELLO", "don't", "http://", "1234567890", "não",
    "schön", "你好", "世界", "今日は", "привет", "안녕하세요", "مرحبا", "👍🏽", "👨\u200d👩\u200d👧",
    "e\u0301", "   ", "\n\n\t", "=====", "----", "\r\n",
]
# fmt: on


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def official():
    folder = Path(importlib.util.find_spec("rwkv").submodule_search_locations[0])
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(folder / "rwkv_vocab_v20230424.txt"))


def random_text(script: str, rng: random.Random) -> str:
    ranges = SCRIPTS[script]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_equals_rwkv_package_and_round_trips(script, tokenizer, official):
    rng = random.Random(script)
    for _ in range(500):
        text = random_text(script, rng)
        ids = tokenizer.encode(text)
        assert ids == official.encode(text), repr(text)
        assert tokenizer.decode(ids) == official.decode(ids) == text


def test_equals_rwkv_package_on_words_and_their_pieces(tokenizer, official):
    rng = random.Random(0)
    for _ in range(3000):
        text = rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(1, 12)))
        text = text[rng.randint(0, 3) : len(text) - rng.randint(0, 3)]
        assert tokenizer.encode(text) == official.encode(text), repr(text)


def test_equals_rwkv_package_on_every_token_and_its_neighbours(tokenizer, official):
    """Each token's own text, and with the last character gone: the longest match just missed."""
    for token in official.token2idx:
        try:
            text = token.decode("utf-8")
        except UnicodeDecodeError:
            continue
        for piece in (text, text[:-1]):
            assert tokenizer.encode(piece) == official.encode(piece), repr(piece)


def test_known_ids(tokenizer):
    assert tokenizer.encode("#") == [36]  # bytes are ids 1 to 256
    assert tokenizer.encode("") == []
    assert tokenizer.encode("-" * 80) == [65528]
    assert tokenizer.encode("\ud800") == tokenizer.encode("?")


@pytest.mark.parametrize("script", SCRIPTS)
def test_stream_emits_whole_characters_only(script, tokenizer):
    rng = random.Random(script)
    for _ in range(100):
        text = random_text(script, rng)
        # Bytes, not the longest tokens, so that nearly every character comes in parts.
        ids = Tokenizer(257).encode(text)
        stream = tokenizer.stream()
        emitted, seen = "", b""
        for token_id in ids:
            emitted += stream.feed(token_id)
            seen += bytes([token_id - 1])
            assert emitted == seen.decode("utf-8", errors="ignore")  # ignores only an unfinished end
        assert emitted + stream.flush() == text


def test_stream_equals_decode_of_any_ids(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.choice([rng.randint(0, 256), rng.randint(0, 65535)]) for _ in range(rng.randint(0, 30))]
        stream = tokenizer.stream()
        assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_stream_is_ready_for_a_new_text_after_flush(tokenizer):
    stream = tokenizer.stream()
    assert stream.feed(0xE4 + 1) == ""  # the first byte of 你
    assert stream.flush() == "\ufffd"
    assert stream.feed(36) + stream.flush() == "#"


def test_invalid_bytes_never_raise(tokenizer):
    assert tokenizer.decode([0xFF + 1, 36, 0xE4 + 1]) == "\ufffd#\ufffd"
    assert tokenizer.decode([END_OF_TEXT, 36, END_OF_TEXT]) == "#"
    assert tokenizer.decode([65530, 65535, 70000, -1]) == ""


def test_257_entries_are_bytes():
    small = Tokenizer(257)
    text = "Grüße, 世界 👍"
    assert small.encode(text) == [byte + 1 for byte in text.encode("utf-8")]
    assert small.decode(small.encode(text)) == text
    assert small.decode([257, 65000]) == ""  # tokens of the full table only


@pytest.mark.parametrize("vocab_size", [258, 1000, 20000])
def test_smaller_vocabulary_is_greedy_over_the_part_that_fits(vocab_size, official):
    small = Tokenizer(vocab_size)
    part = {token: token_id for token, token_id in official.token2idx.items() if token_id < vocab_size}
    rng = random.Random(2)
    for _ in range(100):
        source = " ".join(rng.choices(WORDS, k=6)).encode()
        expected, position = [], 0
        while position < len(source):
            rest = source[position:]
            longest = max(n for n in range(1, len(rest) + 1) if rest[:n] in part)
            expected.append(part[rest[:longest]])
            position += longest
        assert small.encode(source.decode()) == expected


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"256 is too small.*at least 257"):
        Tokenizer(256)


def test_missing_table_says_what_to_install(monkeypatch):
    from rwkv_speech.lm import tokenizer as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install rwkv"):
        module._table_path()
