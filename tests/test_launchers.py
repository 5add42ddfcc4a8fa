"""The launchers and the set-up, run for real by sh, beside a `train.py` that only records what it is given."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution, version
from pathlib import Path

import packaging
import pytest

from rwkv_speech.options import Options, environment_flags, setting_fields

ROOT = Path(__file__).parents[1]
TRAIN, PREDICT, CHAT, LIVE = "demo-state-tuning.sh", "demo-predict.sh", "demo-chat.sh", "demo-live.sh"
SERVE = "demo-serve.sh"
LIVE_ONLY = {f.name for group, f in setting_fields() if group == "live"}
SETTINGS = {f.name: f for _, f in setting_fields()}

SERVING = {f.name for group, f in setting_fields() if group == "serving"}

RECORDER = """\
import json, os, sys
print("a log line", file=sys.stderr)
print(json.dumps([sys.argv[1:], dict(os.environ)]))
sys.exit(7 if "--exit_7" in sys.argv else 0)
"""

# A Python of an environment that has packaging, and the project of its own checkout once {installed} exists.
ENVIRONMENT_PYTHON = """\
#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then
    echo "$@" >>{log}
    case "$*" in *install*) {pip};; esac
    exit
fi
PYTHONPATH={site}
[ ! -e {installed} ] || PYTHONPATH={site}:{src}
export PYTHONPATH
exec {python} -S "$@"
"""


def quote(path: Path | str) -> str:
    return shlex.quote(str(path))


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A copy of the launchers in a folder with an awkward name, with an environment that needs no installing."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / 'it\'s a "check" out'
        shutil.copytree(ROOT / "demo", self.root / "demo", ignore=shutil.ignore_patterns("tiny"))
        (self.root / "src/rwkv_speech").mkdir(parents=True)
        (self.root / "src/rwkv_speech/__init__.py").touch()
        (self.root / "train.py").write_text(RECORDER)
        (self.root / "requirements.txt").write_text("# what it needs\npackaging>=20\n")
        (self.root / "pyproject.toml").write_text('[project.optional-dependencies]\ndev = ["packaging>=21"]\n')
        self.site = folder / "site"  # the packages of every environment here
        self.site.mkdir()
        metadata = Path(str(distribution("packaging").locate_file(f"packaging-{version('packaging')}.dist-info")))
        for installed in (metadata, Path(packaging.__file__).parent):
            (self.site / installed.name).symlink_to(installed)
        self.log = folder / "pip.log"
        self.log.touch()
        self.active = folder / "the active one"
        self.write_python(self.active / "bin/python", self.active)
        (self.active / "installed").touch()
        self.bin = folder / "bin"  # a PATH with a few tools and, at first, no Python
        self.bin.mkdir()
        for tool in ("sh", "dirname", "rm", "mkdir", "cp", "cat", "sleep", "touch"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def write_python(self, path: Path, environment: Path, *, pip: str | None = None) -> None:
        installed = quote(environment / "installed")
        text = ENVIRONMENT_PYTHON.format(
            log=quote(self.log),
            pip=pip or f"touch {installed}",
            installed=installed,
            site=quote(self.site),
            src=quote(self.root / "src"),
            python=quote(sys.executable),
        )
        write_program(path, text)

    def add_python3(self, *, pip: str | None = None) -> None:
        """A python3 on the PATH whose venvs have an `ENVIRONMENT_PYTHON`."""
        prototype = self.bin.parent / "prototype"
        self.write_python(prototype, self.root / ".venv", pip=pip)
        create = f'mkdir -p "$3/bin" && cp {quote(prototype)} "$3/bin/python"'
        text = f'#!/bin/sh\nif [ "$1 $2" = "-m venv" ]; then {create}; exit; fi\nexec {quote(sys.executable)} "$@"\n'
        write_program(self.bin / "python3", text)

    def lacks(self, *paths: Path) -> str:
        """What `lacks.py` says of an environment with these folders of packages."""
        environment = {"PYTHONPATH": ":".join(str(path) for path in (self.site, *paths))}
        command = [sys.executable, "-S", str(self.root / "demo/setup/lacks.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def start(self, script: str, *arguments: str, active: bool = True, **settings: str) -> subprocess.Popen:
        environment = {"PATH": str(self.bin), "LANG": "C.UTF-8"} | settings
        if active:
            environment["VIRTUAL_ENV"] = str(self.active)
        command = ["sh", str(self.root / "demo" / script), *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=self.bin.parent, start_new_session=True, **pipes)

    def run(self, script: str, *arguments: str, **how) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **how)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def given(self, script: str, *arguments: str, **settings: str) -> tuple[list[str], dict[str, str]]:
        """The arguments and the environment of train.py."""
        done = self.run(script, *arguments, **settings)
        assert done.returncode == 0, done.stderr
        argv, environment = json.loads(done.stdout)
        assert "--from_environment" in argv
        return argv, environment

    def options(self, script: str, *arguments: str, **settings: str) -> Options:
        """What train.py makes of it."""
        return Options.parse(*self.given(script, *arguments, **settings))

    def edit(self, script: str, name: str, line: str) -> None:
        """Replaces the line that sets `name`."""
        path = self.root / "demo" / script
        text, replaced = re.subn(rf"^{name}=.*$", lambda _: line, path.read_text(), flags=re.MULTILINE)
        assert replaced == 1, name
        path.write_text(text)

    @property
    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if " install " in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# --- settings reach the program --------------------------------------------------------------------------------------


def test_train_passes_the_defaults_of_the_program(checkout):
    wanted = Options.of(load_model="m.pth", proj_dir=str(checkout.root / "output"))
    assert checkout.options(TRAIN, load_model="m.pth") == wanted


def test_predict_passes_the_defaults_of_the_program(checkout):
    wanted = {"op": "predict", "load_model": "m.pth", "file_path": ["a.wav"], "proj_dir": str(checkout.root / "output")}
    assert checkout.options(PREDICT, load_model="m.pth", file_path="a.wav") == Options.of(**wanted)


@pytest.mark.parametrize(("script", "op"), [(CHAT, "chat"), (SERVE, "serve")])
def test_chat_and_serve_pass_the_defaults_of_the_program(checkout, script, op):
    wanted = {"op": op, "load_model": "m.pth", "proj_dir": str(checkout.root / "output")}
    assert checkout.options(script, load_model="m.pth") == Options.of(**wanted)


def test_live_passes_the_defaults_of_the_program(checkout):
    wanted = {"op": "live", "load_model": "m.pth", "proj_dir": str(checkout.root / "output")}
    assert checkout.options(LIVE, load_model="m.pth") == Options.of(**wanted)
    said = {"file_path": ["-"], "right_s": 0.64, "realtime": True}
    assert checkout.options(LIVE, "-", load_model="m.pth", right_s="0.64", realtime="1") == Options.of(**wanted, **said)


@pytest.mark.parametrize("script", [TRAIN, PREDICT, CHAT, LIVE, SERVE])
def test_what_can_be_edited_are_settings_and_each_stands_once(script):
    text = (ROOT / "demo" / script).read_text()
    names = re.findall(r"^(\w+)=", text, flags=re.MULTILINE)
    assert {"load_model", "encoder", "adapter", "proj_dir", "devices", "beam"} < set(names)
    assert {*names} - {"OP"} < set(SETTINGS)
    for name in {*names} - {"load_model", "file_path", "OP"}:
        lines = [line.partition("#")[0] for line in text.splitlines()]
        assert sum(bool(re.search(rf"^{name}=|\$\{{?{name}\b", line)) for line in lines) == 1, name


@pytest.mark.parametrize(
    ("script", "others"),
    [
        (TRAIN, {"file_path", "output_dir", "prompt", "records", "normalizer", "to", *LIVE_ONLY, *SERVING}),
        (PREDICT, {"cache_features", "records", "normalizer", "to", *LIVE_ONLY, *SERVING}),
        (SERVE, {"cache_features", "file_path", "output_dir", "prompt", "records", "normalizer", "to", *LIVE_ONLY}),
    ],
)
def test_every_setting_arrives_from_the_environment(checkout, script, others):
    settings = {name: f"the {name}" for name in SETTINGS if name != "op"}
    environment = checkout.given(script, **settings)[1]
    assert settings.items() <= environment.items()
    flags = environment_flags({TRAIN: "train", PREDICT: "predict", SERVE: "serve"}[script], environment)
    for name in settings.keys() - others:
        assert (f"--{name}" if SETTINGS[name].default is False else f"--{name}=the {name}") in flags
    assert not [flag for flag in flags if flag.removeprefix("--").partition("=")[0] in others]


def test_values_arrive_as_they_are_meant(checkout):
    options = checkout.options(
        *(TRAIN, "--micro_bsz=2"),
        **{"load_model": "m.pth", "lr_init": "1e-3", "grad_clip": "0.5", "micro_bsz": "3", "noise_snr": "5,20"},
        **{"noise_dir": "a b", "mission": "translate", "temperature": "0.7", "file_path": "another script's"},
    )
    flat = options.flat()
    assert (flat["lr_init"], flat["grad_clip"], flat["micro_bsz"], flat["noise_snr"]) == (1e-3, 0.5, 2, [5, 20])
    assert (flat["noise_dir"], flat["mission"], flat["temperature"], flat["file_path"]) == (
        "a b",
        "translate",
        0.7,
        None,
    )


@pytest.mark.parametrize("script", [TRAIN, PREDICT])
def test_an_empty_setting_is_left_to_the_program(checkout, script):
    checkout.edit(script, "eval_bsz", "eval_bsz=")
    flags = environment_flags("eval", checkout.given(script, load_model="m.pth", file_path="x", adapter="")[1])
    empty = ("--adapter", "--eval_bsz", "--precision", "--max_new", "--loop", "--lr_final")
    assert not [flag for flag in flags if flag.startswith(empty)]


AWKWARD = '/data/it\'s "large"  $HOME `x` *\\ models/m v2.pth'


def test_spaces_and_quotes_arrive_from_the_environment(checkout):
    assert checkout.options(TRAIN, load_model=AWKWARD).model.load_model == AWKWARD
    assert checkout.options(PREDICT, load_model="m.pth", file_path=AWKWARD).file_path == [AWKWARD]
    assert checkout.options(PREDICT, AWKWARD, load_model="m.pth").file_path == [AWKWARD]


@pytest.mark.parametrize(
    "line",
    [
        'load_model="/a b/it\'s.pth"',
        'load_model="${load_model:-/a b/it\'s.pth}"',
        "load_model=/a\\ b/it\\'s.pth",
    ],
    ids=["in-quotes", "as-default", "bare"],
)
@pytest.mark.parametrize("script", [TRAIN, PREDICT])
def test_a_setting_is_edited_in_the_script(checkout, script, line):
    checkout.edit(script, "load_model", line)
    settings = {"file_path": "x"} if script == PREDICT else {}
    assert checkout.options(script, **settings).model.load_model == "/a b/it's.pth"


def test_the_environment_wins_over_a_default_in_the_script(checkout):
    checkout.edit(TRAIN, "OP", 'OP="${OP:-eval}"')
    checkout.edit(TRAIN, "beam", 'beam="${beam:-3}"')
    options = checkout.options(TRAIN, load_model="m")
    assert (options.op, options.decoding.beam) == ("eval", 3)
    options = checkout.options(TRAIN, load_model="m", OP="train", beam="4")
    assert (options.op, options.decoding.beam) == ("train", 4)


def test_arguments_have_the_last_word(checkout):
    options = checkout.options(TRAIN, "--micro_bsz", "2", "--load_model", "b c.pth", micro_bsz="3")
    assert (options.training.micro_bsz, options.model.load_model) == (2, "b c.pth")


@pytest.mark.parametrize(("said", "passed"), [("1", True), ("0", False), ("", False)], ids=["1", "0", "empty"])
def test_switches(checkout, said, passed):
    options = checkout.options(TRAIN, load_model="m", download=said, resume=said)
    assert (options.data.download, options.resume) == (passed, passed)


def test_device_is_understood_as_devices(checkout):
    assert checkout.options(TRAIN, load_model="m", device="2").machine.devices == 2
    assert checkout.options(TRAIN, load_model="m", device="2", devices="3").machine.devices == 3
    assert checkout.options(PREDICT, "a.wav", load_model="m", device="1,").machine.devices == [1]


# --- files to transcribe ---------------------------------------------------------------------------------------------


def test_files_as_arguments_then_flags(checkout):
    options = checkout.options(PREDICT, "a b.wav", "it's.mp3", "--beam", "4", load_model="m", file_path="other")
    assert (options.file_path, options.decoding.beam) == (["a b.wav", "it's.mp3"], 4)


def test_a_file_in_the_environment_and_flags(checkout):
    options = checkout.options(PREDICT, "--beam", "4", load_model="m", file_path="a b*.wav")
    assert (options.file_path, options.decoding.beam) == (["a b*.wav"], 4)


def test_standard_output_and_exit_status_are_the_program_s(checkout):
    done = checkout.run(PREDICT, "a.wav", "--exit_7", load_model="m")
    assert done.returncode == 7
    assert done.stdout.count("\n") == 1
    assert "a.wav" in json.loads(done.stdout)[0]
    assert done.stderr == "a log line\n"


SAVER = """\
import os, signal, sys, time
if "--op=train" in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), print("saved", file=sys.stderr), os._exit(130)))
    open("training", "x").close()
    time.sleep(60)
