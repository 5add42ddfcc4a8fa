"""Every strategy on two real CPU processes: what it learns, what it writes, how it ends and goes on.

python -m pytest tests/slow/test_strategies.py          (about 15 minutes; last results: 13 passed with each
generation; 9 more, of several missions and of a state alone, with RWKV-6; of LoRA and MiSS, 8 with each)
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwkv_speech.engine.deepspeed import STAGES
from tests.conftest import World
from tests.tiny import write_world

ROOT = Path(__file__).parents[2]
# With a large epsilon Adam's steps follow the size of the gradients, which it hides otherwise.
FLAGS = ["--epoch_count=4", "--adam_eps=1e-2", "--lr_init=1e-4", "--lr_final=1e-4", "--warmup_steps=2"]
ACCUMULATE = ["--num_workers=0", "--accumulate_grad_batches=2", "--grad_clip=0.5"]


def command(world, project, *flags):
    return [str(ROOT / "train.py"), f"--proj_dir={project}", *world.flags, *FLAGS, *ACCUMULATE, *flags]


def run(arguments, **environment):
    how = {"env": os.environ | {"OMP_NUM_THREADS": "1"} | environment, "text": True}
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how)


def finish(*processes):
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]


def losses(project):
    with (project / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


def weights(project):
    return torch.load(project / "rwkv-adapter-24.pth", weights_only=True)


def agree(project, single, *runs):
    """The last mission files of two folders, and the losses of their runs, which are there, too, or in `runs`."""
    two, one = map(losses, runs or (project, single))
    assert sorted(two) == sorted(one) == list(range(1, 25))
    assert max(abs(one[step] - two[step]) for step in range(1, 21)) < 1e-5
    for name, x in weights(single).items():
        torch.testing.assert_close(weights(project)[name], x, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return World(folder, write_world(folder, generation=request.param))


@pytest.fixture(scope="module")
def single(world, tmp_path_factory):
    project = tmp_path_factory.mktemp("single")
    finish(run([sys.executable, *command(world, project, "--micro_bsz=2")]))
    return project


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("strategy", ["ddp", *STAGES])
def test_two_processes_learn_what_one_learns(world, single, tmp_path, strategy):
    flags = ["--micro_bsz=1", "--devices=2", f"--strategy={strategy}"]
    finish(run([sys.executable, *command(world, tmp_path, *flags)]))
    agree(tmp_path, single)


@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_3"])
def test_one_process_under_deepspeed_learns_the_same(world, single, tmp_path, strategy):
    finish(run([sys.executable, *command(world, tmp_path, "--micro_bsz=2", "--devices=1", f"--strategy={strategy}")]))
    agree(tmp_path, single)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1", "deepspeed_stage_3"])
def test_a_notice_to_the_first_process_stops_both_and_the_run_goes_on(world, single, tmp_path, strategy):
    arguments = [sys.executable, *command(world, tmp_path, "--micro_bsz=1", "--devices=2", f"--strategy={strategy}")]
    process = run(arguments)
    table = tmp_path / "metrics.csv"
    while not (table.exists() and table.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err[-3000:]
    assert "the same command goes on" in err
    assert "Traceback" not in err
    finish(run(arguments))
    agree(tmp_path, single)


def test_torchrun(world, single, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finish(run([*launch, *command(world, tmp_path, "--micro_bsz=1", "--devices=2", "--strategy=ddp")]))
    agree(tmp_path, single)


def test_slurm(world, single, tmp_path):
    """As `srun` starts it: two tasks on one node, told by the environment."""
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": free_port(), "SLURM_NNODES": "1"}
    arguments = [sys.executable, *command(world, tmp_path, "--micro_bsz=1", "--devices=2", "--strategy=ddp")]
    finish(*[run(arguments, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **job) for rank in range(2)])
    agree(tmp_path, single)


@pytest.fixture(scope="module")
def missions(world, tmp_path_factory):
    """The same recordings, by turns of two missions: with two processes, a step often has one mission in each."""
    place = tmp_path_factory.mktemp("missions") / "train.jsonl"
    lines = [json.loads(line) for line in (world.folder / "train.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"audio": str(world.folder / line["audio"])}
        line |= {"mission": "label/first", "text": line["text"][0]} if i % 2 else {"mission": "transcribe"}
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.fixture(scope="module")
def single_of_missions(world, missions, tmp_path_factory):
    project = tmp_path_factory.mktemp("single-of-missions")
    flags = [f"--data={missions}", "--share_adapter=0", "--micro_bsz=2"]
    finish(run([sys.executable, *command(world, project, *flags)]))
    return project


@pytest.mark.parametrize("strategy", ["ddp", *STAGES])
def test_missions_with_adapters_of_their_own(world, missions, single_of_missions, tmp_path, strategy):
    flags = [f"--data={missions}", "--share_adapter=0", "--micro_bsz=1", "--devices=2", f"--strategy={strategy}"]
    finish(run([sys.executable, *command(world, tmp_path, *flags)]))
    for mission in ("transcribe", "label/first"):
        agree(tmp_path / mission, single_of_missions / mission, tmp_path, single_of_missions)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1", "deepspeed_stage_3"])
def test_a_state_alone(world, single, tmp_path, strategy):
    flags = ["--train_type=state", f"--adapter={single / 'rwkv-adapter-24.pth'}"]
    finish(run([sys.executable, *command(world, tmp_path / "one", *flags, "--micro_bsz=2")]))
    flags += ["--micro_bsz=1", "--devices=2", f"--strategy={strategy}"]
    finish(run([sys.executable, *command(world, tmp_path / "two", *flags)]))
    agree(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
@pytest.mark.parametrize("method", ["lora", "miss"])
def test_beside_the_matrices(world, tmp_path, method, strategy):
    """Stages 1 to 3: what peft puts there is gathered, divided and saved as all else that is trained."""
    flags = [f"--train_type=adapter+state+{method}", "--peft_config=r=4", "--peft_lr_scale=10"]
    finish(run([sys.executable, *command(world, tmp_path / "one", *flags, "--micro_bsz=2")]))
    flags += ["--micro_bsz=1", "--devices=2", f"--strategy={strategy}"]
    finish(run([sys.executable, *command(world, tmp_path / "two", *flags)]))
    agree(tmp_path / "two", tmp_path / "one")
    one, two = (load_file(tmp_path / name / "rwkv-adapter-24/adapter_model.safetensors") for name in ("one", "two"))
    learnt = [x.abs().max() for name, x in one.items() if "lora_A" not in name]
    assert min(learnt) > 1e-4
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, atol=1e-5, rtol=0)
