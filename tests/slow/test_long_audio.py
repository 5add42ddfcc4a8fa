"""An hour of speech is read, resampled, listened to and cut in the memory that ten minutes take."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

JFK = Path(__file__).parents[2].parent / "shared/speech/jfk.flac"

CUT = """
import resource, sys
import torch
from rwkv_speech.speech.audio import audio_blocks
from rwkv_speech.speech.segments import cut

torch.set_num_threads(1)
seconds = sum(segment.end - segment.start for segment in cut(audio_blocks(sys.argv[1])))
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(not JFK.exists(), reason="../shared/speech is absent")
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_memory_does_not_grow_with_the_length(tmp_path):
    speech, rate = soundfile.read(JFK, dtype="int16")  # 11 s, two channels at 44.1 kHz
    peak = {}
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.flac"
        times = round(minutes * 60 / 11)
        with soundfile.SoundFile(path, "w", rate, 2, subtype="PCM_16") as file:
            for _ in range(times):
                file.write(speech)
                file.write(np.zeros((rate // 10, 2), np.int16))
        done = subprocess.run([sys.executable, "-c", CUT, path], capture_output=True, text=True, check=True)
        seconds, kibibytes = map(float, done.stdout.split())
        assert seconds > 0.9 * times * 11
        peak[minutes] = kibibytes / 1024
    # The hour is 1270 MB as it is decoded, 230 MB at 16 kHz.
    assert peak[60] < peak[10] + 20, peak
