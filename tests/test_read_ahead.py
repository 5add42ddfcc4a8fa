"""Streams that threads read ahead."""

import subprocess
import sys
import threading
import time

import pytest

from rwkv_speech.read_ahead import read_ahead


def threads_have_ended() -> bool:
    """Within 30 seconds."""
    threads = [thread for thread in threading.enumerate() if thread.name == "read_ahead"]
    for thread in threads:
        thread.join(30)
    return not any(thread.is_alive() for thread in threads)


def test_items_come_in_the_order_of_their_streams():
    streams = [[(i, j) for j in range(i % 5)] for i in range(50)]
    assert [*read_ahead(iter(streams), held=2)] == [item for stream in streams for item in stream]
    assert threads_have_ended()


def test_streams_are_read_at_the_same_time():
    """Each waits for the other: one after the other they would never end."""
    meeting = threading.Barrier(2, timeout=30)
    assert [*read_ahead([(meeting.wait() >= 0 for _ in "a"), (meeting.wait() >= 0 for _ in "b")], held=1)] == [True] * 2


def test_no_more_is_read_than_may_wait():
    taken = []

    def stream(name):
        for i in range(100):
            taken.append(name)
            yield i

    items = read_ahead((stream(name) for name in "abcdef"), held=3, threads=2)
    next(items)
    deadline = time.monotonic() + 30
    while (taken.count("a"), taken.count("b")) != (5, 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # Of the first one has been asked for, and of both one more waits for room.
    assert taken.count("a") == 1 + 3 + 1
    assert taken.count("b") == 3 + 1
    assert len(taken) == 9, "no other stream was begun"
    items.close()
    assert threads_have_ended(), "whoever asks for no more leaves no thread behind"
    assert len(taken) < 20


class EmptyError(Exception):
    def __len__(self):
        return 0


@pytest.mark.parametrize("error", [ValueError("damaged"), KeyboardInterrupt(), EmptyError()])
def test_what_a_stream_raises_is_raised_in_its_place(error):
    def broken():
        yield 2
        raise error

    items = read_ahead([[1], broken(), [3]], held=4)
    got = [next(items), next(items)]
    with pytest.raises(type(error)):
        next(items)
    assert got == [1, 2]
    assert threads_have_ended()


def test_a_program_that_fails_half_way_ends():
    """The traceback keeps the generator, and its threads wait for room."""
    script = """
from itertools import repeat
from rwkv_speech.read_ahead import read_ahead
items = read_ahead([repeat(1), repeat(2)], held=1)
for item in items:
    raise ValueError("out of memory")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: out of memory")
