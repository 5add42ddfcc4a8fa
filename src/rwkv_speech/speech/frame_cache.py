"""Cached encoder frames: the encoder is frozen, so each recording is encoded once, and its frames are read ever after.

    DIR/encoders/<files>.json           what is known of an encoder, under the stamps of its files
    DIR/<identity>-<storage>/           its frames, under the content of a recording and the stamps of its files

- The identity of an encoder is the hash of its weights, configuration, feature extractor and type of computation. It is
  computed whenever the encoder is loaded; only where its files are untouched since, it needn't be.
- A recording is known by the hash of its encoded bytes, a segment of one by its place and the hash of its samples;
  another speed counts, too. Its file's stamp saves reading it; a file that was touched is read, and if its content is
  the same its frames stay.
- With a full cache the encoder isn't loaded: an `AbsentEncoder` stands in for it.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.progress import Progress
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, Longest, at_speed, load_audio
from rwkv_speech.speech.encoder import Convolutions, SpeechEncoder, frame_count
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.speech.identity import encoder_identity, encoder_stamp
from rwkv_speech.speech.recording import Recording
from rwkv_speech.speech.shards import RECORD_BYTES, Shards, ShardWriter, Storage

log = logging.getLogger("rwkv_speech")

_BATCH_SECONDS = 240.0  # padded audio that is read and encoded together, and then committed
_READERS = 4  # threads that read and decode


class AbsentEncoder(nn.Module):
    """Knows the sizes of a `SpeechEncoder`, and encodes nothing: its frames are cached.

    identity: see `encoder_identity`.

    Attributes: as those of `SpeechEncoder` by these names.
    """

    def __init__(self, name: str, *, width: int, convolutions: Convolutions, identity: str = "") -> None:
        super().__init__()
        self.name = name
        self.identity = identity
        self.width = width
        self.convolutions = convolutions
        self.frame_rate = SAMPLE_RATE / math.prod(stride for _, stride in convolutions)

    def frame_count(self, samples: int) -> int:
        """The exact number of valid frames of a waveform with so many samples, at least 1."""
        return frame_count(samples, self.convolutions)

    def extract(self, waveform: Tensor) -> NoReturn:
        raise UserError(f"speech encoder {self.name} isn't loaded, its frames are cached: it can't encode a waveform")


class FrameCache:
    """The frames of one encoder, made by `encoder`, then `fill`, then `read`.

    folder: where caches of any encoders lie.
    storage: how frames are kept; see `shards`.
    """

    def __init__(self, folder: str | Path, *, storage: Storage) -> None:
        self.folder = Path(folder).expanduser()
        self.storage: Storage = storage
        self._loaded: SpeechEncoder | None = None

    def encoder(
        self, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> AbsentEncoder:
        """Opens the cache of an encoder, which is loaded only if it isn't known from before.

        Args: those of `SpeechEncoder.from_pretrained`.

        Raises:
            UserError: the encoder can't be loaded, or the cache's folder not be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--cache_features {self.folder}: {error.strerror}; expected a folder to write to"
            ) from error
        stamp = encoder_stamp(name, dtype)
        known = self.folder / "encoders" / f"{stamp}.json"
        facts = _read_facts(known) if stamp else None
        if facts is None:
            self._loaded = SpeechEncoder.from_pretrained(name, device=device, dtype=dtype)
            facts = {
                "encoder": name,
                "identity": encoder_identity(self._loaded),
                "width": self._loaded.width,
                "convolutions": self._loaded.convolutions,
            }
            if stamp and stamp == encoder_stamp(name, dtype):  # else its files changed while they were read
                write_whole(known, json.dumps(facts, indent=2).encode())
        self._dtype = dtype
        self._identity: str = facts["identity"]
        name = str(encoder_folder(name) or name)
        self._absent = AbsentEncoder(
            name, width=facts["width"], convolutions=facts["convolutions"], identity=self._identity
        )
        folder = self.folder / f"{self._identity}-{self.storage}"
        self._shards = Shards(folder, width=self._absent.width, storage=self.storage)
        return self._absent

    def fill(
        self,
        recordings: Sequence[Recording],
        *,
        longest: Longest | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        on_bad: Callable[[Recording, AudioError], None] = lambda recording, error: None,
        log_every: float = 30.0,
    ) -> None:
        """Computes the frames that are missing, every process those of its share.

        Batches of encoding follow from the recordings alone, and one that was interrupted is done again as a whole:
        the frames are the same bit for bit, however often the filling was killed.

        Args:
            recordings: the same in all processes; one may occur several times.
            longest: recordings that are longer can't be used.
            device: where the encoder works.
            rank, world_size: which share is this process's.
            barrier: returns when all processes have called it.
            on_bad: takes the recordings that can't be used; they get no frames.
            log_every: see `Progress`.

        Raises:
            UserError: the disk has no room for the frames, or an encoder other than the one that was opened.
        """
        # One that occurs several times is encoded once, where equal stamps show it.
        mine = list({recording.stamp() or recording: recording for recording in recordings[rank::world_size]}.values())
        with ShardWriter(self._shards) as writer:
            missing = {i for i, recording in enumerate(mine) if not self._known(recording, writer)}
            work = self._plan(mine, missing, longest, on_bad) if missing else []
            self._check_room([entry for batch in work for entry in batch if entry.index in missing], rank, world_size)
            barrier()  # no process writes before all have measured the free space
            if work:
                batches = [[mine[entry.index] for entry in batch] for batch in work]
                count = sum(map(len, batches))
                with Progress("caching frames", count, log_every=log_every, visible=not rank) as progress:
                    self._encode(batches, writer, longest, device, rank, on_bad, progress)
        self._loaded = None
        barrier()
        self._shards.reload()

    def read(self, recording: Recording, longest: Longest | None = None) -> tuple[Tensor, int]:
        """The frames of a recording, (F, width) float16 or float32, and its samples at 16 kHz.

        Raises:
            AudioError: it can't be used, is longer than `longest`, changed since, or its frames are damaged.
        """
        record = self._record(recording, longest)
        try:
            return self._shards.read(record), int(record["samples"])
        except UserError as error:  # in one of the loader's workers, from where only bad samples come back as one line
            raise AudioError(f"{recording}: {error}") from error

    def samples(self, recording: Recording, longest: Longest | None = None) -> int:
        """The samples of a recording at 16 kHz; raises as `read` does."""
        return int(self._record(recording, longest)["samples"])

    def _record(self, recording: Recording, longest: Longest | None) -> Any:
        record = self._find_stamp(recording.stamp())
        if record is None:
            key, _, content = _read(recording, longest)
            record = self._shards.find(key)
            if record is None:
                _decode(content, recording, longest)  # says what is wrong with it
                raise AudioError(f"{recording}: changed since its frames were cached; start again to renew them")
        return record

    def _find_stamp(self, stamp: str | None) -> Any:
        return None if stamp is None else self._shards.find(_key("stamp", stamp.encode()))

    def _known(self, recording: Recording, writer: ShardWriter) -> bool:
        """Whether its frames are there; a file that was only touched or moved is remembered as it is now."""
        if not len(self._shards):
            return False
        if self._find_stamp(recording.stamp()) is not None:
            return True
        try:
            key, stamp, _ = _read(recording)
        except AudioError:
            return False  # the error is reported where its frames are computed
        record = self._shards.find(key)
        if record is not None and stamp is not None:
            writer.link(_key("stamp", stamp.encode()), record)
        return record is not None

    def _plan(
        self,
        recordings: Sequence[Recording],
        missing: set[int],
        longest: Longest | None,
        on_bad: Callable[[Recording, AudioError], None],
    ) -> list[list["_Entry"]]:
        """All recordings in batches of like length, of which those remain that lack something."""
        entries = []
        for index, recording in enumerate(recordings):
            try:
                entries.append(_Entry(recording.seconds(longest), index))
            except AudioError as error:
                on_bad(recording, error)
        entries.sort(reverse=True)
        batches = []
        while entries:
            count = max(1, int(_BATCH_SECONDS / max(entries[0].seconds, 0.1)))
            batches.append(entries[:count])
            entries = entries[count:]
        return [batch for batch in batches if any(entry.index in missing for entry in batch)]

    def _check_room(self, entries: list["_Entry"], rank: int, world_size: int) -> None:
        """Says how much disk all processes together need, taking the other shares to be like this one."""
        if not entries:
            return
        frames = sum(self._absent.frame_count(round(entry.seconds * SAMPLE_RATE)) for entry in entries)
        needed = world_size * (frames * self._shards.frame_bytes + 2 * RECORD_BYTES * len(entries))
        hours = world_size * sum(entry.seconds for entry in entries) / 3600
        free = shutil.disk_usage(self.folder).free
        sizes = f"the frames of {hours:.2f} h of audio need {needed / 1e9:.2f} GB in {self.folder}"
        if needed > free:
            raise UserError(
                f"--cache_features: {sizes}, where {free / 1e9:.2f} GB are free: make room, "
                f"{'use --cache_dtype int8, ' if self.storage == 'fp16' else ''}or leave --cache_features out"
            )
        if not rank:
            log.info("%s, %.2f GB are free there", sizes, free / 1e9)

    def _encode(
        self,
        batches: list[list[Recording]],
        writer: ShardWriter,
        longest: Longest | None,
        device: torch.device | str,
        rank: int,
        on_bad: Callable[[Recording, AudioError], None],
        progress: Progress,
    ) -> None:
        encoder = self._load(device)
        written: dict[bytes, Any] = {}
        start, seconds = time.perf_counter(), 0.0
        read = partial(_read_audio, longest=longest)
        with ThreadPoolExecutor(_READERS) as pool:
            for batch, results in zip(batches, _ahead(pool, read, batches), strict=True):
                usable: list[tuple[Recording, _AudioFile]] = []
                for recording, result in zip(batch, results, strict=True):
                    if isinstance(result, AudioError):
                        on_bad(recording, result)
                    else:
                        usable.append((recording, result))
                frames, lengths = encoder([x.waveform for _, x in usable]) if usable else ((), ())
                for (recording, x), utterance, length in zip(usable, frames, lengths, strict=True):
                    record = written.get(x.key)
                    if record is None:
                        record = self._shards.find(x.key)
                    if record is None:
                        try:
                            record = writer.add(x.key, utterance[:length], len(x.waveform))
                        except ValueError as error:
                            raise UserError(
                                f"{recording}: its frames are {error}; use --cache_dtype int8 or another encoder"
                            ) from error
                    written[x.key] = record
                    if x.stamp is not None and self._find_stamp(x.stamp) is None:
                        writer.link(_key("stamp", x.stamp.encode()), record)
                    seconds += len(x.waveform) / SAMPLE_RATE
                writer.commit()
                speed = seconds / (time.perf_counter() - start)
                progress.advance(len(batch), partial("{:.3g} x real time".format, speed))
        if not rank:
            hours = seconds / 3600
            log.info("this process cached the frames of %.2f h of audio, %.3g times as fast as it lasts", hours, speed)

    def _load(self, device: torch.device | str) -> SpeechEncoder:
        if self._loaded is None:
            self._loaded = SpeechEncoder.from_pretrained(self._absent.name, device=device, dtype=self._dtype)
            if encoder_identity(self._loaded) != self._identity:
                raise UserError(f"speech encoder {self._absent.name} changed in this moment; start again")
        return self._loaded.to(device)


