"""Commands as a user types them: training that is killed and goes on, DeepSpeed, and the launchers."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from subprocess import Popen

import torch

from bench.gpu.common import Run


def tiny_flags(run: Run) -> list[str]:
    tiny = run.program / "demo" / "tiny"
    return [f"--load_model={tiny / 'rwkv6-tiny.pth'}", f"--encoder={tiny / 'wavlm-tiny'}", f"--wkv={run.wkv}"]


def train(run: Run) -> None:
    """Four runs of 30 steps at once: two undisturbed, one killed and started again, one under DeepSpeed."""
    steps, save = run.size((30, 5), (6, 2))
    data = run.program / "demo" / "tiny" / "corpus" / "valid.jsonl"
    sizes = ["--downsample_k=1", "--adapter_hidden=64", f"--micro_bsz={run.size(4, 1)}", "--num_workers=0"]
    length = [f"--epoch_steps={steps}", "--epoch_count=1", f"--save_steps={save}", "--warmup_steps=2"]
    # With a large epsilon Adam's steps follow the size of the gradients, which it hides otherwise.
    machine = [f"--accelerator={run.accelerator}", "--devices=1", "--precision=fp32", "--adam_eps=1e-2"]
    flags = [*tiny_flags(run), f"--data={data}", *sizes, *length, *machine]
    projects = {name: run.folder(name) for name in ("plain", "again", "killed", "deepspeed")}

    def start(name: str, *more: str) -> Popen:
        command = [sys.executable, run.program / "train.py", f"--proj_dir={projects[name]}", *flags, *more]
        return run.start(command, log(name))

    def log(name: str) -> Path:
        return projects[name].with_suffix(".txt")

    def saved(name: str) -> list[int]:
        return [int(path.stem.split("-")[2]) for path in projects[name].glob("rwkv-adapter-*.pth")]

    def weights(name: str) -> torch.Tensor:
        tensors = torch.load(projects[name] / f"rwkv-adapter-{steps}.pth", weights_only=True, map_location="cpu")
        return torch.cat([x.flatten().double() for x in tensors.values()])

    def difference(name: str) -> float:
        return (weights(name) - weights("plain")).abs().max().item()

    running = {name: start(name) for name in ("plain", "killed")}
    if not run.dry:
        running["again"] = start("again")
        if importlib.util.find_spec("deepspeed"):
            running["deepspeed"] = start("deepspeed", "--strategy=deepspeed_stage_1")
    killed = running.pop("killed")
    while killed.poll() is None and max(saved("killed"), default=0) < 2 * save:  # a resume point is there by then
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    reached = max(saved("killed"), default=0)
    running["killed"] = start("killed")
    for name, process in running.items():
        run.section(f"training, {name}", lambda: run.finish(process, log(name)))  # noqa: B023

    def resumed() -> None:
        off = difference("killed")
        how = {"killed after step": reached, "largest difference": off}
        if off and not run.dry:
            how["two undisturbed runs differ by"] = difference("again")
        run.record(f"{steps} steps, SIGKILL, resumed: bit-exact", ok=off == 0 if reached < steps else None, **how)

    run.section("resumed", resumed)
    if "deepspeed" in running:
        off = difference("deepspeed")
        run.record("DeepSpeed stage 1, one process, as plain", ok=off <= 1e-5, **{"largest difference": off})
    elif not run.dry:
        run.record("DeepSpeed stage 1", needs="deepspeed")


def launchers(run: Run) -> Path:
    """The program's tree by links, where demo/setup.sh names this Python instead of installing one."""
    root = run.folder("tree")
    for path in run.program.iterdir():
        if path.name not in ("demo", "output", ".venv", "build"):
            (root / path.name).symlink_to(path)
    (root / "demo").mkdir()
    for path in (run.program / "demo").iterdir():
        if path.name != "setup.sh":
            (root / "demo" / path.name).symlink_to(path)
    (root / "demo" / "setup.sh").write_text(f"printf '%s\\n' '{sys.executable}'\n")
    return root


def use(run: Run) -> None:
    """The quick-start, then evaluation and prediction of what it trained, on the device and on the CPU."""
    root, tiny = launchers(run), run.program / "demo" / "tiny"
    project, log = run.folder("project"), run.folder("") / "log.txt"
    paths = sorted((tiny / "corpus" / "test").iterdir())[: run.size(20, 2)]
    corpus = tiny / "corpus" / "test.jsonl"
    if run.dry:
        short = run.work / "test.jsonl"
        lines = [json.loads(line) for line in corpus.read_text().splitlines()[:2]]
        short.write_text("".join(json.dumps(x | {"audio": str(corpus.parent / x["audio"])}) + "\n" for x in lines))
        corpus = short

    settings = {"wkv": run.wkv, "load_model": tiny / "rwkv6-tiny.pth", "encoder": tiny / "wavlm-tiny"}

    def launch(script: str, *arguments: object, **more: object) -> str:
        """Runs a launcher; what it printed."""
        output = run.folder("") / "output.txt"
        env = {name: str(value) for name, value in (settings | more).items()}
        with output.open("w") as file:
            run.finish(run.start(["sh", root / "demo" / script, *arguments], log, file, **env), log)
        return output.read_text()

    def quickstart() -> None:
        begin = time.perf_counter()
        launch("demo-quickstart.sh", proj_dir=project, accelerator=run.accelerator)
        folders = {"before": project / "untrained", "after": project}
        found = {name: error_rate(folder) for name, folder in folders.items()}
        run.record("quick-start", ok=found["after"] < 0.2, seconds=round(time.perf_counter() - begin, 1), **found)

    if not run.dry:
        run.section("quick-start", quickstart)
    if not any(project.glob("rwkv-adapter-*.pth")):
        command = [sys.executable, root / "demo" / "quickstart.py", *tiny_flags(run)[:2], f"--folder={project}"]
        command += ["untrained", "--downsample_k=1", "--adapter_hidden=64", "--random_seed=1"]
        run.finish(run.start(command, log), log)
    how = {"proj_dir": project, "downsample_k": 1, "precision": "fp32", "max_new_tokens": run.size(100, 10)}

    def evaluate() -> None:
        launch("demo-state-tuning.sh", OP="eval", eval_split=corpus, accelerator=run.accelerator, **how)
        run.record("evaluation", ok=True, wer=error_rate(project))

    def predict() -> None:
        texts = [
            launch("demo-predict.sh", *paths, accelerator=kind, **how).splitlines()
            for kind in dict.fromkeys([run.accelerator, "cpu"])
        ]
        equal = sum(a == b for a, b in zip(texts[0], texts[-1], strict=True))
        ok = equal == len(texts[0]) == len(paths)
        run.record("prediction, fp32, as on the CPU", ok=ok, equal=f"{equal} of {len(paths)}", first=texts[0][0])

    run.section("evaluation", evaluate)
    run.section("prediction", predict)


def error_rate(project: Path) -> float:
    (split,) = json.loads((project / "eval" / "summary.json").read_text())["splits"].values()
    return round(split["raw"]["wer"], 4)
