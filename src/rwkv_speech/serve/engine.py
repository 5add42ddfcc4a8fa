"""One thread that owns the model: answers to many requests are rows of one batch; new ones join at the next token.

    engine.start(loop)
    async with engine.answer(sample, options) as answer:
        async for piece in answer:
            print(piece, end="")
    answer.result

Between two tokens it does one of the calls that wait: a piece of a live session with the text so far (`live.Partial`),
a token of a conversation. So none of them waits longer than for one call of each of the others. What a live session has
heard to its end is answered as a row of the batch.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from rwkv_speech.data.sample import Sample
from rwkv_speech.decoding import DecodingResult, Rows, Search, choose
from rwkv_speech.errors import UserError
from rwkv_speech.lm.tokenizer import END_OF_TEXT
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import DecodingOptions
from rwkv_speech.session import StrippedStream

log = logging.getLogger("rwkv_speech")

T = TypeVar("T")

PROMPTS = 8  # that are read together: those who are being answered wait for that


class Answer:
    """The answer to one sample; iterating gives its text in pieces that stand.

    prompt_tokens: positions of what was asked, once the first piece is there.
    result: once all pieces are there.
    """

    def __init__(self, sample: Sample, options: DecodingOptions, text: StrippedStream) -> None:
        self.sample, self.options, self.text = sample, options, text
        self.search: Search | None = None  # once what is asked has been read
        self.cancelled = False
        self.prompt_tokens = 0
        self.result: DecodingResult | None = None
        self._events: asyncio.Queue[str | DecodingResult | Exception] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self.result is not None:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, DecodingResult):
            self.result = event
            raise StopAsyncIteration
        return event

    def put(self, event: str | DecodingResult | Exception) -> None:
        """What is new; called where the loop runs."""
        self._events.put_nowait(event)


class Engine:
    """See the module's text.

    most: answers that are decoded together.
    """

    def __init__(self, model: SpeechRWKV, *, most: int) -> None:
        self.model, self.most = model, most
        self._work = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future]] = deque()
        self._new: list[Answer] = []  # that are being read
        self._running: list[Answer] = []
        self._rows = Rows(model.language_model)
        self._news: list[tuple[Answer, str | DecodingResult | Exception]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """loop: where answers are waited for."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what waits is never answered."""
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def counts(self) -> dict[str, int]:
        return {"running": len(self._running), "waiting": len(self._waiting)}

    @contextlib.contextmanager
    def answer(self, sample: Sample, options: DecodingOptions) -> Iterator[Answer]:
        """The answer to a sample without one, whose audio are waveforms; it is given up with the `with` block."""
        answer = Answer(sample, options, StrippedStream(self.model.tokenizer.stream()))
        with self._work:
            self._waiting.append(answer)
            self._work.notify()
        try:
            yield answer
        finally:
            answer.cancelled = True
            with self._work, contextlib.suppress(ValueError):  # where it was begun
                self._waiting.remove(answer)

    async def call(self, function: Callable[[], T]) -> T:
        """What a function gives that uses the model, once it is its turn."""
        future = self._loop.create_future()
        with self._work:
            self._calls.append((function, future))
            self._work.notify()
        return await future

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._closed:
            try:
                self._turn()
            except Exception as error:  # of this file's own: without its thread, the server would answer nobody
                log.exception("the engine gave up all that it had")
                self._give_up(error)

    def _turn(self) -> None:
        with self._work:
            self._work.wait_for(lambda: self._closed or self._calls or self._waiting or self._running)
            if self._closed:
                return
            call = self._calls.popleft() if self._calls else None
            room = min(PROMPTS, self.most - len(self._running))
            self._new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if call:
            self._do(*call)
        self._begin([answer for answer in self._new if not answer.cancelled])
        self._new = []
        self._step()
        self._tell()

    def _give_up(self, error: Exception) -> None:
        with self._work:
            answers, calls = [*self._running, *self._new, *self._waiting], [*self._calls]
            self._waiting.clear()
            self._calls.clear()
        self._running, self._new, self._rows = [], [], Rows(self.model.language_model)
        self._news += [(answer, error) for answer in answers]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._tell()
            for _, future in calls:
                self._settle(future, error=error)

    def _do(self, function: Callable[[], Any], future: asyncio.Future) -> None:
        if future.cancelled():
            return
        try:
            result = function()
        except Exception as error:
            self._settle(future, error=error)
        else:
            self._settle(future, result)

    def _settle(self, future: asyncio.Future, result: Any = None, *, error: Exception | None = None) -> None:
        def settle() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(settle)

    def _begin(self, answers: Sequence[Answer]) -> None:
        """Reads what is asked. What can't be read harms none that came with it."""
        if not answers:
            return
        try:
            self._read(answers)
        except Exception as error:
            if len(answers) == 1:
                self._news.append((answers[0], error))
            else:
                for answer in answers:
                    self._begin([answer])

    def _read(self, answers: Sequence[Answer]) -> None:
        model = self.model
        batch = model.prepare([answer.sample for answer in answers]).to(model.device)
        hidden, state = model.read(batch)
        usable = hidden.isfinite().all(1).tolist()
        joining = []
        for row, (answer, is_usable) in enumerate(zip(answers, usable, strict=True)):
            answer.prompt_tokens = int(batch.prompt_lengths[row])
            task = model.task(answer.sample.mission)
            one = torch.tensor([row], device=hidden.device)
            if not is_usable:
                error = UserError("the audio leads to numbers that are not finite: its samples are out of range")
                self._news.append((answer, error))
            elif task.mission.chooses:
                labels = [*map(model.tokenizer.encode, task.labels or ())]
                (result,) = choose(model.language_model, hidden[one], state.select(one), labels)
                self._news += [(answer, model.text(result)), (answer, result)]
            else:
                limit = answer.options.max_new_tokens or task.mission.max_new_tokens(batch.seconds[row])
                answer.search = Search(limit, answer.options, answer.sample.id, END_OF_TEXT)
                joining.append(row)
        if joining:
            rows = torch.tensor(joining, device=hidden.device)
            self._rows.join(hidden[rows], state.select(rows), [answers[row].search for row in joining])
            self._running += [answers[row] for row in joining]

    def _step(self) -> None:
        """One token more for each answer."""
        try:
            if gone := [answer for answer in self._running if answer.cancelled]:
                self._running = [answer for answer in self._running if not answer.cancelled]
                self._rows.drop([answer.search for answer in gone])
            if not self._running:
                return
            self._rows.step()
            for answer in self._running:
                piece = "".join(map(answer.text.feed, answer.search.newly_decided()))
                if not answer.search.live:
                    piece += answer.text.flush()
                if piece:
                    self._news.append((answer, piece))
                if not answer.search.live:
                    self._news.append((answer, answer.search.result()))
            self._running = [answer for answer in self._running if answer.search.live]
        except Exception as error:
            log.error("%d answers were given up: %s", len(self._running), error)
            self._news += [(answer, error) for answer in self._running]
            self._running, self._rows = [], Rows(self.model.language_model)

    def _tell(self) -> None:
        """Hands over what is new, all at once."""
        if news := self._news:
            self._news = []

            def put() -> None:
                for answer, event in news:
                    answer.put(event)

            self._loop.call_soon_threadsafe(put)
