"""The page in a headless Chromium with a fake microphone, beside a server in this process."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
import uvicorn

from rwkv_speech import SpeechRWKV
from rwkv_speech.options import DecodingOptions, ServingOptions
from rwkv_speech.serve.app import make_app
from rwkv_speech.speech.audio import load_audio
from tests.browser import CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

SENTENCES = sorted(Path(__file__).parents[1].glob("demo/tiny/corpus/test/*.ogg"))
TOKENS = 20
RATE = 48_000  # of the fake microphone


@pytest.fixture(scope="module")
def model(world) -> SpeechRWKV:
    torch.manual_seed(0)
    model = world.speech_rwkv(mission=["transcribe", "converse"], adapter_hidden=16)
    for state in model.language_model.time_states:
        torch.nn.init.normal_(state)
    return model


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    app = make_app(model, ServingOptions(), options=DecodingOptions(max_new_tokens=TOKENS))
    config = uvicorn.Config(app, port=0, log_level="error", ws="websockets-sansio", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def microphone(folder: Path, *sentences: Path) -> Path:
    """A file of sentences, half a second of silence before and a second after each."""
    parts = [np.zeros(RATE // 2)]
    for sentence in sentences:
        parts += [soxr.resample(load_audio(sentence).numpy(), 16_000, RATE), np.zeros(RATE)]
    soundfile.write(folder / "microphone.wav", np.concatenate(parts), RATE, subtype="PCM_16")
    return folder / "microphone.wav"


def choose(page: Page, mission: str) -> None:
    page.js(f"mission.value = '{mission}'; mission.dispatchEvent(new Event('change'))")


def lines(page: Page, kind: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll('li.{kind}:not(.partial)')].map((x) => x.textContent)")


def test_talking_twice_uploading_and_taking_back(address, model, tmp_path):
    with browser(tmp_path / "profile", microphone=microphone(tmp_path, *SENTENCES[:4])) as page:
        page.open(address)
        assert page.js("[...mission.options].map((x) => x.value)") == ["transcribe", "converse"]
        assert page.js("mission.value") == "converse"
        for rounds in range(2):  # by the keyboard: hold the space bar, and let it go
            page.key("keyDown")
            page.wait("hold.getAttribute('aria-pressed') === 'true'")
            page.wait("level.value > 0.02")
            time.sleep(1.0)
            page.key("keyUp")
            page.wait(f"document.querySelectorAll('li.answer:not(.partial)').length > {rounds}")
        assert not page.js("undo.disabled")
        first = lines(page, "answer")[0]
        page.js("undo.click(); undo.click()")  # once, whoever is impatient
        page.wait("document.querySelectorAll('li.answer').length === 1")
        assert lines(page, "answer") == [first]
        assert page.js("undo.disabled")
        page.js("document.getElementById('new').click()")
        assert page.js("talk.children.length") == 0

        # What is uploaded goes as it is: the text is that of the file.
        choose(page, "transcribe")
        page.choose_file(SENTENCES[5])
        page.wait("document.querySelector('li.heard:not(.partial)')?.textContent")
        wanted = model.transcribe([SENTENCES[5]], mission="transcribe", max_new_tokens=TOKENS)
        assert [" ".join(text.split()) for text in lines(page, "heard")] == [" ".join(wanted[0].split())]

        # Hands-free: what is said appears while it is said, and stays.
        page.js("document.getElementById('new').click(); document.getElementById('hands-free').click()")
        page.wait("!!document.querySelector('li.heard:not(.partial)')")
        page.js("document.getElementById('hands-free').click()")
        page.wait("hold.getAttribute('aria-pressed') === 'false'")
        assert page.errors == []
        assert page.js("problem.hidden"), page.js("problem.textContent")


def test_a_microphone_that_is_refused_is_a_sentence(address, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.open(address)
        page.key("keyDown")
        page.wait("!problem.hidden")
        assert "refused" in page.js("problem.textContent")
        assert page.js("hold.getAttribute('aria-pressed')") == "false"
        # Nothing of the page comes from elsewhere.
        hosts = page.js("performance.getEntriesByType('resource').map((x) => new URL(x.name).origin)")
        assert {*hosts} == {address.rstrip("/")}
