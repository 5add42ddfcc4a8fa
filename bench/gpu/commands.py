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
    length = [f"--epoch_steps={steps // 2}", "--epoch_count=2", f"--save_steps={save}", "--warmup_steps=2"]
    # With a large epsilon Adam's steps follow the size of the gradients, which it hides otherwise.
    machine = [f"--accelerator={run.accelerator}", "--devices=1", "--precision=fp32", "--adam_eps=1e-2"]
    flags = [*tiny_flags(run), f"--data={data}", *sizes, *length, *machine]
    projects = {name: run.folder(name) for name in ("plain", "again", "killed", "deepspeed")}

    def start(name: str, *more: str) -> Popen:
        command = [sys.executable, run.program / "train.py", f"--proj_dir={projects[name]}", *flags, *more]
        return run.start(command, projects[name].with_suffix(".txt"))

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
        run.section(f"training, {name}", lambda: run.finish(process))  # noqa: B023

    def resumed() -> None:
        off = difference("killed")
        how = {"killed after step": reached, "largest difference": off}
        if off and not run.dry:
            how["two undisturbed runs differ by"] = difference("again")
        run.record(f"{steps} steps, SIGKILL, resumed: bit-exact", ok=off == 0 if reached < steps else None, **how)

    def as_plain() -> None:
        off = difference("deepspeed")
        run.record("DeepSpeed stage 1, one process, as plain", ok=off <= 1e-5, **{"largest difference": off})

    run.section("resumed", resumed)
    if "deepspeed" in running:
        run.section("DeepSpeed", as_plain)
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
    """The launchers: evaluation, prediction (also on the CPU)."""
    root, tiny = launchers(run), run.program / "demo" / "tiny"
    project = run.folder("project")
    paths = sorted((tiny / "corpus" / "test").iterdir())[: run.size(20, 2)]
    corpus = tiny / "corpus" / "test.jsonl"
    if run.dry:
        short = run.work / "test.jsonl"
        lines = [json.loads(line) for line in corpus.read_text().splitlines()[:2]]
        short.write_text("".join(json.dumps(x | {"audio": str(corpus.parent / x["audio"])}) + "\n" for x in lines))
        corpus = short

    settings = {"wkv": run.wkv, "load_model": tiny / "rwkv6-tiny.pth", "encoder": tiny / "wavlm-tiny"}

    def launch(script: str, *arguments: object, output: Path | None = None, **more: object) -> Popen:
        env = {name: str(value) for name, value in (settings | more).items()}
        return run.start(["sh", root / "demo" / script, *arguments], project.with_name(f"{script}.txt"), output, **env)

    def evaluate() -> None:
        run.finish(launch("demo-state-tuning.sh", OP="eval", eval_split=corpus, **machine, **how))
        run.record("evaluation", ok=True, wer=error_rate(project))

    def predict() -> None:
        texts = []
        for kind in (run.accelerator, "cpu")[: run.size(2, 1)]:
            output = project.with_name(f"{kind}.txt")
            run.finish(launch("demo-predict.sh", *paths, output=output, accelerator=kind, **how))
            texts.append(output.read_text().splitlines())
        equal = sum(a == b for a, b in zip(texts[0], texts[-1], strict=True))
        ok = equal == len(texts[0]) == len(paths)
        run.record("prediction, fp32, as on the CPU", ok=ok, equal=f"{equal} of {len(paths)}", first=texts[0][0])

    machine = {"accelerator": run.accelerator}
    command = [sys.executable, root / "demo" / "tiny" / "quickstart.py", *tiny_flags(run)[:2], f"--folder={project}"]
    command += ["untrained", "--downsample_k=1", "--adapter_hidden=64", "--random_seed=1"]
    run.section("a mission file", lambda: run.finish(run.start(command, project.with_name("mission.txt"))))
    how = {"proj_dir": project, "downsample_k": 1, "precision": "fp32", "max_new_tokens": run.size(100, 10)}
    run.section("evaluation", evaluate)
    run.section("prediction", predict)


def quickstart(run: Run) -> None:
    """The quick-start; a dry run leaves it to other tests."""
    if run.dry:
        return
    folder, begin = run.folder("learnt"), time.perf_counter()
    env = {"proj_dir": str(folder), "accelerator": run.accelerator, "wkv": run.wkv}
    run.finish(run.start(["sh", launchers(run) / "demo" / "demo-quickstart.sh"], folder.with_suffix(".txt"), **env))
    seconds = round(time.perf_counter() - begin, 1)
    found = {"before": error_rate(folder / "untrained"), "after": error_rate(folder)}
    run.record("quick-start", ok=found["after"] < 0.2, seconds=seconds, **found)


def error_rate(project: Path) -> float:
    (split,) = json.loads((project / "eval" / "summary.json").read_text())["splits"].values()
    return round(split["raw"]["wer"], 4)
