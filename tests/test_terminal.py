"""Standard output and standard error that are closed, full, or of another encoding, and folders that aren't."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# train.py itself, with an operation that takes no time in the place of the real ones.
DOOR = """
import logging, os, runpy, sys, types
from rwkv_speech.errors import UserError
from rwkv_speech.terminal import say
log = logging.getLogger("rwkv_speech")
def operation(options):
    {operation}
    return 0
sys.modules["rwkv_speech.ops"] = types.SimpleNamespace(OPS={{"train": operation}})
sys.argv = ["train.py", "--load_model=m"]
runpy.run_path("train.py", run_name="__main__")
"""


def door(operation: str, redirection: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Runs it in a shell, with such redirections."""
    command = f'exec "$0" -c "$1" {redirection}'
    if "|" in redirection:
        command = f'{{ "$0" -c "$1"; echo "status $?" >&2; }} {redirection}'
    code = DOOR.format(operation=operation)
    environment = os.environ | environment
    return subprocess.run(["sh", "-c", command, sys.executable, code], cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", '"café 今天 😀 \\\\udce9"'.encode()),
        ("latin-1", b'"caf\xe9 \\u4eca\\u5929 \\ud83d\\ude00 \\udce9"'),
        ("ascii", b'"caf\\u00e9 \\u4eca\\u5929 \\ud83d\\ude00 \\udce9"'),
    ],
)
def test_what_an_encoding_lacks_is_written_as_in_json(encoding, expected):
    """The last character stands for a byte of a file's name that is no UTF-8."""
    done = door("say('\"café 今天 😀 \\udce9\"')", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == expected.replace(b"\\\\", b"\\")
    assert json.loads(done.stdout.decode(encoding)) == "café 今天 😀 \udce9"


@pytest.mark.parametrize(
    ("redirection", "said"),
    [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")],
    ids=["closed", "full"],
)
def test_standard_output_that_cannot_be_written(redirection, said):
    done = door('say("text")', redirection)
    assert done.stderr.decode() == f"train.py: cannot write to standard output: {said}\n"
    assert done.returncode == 2


def test_a_closed_standard_output_is_not_the_next_file(tmp_path):
    done = door(f"file = open('{tmp_path}/x', 'w'); os.write(file.fileno(), b'ours'); os.write(1, b'printed')", ">&-")
    assert (tmp_path / "x").read_text() == "ours"
    assert b"Bad file descriptor" in done.stderr


def test_a_reader_that_goes_away():
    done = door("[say(f'{i}\\n') for i in range(10**6)]", "| head -1")
    assert done.stdout == b"0\n"
    line, status = done.stderr.decode().splitlines()
    assert "standard output is closed" in line
    assert status == "status 141"


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"], ids=["closed", "full"])
def test_standard_error_does_not_stop_the_work(redirection):
    work = "from rich.console import Console; log.info('a'); Console(stderr=True).print('b'); say('done')"
    done = door(work, redirection)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done", b"")
    assert door("raise UserError('wrong')", redirection).returncode == 2


def test_a_reader_of_standard_error_that_goes_away_does_not_stop_the_work(tmp_path):
    work = "sys.stderr.write('x\\n' * 10**5); from rich.console import Console; Console(stderr=True).print('b')"
    door(f"{work}; open('{tmp_path}/end', 'w')", "2>&1 | head -1")
    assert (tmp_path / "end").exists()


@pytest.mark.parametrize(
    ("operation", "line"),
    [
        ("raise UserError('no \\x1b[2K\\n folder')", "train.py: no \\x1b[2K\\n folder\n"),
        ("log.warning('%s: odd', 'a\\x1b]0;title\\x07b')", "a\\x1b]0;title\\x07b: odd\n"),
        ("open('/no/file')", "train.py: /no/file: No such file or directory; what was written before is whole\n"),
        ("os.mkdir('train.py/x')", "train.py: train.py/x: Not a directory; what was written before is whole\n"),
    ],
    ids=["error", "log", "no-file", "no-folder"],
)
def test_one_line_without_what_a_terminal_obeys(operation, line):
    done = door(operation)
    assert done.stderr.decode() == line


def test_a_log_gets_no_bars_of_the_hub():
    """As the two libraries themselves understand it."""
    bar = "from huggingface_hub.utils import tqdm; from datasets.utils import tqdm as other; "
    done = door(bar + "[list(kind(range(3), file=sys.stderr)) for kind in (tqdm, other)]")
    assert (done.returncode, done.stderr) == (0, b"")
