"""The RWKV World tokenizer: greedy longest match over bytes, with the table that the `rwkv` package ships."""

import ast
import codecs
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from rwkv_speech.errors import UserError

END_OF_TEXT = 0
BYTE_VOCABULARY = 257  # end of text and the 256 single bytes: the least that can spell any text
_TABLE_FILE = "rwkv_vocab_v20230424.txt"


class Tokenizer:
    """Text to token ids and back.

    Ids 1 to 256 are the single bytes, so that every text has a spelling; longer tokens follow, up to 65,529.
    What the models' 65,536 rows have beyond that is padding.
    """

    def __init__(self, vocab_size: int = 65536) -> None:
        """Takes the part of the World table that fits.

        Args:
            vocab_size: rows of the model's embedding; only ids below it are used. 257 gives a byte model.

        Raises:
            UserError: fewer than 257 rows, which can't hold the bytes; or no `rwkv` package to read from.
        """
        if vocab_size < BYTE_VOCABULARY:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small for the World tokenizer; expected at least "
                f"{BYTE_VOCABULARY} (end of text and 256 bytes); take a model with a larger embedding"
            )
        self.vocab_size = vocab_size
        self._tokens = {token_id: token for token_id, token in _world_table().items() if token_id < vocab_size}
        self._ids = {token: token_id for token_id, token in self._tokens.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], {1}).add(len(token))
        # Which lengths are worth trying after these two bytes, longest first.
        self._lengths = {start: tuple(sorted(found, reverse=True)) for start, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end of text. A lone surrogate, which has no UTF-8, becomes "?"."""
        source = text.encode("utf-8", errors="replace")
        ids = []
        position = 0
        while position < len(source):
            for length in self._lengths.get(source[position : position + 2], (1,)):
                token_id = self._ids.get(source[position : position + length])
                if token_id is not None:
                    break
            ids.append(token_id)
            position += length
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for end of text and for ids that the table doesn't name.

        A model has such rows (65,530 to 65,535) and can, however rarely, choose one: no reason to fail.
        """
        return self._tokens.get(token_id, b"")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, end of text and unnamed ids nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes token by token; all pieces and the `flush` joined equal `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; bytes of an unfinished one wait for the next token."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the text: U+FFFD if a character was left unfinished, else nothing. A new text may follow."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


@functools.cache
def _world_table() -> dict[int, bytes]:
    """Id -> bytes. A line of the file is: id, a Python literal (str or bytes), the length in bytes."""
    table = {}
    for line in _table_path().read_text(encoding="utf-8").splitlines():
        token_id, _, rest = line.partition(" ")
        literal, _, length = rest.rpartition(" ")
        token = ast.literal_eval(literal)
        token = token.encode("utf-8") if isinstance(token, str) else token
        if len(token) != int(length):
            raise UserError(
                f"{_TABLE_FILE}: token {token_id} has {len(token)} bytes, the file says {length}; "
                "reinstall it: pip install --force-reinstall rwkv"
            )
        table[int(token_id)] = token
    return table


def _table_path() -> Path:
    # find_spec, not import: the package's modules read the environment and change torch's settings.
    spec = importlib.util.find_spec("rwkv")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _TABLE_FILE).is_file():
            return path
    raise UserError(f"the World vocabulary {_TABLE_FILE} was not found; expected in the rwkv package: pip install rwkv")