"""


@pytest.mark.parametrize("script", [TRAIN, "demo-quickstart.sh"])
def test_ctrl_c_waits_for_training_to_save_and_gives_its_status(checkout, script):
    (checkout.root / "train.py").write_text(SAVER)
    (checkout.root / "demo/tiny").mkdir()
    (checkout.root / "demo/tiny/quickstart.py").touch()
    (checkout.bin / "date").symlink_to(shutil.which("date"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, it would be in children
    try:
        process = checkout.start(script, load_model="m")
    finally:
        signal.signal(signal.SIGINT, before)
    while not list(checkout.bin.parent.rglob("training")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130
    assert "saved" in process.communicate()[1]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        (TRAIN, {}, ["load_model is not set", "1.6B", "3B", "7B", "rwkv-6-world", "rwkv7-g1"]),
        (PREDICT, {"file_path": "x"}, ["load_model is not set", "1.6B", "3B", "7B", "rwkv-6-world", "rwkv7-g1"]),
        (PREDICT, {"load_model": "m"}, ["no audio", "file_path="]),
        (CHAT, {}, ["load_model is not set"]),
        (LIVE, {}, ["load_model is not set"]),
        (SERVE, {}, ["load_model is not set"]),
        (TRAIN, {"load_model": "m", "OP": "evaluate"}, ["OP=evaluate", "train", "eval"]),
        (TRAIN, {"load_model": "m", "OP": "predict"}, ["demo-predict.sh"]),
    ],
    ids=[
        *("train-without-model", "predict-without-model", "predict-without-file", "chat-without-model"),
        *("live-without-model", "serve-without-model"),
        *("unknown-OP", "OP-predict"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_installed(checkout, script, settings, words):
    done = checkout.run(script, active=False, **settings)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_help_needs_no_model(checkout):
    assert "--help" in checkout.given(TRAIN, "--help")[0]
    assert "--help" in checkout.given(PREDICT, "--help")[0]
    assert "--help" in checkout.given(CHAT, "--help")[0]


def quickest(action: Callable[[], object]) -> float:
    """Seconds; the best of three, for the machine may be busy."""
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        action()
        seconds.append(time.monotonic() - started)
    return min(seconds)


# --- set-up ----------------------------------------------------------------------------------------------------------


def test_an_active_environment_is_used_quickly_and_left_alone(checkout):
    assert quickest(lambda: checkout.run("setup.sh")) < 1
    done = checkout.run("setup.sh")
    assert (done.stdout, done.stderr) == (f"{checkout.active}/bin/python\n", "")
    assert checkout.installs == []


def test_a_conda_environment_is_used(checkout):
    done = checkout.run("setup.sh", active=False, CONDA_PREFIX=str(checkout.active), CONDA_DEFAULT_ENV="base")
    assert (done.stdout, done.stderr) == (f"{checkout.active}/bin/python\n", "")


def test_an_active_environment_that_lacks_only_the_project_gets_it(checkout):
    (checkout.active / "installed").unlink()
    done = checkout.run("setup.sh")
    assert done.stdout == f"{checkout.active}/bin/python\n"
    (install,) = checkout.installs
    assert install.endswith("--no-deps -e .")


@pytest.mark.parametrize(
    ("requirements", "lack"),
    [
        ("packaging>=20\n", ""),
        ("no-such-package>=3  # a comment\n", "no-such-package>=3"),
        ("packaging>=1000\n", f"packaging>=1000 (it has {version('packaging')})"),
        ("no-such-package; python_version < '3'\n", ""),
        ("packaging[more]\n", ""),
        ("packaged[plain]\n", ""),
        ("packaged[more]\n", "no-such-part; extra == 'more'"),
        ("a\nb\nc\nd\ne\n", "a, b, c and 2 more"),
    ],
    ids=["nothing", "missing", "too-old", "other-python", "unknown-extra", "plain-extra", "part-of-extra", "many"],
)
def test_what_the_environment_lacks(checkout, requirements, lack):
    metadata = ["Metadata-Version: 2.1", "Name: packaged", "Version: 1", "Requires-Dist: no-such-part; extra == 'more'"]
    write_program(checkout.site / "packaged-1.dist-info/METADATA", "\n".join(metadata))
    (checkout.root / "requirements.txt").write_text(requirements)
    assert checkout.lacks(checkout.root / "src") == lack


def test_the_project_must_be_this_one(checkout, tmp_path):
    other = tmp_path / "other/rwkv_speech/__init__.py"
    write_program(other, "")
    assert checkout.lacks() == "rwkv-speech"
    assert str(other.parent) in checkout.lacks(tmp_path / "other")


def test_an_environment_is_made_once(checkout):
    checkout.add_python3()
    first = checkout.run("setup.sh", "dev", active=False)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.root}/.venv/bin/python\n"
    assert "3 GB" in first.stderr
    (install,) = checkout.installs
    assert install.endswith("-e .[dev]")
    assert quickest(lambda: checkout.run("setup.sh", "dev", active=False)) < 1
    again = checkout.run("setup.sh", "dev", active=False)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert len(checkout.installs) == 1


def test_an_active_environment_that_lacks_things_gives_way_and_says_so(checkout):
    checkout.add_python3()
    write_program(checkout.active / "bin/python", "#!/bin/sh\nexit 1\n")
    done = checkout.run(TRAIN, load_model="m")
    assert done.returncode == 0, done.stderr
    assert str(checkout.active) in done.stderr.splitlines()[0]
    assert len(checkout.installs) == 1


def test_an_interrupted_installation_is_started_over(checkout):
    partial = quote(checkout.root / ".venv/partial")
    installed = quote(checkout.root / ".venv/installed")
    checkout.add_python3(pip=f"touch {installed} {partial}; sleep 60")
    process = checkout.start("setup.sh", active=False)
    while not (checkout.root / ".venv/partial").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.communicate()
    checkout.add_python3()
    done = checkout.run("setup.sh", active=False)
    assert done.returncode == 0, done.stderr
    assert len(checkout.installs) == 2
    assert not (checkout.root / ".venv/partial").exists()


def test_two_launchers_install_once(checkout):
    installed = quote(checkout.root / ".venv/installed")
    checkout.add_python3(pip=f"sleep 1; touch {installed}")
    both = [checkout.start(TRAIN, active=False, load_model="m") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(checkout.installs) == 1
    assert sum("waiting" in err for _, err in said) == 1


def test_a_failed_installation_fails_the_launcher(checkout):
    checkout.add_python3(pip="echo 'no index' >&2; exit 1")
    done = checkout.run(TRAIN, active=False, load_model="m")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no index" in done.stderr
    assert "pip could not install" in done.stderr


def test_a_failed_update_keeps_the_environment(checkout):
    checkout.add_python3()
    venv = checkout.root / ".venv"
    assert checkout.run("setup.sh", active=False).returncode == 0
    requirements = checkout.root / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text(before + "no-such-package\n")
    checkout.write_python(venv / "bin/python", venv, pip="exit 1")
    assert checkout.run("setup.sh", active=False).returncode == 1
    requirements.write_text(before)
    done = checkout.run("setup.sh", active=False)
    assert (done.stdout, done.stderr) == (f"{venv}/bin/python\n", "")


@pytest.mark.parametrize(
    ("python3", "words"),
    [
        (None, "no Python here"),
        ('case "$*" in *print*) echo 3.9;; *) exit 1;; esac', "Python 3.9 is too old"),
        ('case "$*" in *ensurepip*) exit 1;; *print*) echo 3.12;; esac', "apt install python3.12-venv"),
    ],
    ids=["none", "too-old", "without-venv"],
)
def test_an_unfit_python_is_one_line(checkout, python3, words):
    if python3:
        write_program(checkout.bin / "python3", f"#!/bin/sh\n{python3}\n")
    done = checkout.run(TRAIN, active=False, load_model="m")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (checkout.root / ".venv").exists()
