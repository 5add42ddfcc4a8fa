"""Streams that are read by threads, ahead of who asks for their items."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

THREADS = 4  # a recording of 15 s takes one of them 20 ms, to decode and to tell speech from silence


class _Stream(Generic[T]):
    """One stream, read by a thread, of which at most `held` items wait."""

    def __init__(self, items: Iterable[T], held: int) -> None:
        self._items = items
        self._room = threading.Semaphore(held)
        self._found: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()  # None: its end
        self._is_stopped = False

    def read(self) -> None:
        end = None
        try:
            for item in self._items:
                self._room.acquire()
                if self._is_stopped:
                    break
                self._found.put((item,))
        except BaseException as error:  # raised again where the item would have come
            end = error
        self._found.put(end)

    def stop(self) -> None:
        self._is_stopped = True
        self._room.release()

    def __iter__(self) -> Iterator[T]:
        while found := self._found.get():
            if isinstance(found, BaseException):
                raise found
            self._room.release()
            yield found[0]


def read_ahead(streams: Iterable[Iterable[T]], *, held: int, threads: int = THREADS) -> Iterator[T]:
    """The items of all streams, one stream after the other, and what a stream raises in its place.

    Args:
        streams: taken as they are needed, in the thread that asks for items.
        held: items of each stream that wait at most.
        threads: streams that are read at a time, one of which is asked for.
    """
    streams, waiting = iter(streams), deque[_Stream[T]]()
    with ThreadPoolExecutor(threads, "read_ahead") as pool:
        try:
            while True:
                while len(waiting) < threads and (items := next(streams, None)) is not None:
                    waiting.append(_Stream(items, held))
                    pool.submit(waiting[-1].read)
                if not waiting:
                    return
                yield from waiting[0]
                waiting.popleft()
        finally:
            for stream in waiting:
                stream.stop()