class _Entry(NamedTuple):
    """A recording in the plan; compares by length, then by place."""

    seconds: float
    index: int


class _AudioFile(NamedTuple):
    """A recording that was read: the key of its content, the stamp of its file, float32 samples at 16 kHz."""

    key: bytes
    stamp: str | None
    waveform: Tensor


def _read_facts(path: Path) -> dict[str, Any] | None:
    """What is known of an encoder; None where there is nothing that can be read."""
    try:
        facts = json.loads(path.read_text())
        convolutions = [(int(kernel), int(stride)) for kernel, stride in facts["convolutions"]]
        return {"identity": str(facts["identity"]), "width": int(facts["width"]), "convolutions": convolutions}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _key(kind: str, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, person=kind.encode()).digest()


def _read(recording: Recording, longest: Longest | None = None) -> tuple[bytes, str | None, bytes | Tensor]:
    """The key of a recording's content, its stamp, and the content: encoded, or the samples of a segment."""
    if recording.segment is None:
        content, stamp = recording.read()
        return _key("audio", recording.place.encode() + content), stamp, content
    stamp, waveform = recording.stamp(), recording.waveform(longest)
    return _key("segment", recording.place.encode() + waveform.numpy().tobytes()), stamp, waveform


def _decode(content: bytes | Tensor, recording: Recording, longest: Longest | None) -> Tensor:
    if isinstance(content, Tensor):
        return content
    return at_speed(load_audio(content, name=str(recording), longest=longest), recording.speed)


def _read_audio(recording: Recording, *, longest: Longest | None) -> _AudioFile | AudioError:
    try:
        key, stamp, content = _read(recording, longest)
        return _AudioFile(key, stamp, _decode(content, recording, longest))
    except AudioError as error:
        return error


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], batches: list[list[Any]]) -> Iterator[list[Any]]:
    """The results of each batch, the next one being worked on meanwhile."""
    waiting: list[Any] = []
    for number, batch in enumerate(batches):
        ready, waiting = waiting, [pool.submit(function, item) for item in batch]
        if number:
            yield [future.result() for future in ready]
    yield [future.result() for future in waiting]
