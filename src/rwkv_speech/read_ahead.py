"""Streams that are read by threads, ahead of who asks for their items."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

THREADS = 4  # a recording of 15 s takes one of them 20 ms, to decode and to tell speech from silence


class _Stream(Generic[T]):
    """One stream, read by a thread, of which `held` items wait, and one more in the thread's hands.

    The thread is a daemon, and nobody waits for it: a program that gives up on a stream, by an error or Ctrl-C, ends at
    once, and the thread with the item at hand.
    """

    def __init__(self, items: Iterable[T], held: int) -> None:
        self._items = items
        self._room = threading.Semaphore(held)
        self._found: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()  # None: its end
        self._is_stopped = False
        threading.Thread(target=self._read, name="read_ahead", daemon=True).start()

    def _read(self) -> None:
        end = None
        try:
            for item in self._items:
                self._room.acquire()
                if self._is_stopped:
                    return
                self._found.put((item,))
        except BaseException as error:  # raised again where the item would have come
            end = error
        self._found.put(end)

    def stop(self) -> None:
        self._is_stopped = True
        self._room.release()

    def __iter__(self) -> Iterator[T]:
        while (found := self._found.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            self._room.release()
            yield found[0]


def read_ahead(streams: Iterable[Iterable[T]], *, held: int, threads: int = THREADS) -> Iterator[T]:
    """The items of all streams, one stream after the other, and what a stream raises in its place.

    Args:
        streams: taken in the thread that asks for items, up to `threads` of them before items of the first are given.
        held: items of each stream that wait, beside one that its thread has in hand.
        threads: streams that are read at a time, one of which is asked for.
    """
    streams, waiting = iter(streams), deque[_Stream[T]]()
    try:
        while True:
            while len(waiting) < threads and (items := next(streams, None)) is not None:
                waiting.append(_Stream(items, held))
            if not waiting:
                return
            yield from waiting[0]
            waiting.popleft()
    finally:
        for stream in waiting:
            stream.stop()
