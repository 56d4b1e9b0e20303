"""What one GPU says of this package: tests, models beside their baselines, operators, and the training loop.

    python benchmarks/gpu_report.py [--minutes 8] [--output DIR] [--batch-size 256]
        [--parts models tests operators loop]

Prints each result as it is measured, and writes them as `gpu_report.md` and `gpu_report.json` into the output folder.
What matters most comes first; what does not fit into the minutes is left out and named. It needs CUDA and the core
dependencies of this package (and pytest for the tests), and runs from a copy of the source that is not installed.

Every model is measured beside its baseline, in turn, in bfloat16 (training under autocast) with random weights and
images of 224 pixels: eager or compiled by torch.compile, either also captured as a CUDA graph. `kernels` is this
package as it runs by default, `plain` is without its Triton kernels, `straightforward` the module as the paper reads
(`benchmarks/straightforward.py`). The ratio is the baseline's time over the model's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from families_speed import FAMILIES  # noqa: E402
from gpu_measure import Call, Timing, captured, in_turn  # noqa: E402
from kernels_speed import HEADER, measure_model  # noqa: E402
from PIL import Image  # noqa: E402
from straightforward import straightforward  # noqa: E402

import localvit  # noqa: E402
from localvit.ops import use_backend  # noqa: E402

CLASSES = 1000
PARTS = ["models", "tests", "operators", "loop"]


class Report:
    """Lines that are printed and kept, and rows of numbers."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.ends = time.monotonic() + 60 * minutes
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        """Print a line, and write the report again, so that nothing is lost when it is stopped."""
        print(text, flush=True)
        self.lines.append(text)
        (self.folder / "gpu_report.md").write_text("\n".join(self.lines) + "\n")
        (self.folder / "gpu_report.json").write_text(json.dumps(self.rows, indent=1) + "\n")

    def row(self, section: str, **values: Any) -> None:
        """Keep numbers."""
        self.rows.append({"section": section, **values})

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()


def random_model(name: str) -> Any:
    """A model with random weights, and random running statistics, which fusing folds."""
    torch.manual_seed(0)
    model = localvit.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model.cuda()


def inference_calls(family: str, batch_size: int, *, compiled: bool) -> dict[str, Call]:
    """The forward passes to compare; only the first two compiled, since compiling takes long."""
    name, baseline = FAMILIES[family]
    images = torch.randn(batch_size, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    made = random_model(name).eval().to(torch.bfloat16)
    fused, other = localvit.fuse(made), random_model(baseline).eval().to(torch.bfloat16)

    def run(model: Any, backend: Any = "auto") -> object:
        with use_backend(backend), torch.no_grad():
            return model(images)

    if compiled:
        models = {"baseline": torch.compile(other), "kernels": torch.compile(fused)}
        return {label: partial(run, model) for label, model in models.items()}
    plain = {"plain": partial(run, fused, "torch"), "straightforward": partial(run, straightforward(made))}
    return {"baseline": partial(run, other), "kernels": partial(run, fused), **plain}


def training_calls(family: str, batch_size: int, *, compiled: bool, in_graph: bool = False) -> dict[str, Call]:
    """Whole training steps: forward, cross entropy, backward and AdamW."""
    name, baseline = FAMILIES[family]
    images = torch.randn(batch_size, 3, 224, 224, device="cuda")
    labels_B = torch.randint(CLASSES, (batch_size,), device="cuda")

    def step(model: Any, optimizer: Any, backend: Any = "auto") -> None:
        with use_backend(backend):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=not in_graph):
                loss = torch.nn.functional.cross_entropy(model(images), labels_B)
            optimizer.zero_grad(set_to_none=not in_graph)
            loss.backward()
            optimizer.step()

    def prepared(model: Any, backend: Any = "auto") -> Call:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=in_graph)
        return partial(step, torch.compile(model) if compiled else model, optimizer, backend)

    calls = {"baseline": prepared(random_model(baseline)), "kernels": prepared(random_model(name))}
    if not compiled and not in_graph:
        calls["plain"] = prepared(random_model(name), "torch")
        calls["straightforward"] = prepared(straightforward(random_model(name).train()))
    return calls


def compare(report: Report, family: str, what: str, mode: str, batch_size: int) -> None:
    """Measure one family in one mode, and add its rows."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    compiled, in_graph = mode.startswith("compiled"), mode.endswith("graph")
    if what == "inference":
        calls = inference_calls(family, batch_size, compiled=compiled)
    else:
        calls = training_calls(family, batch_size, compiled=compiled, in_graph=in_graph)
    graphs = []
    if in_graph:
        calls = {label: call for label, call in calls.items() if label in ("baseline", "kernels", "plain")}
        for label in calls:
            kept, calls[label] = captured(calls[label])
            graphs.append(kept)
    timings = in_turn(calls, rounds=5 if what == "inference" else 3, calls_per_round=5 if what == "inference" else 2)
    for label, timing in timings.items():
        report.line(_model_row(family, what, mode, label, timing, timings["baseline"], batch_size))
        values = asdict(timing) | {"ratio": timings["baseline"].milliseconds / timing.milliseconds}
        report.row("models", family=family, what=what, mode=mode, variant=label, **values)


def _model_row(family: str, what: str, mode: str, label: str, timing: Timing, baseline: Timing, batch_size: int) -> str:
    rate = batch_size / timing.milliseconds * 1e3
    bound = "device" if timing.busy > 0.9 else "host"
    cells = [f"LocalViT-{family}", what, mode, label, f"{timing.milliseconds:.2f}", f"{rate:,.0f}"]
    cells += [f"{baseline.milliseconds / timing.milliseconds:.3f}", f"{timing.device_milliseconds:.2f}"]
    cells += [f"{timing.launches:.0f}", f"{timing.busy:.0%} ({bound})", f"{timing.peak_mebibytes:,.0f}"]
    return f"| {' | '.join(cells)} |"


MODEL_HEADER = (
    "\n| model | what | mode | variant | ms | images/s | ratio | device ms | launches | busy | peak MiB |\n|"
    + "---|" * 11
)


def run_tests(report: Report, seconds: float) -> None:
    """The GPU tests of the suite."""
    if find_spec("pytest") is None:
        report.line("The tests were not run: pytest is not installed.")
        return
    command = [sys.executable, "-m", "pytest", "tests", "-v", "-k", "gpu", "--continue-on-collection-errors"]
    if find_spec("xdist"):
        command += ["-n", "6", "--dist", "worksteal"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        lines = (stopped.stdout or b"").decode(errors="replace").splitlines()
        failed = [line for line in lines if "FAILED" in line or "ERROR" in line]
        ended = sum("PASSED" in line for line in lines) + len(failed)
        report.line("\n".join([f"GPU tests: {ended} ended within {seconds:.0f} s, {len(failed)} failed", *failed[:20]]))
        report.row("tests", summary=f"stopped after {seconds:.0f} s", failed=failed)
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    report.line("\n".join([f"GPU tests: {summary}", *lines[:20]]))
    report.row("tests", summary=summary, failed=lines)


def measure_operators(report: Report, batch_size: int) -> None:
    """Each kernel beside a copy, on the maps of LocalViT-T."""
    report.line(f"\n{HEADER}")
    with torch.no_grad():
        rows = measure_model(FAMILIES["T"][0], batch_size, torch.bfloat16, "hs", 20, report.line)
    for row in rows:
        report.row("operators", **row)


def training_loop(report: Report, batch_size: int) -> None:
    """Steps of `localvit train` on drawn images in memory."""
    from localvit.train.builder import build
    from localvit.train.config import TrainConfig
    from localvit.train.device_batches import DeviceBatches
    from localvit.train.step import train_step

    data_path = report.folder / "images"
    for number in range(2 * batch_size):
        path = data_path / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    settings: dict[str, Any] = {
        "model": FAMILIES["T"][0],
        "data_set": "FOLDER",
        "data_path": data_path,
        "batch_size": batch_size,
        "dtype": "bfloat16",
    }
    for number, extra in enumerate(({}, {"cuda_graph": True})):
        run = build(TrainConfig(**settings, **extra, output_dir=report.folder / f"run {number}"))
        images = torch.randn(batch_size, 3, 224, 224).pin_memory()
        labels_B = torch.randint(2, (batch_size,)).pin_memory()

        def batches(images: Any = images, labels_B: Any = labels_B) -> Iterator[Any]:
            while True:
                yield images, labels_B

        source = DeviceBatches(batches(), run.options)
        timing = in_turn({"loop": partial(train_step, run, source, stop=False)}, rounds=3, calls_per_round=2)["loop"]
        report.line(
            f"Training loop of LocalViT-T{', captured' if extra else ''}: {timing.milliseconds:.1f} ms a step of "
            f"{batch_size} images, {timing.launches:.0f} launches, device busy {timing.busy:.0%}, "
            f"{timing.peak_mebibytes:,.0f} MiB."
        )
        report.row("loop", captured=bool(extra), **asdict(timing))


def sections(report: Report, batch_size: int) -> Iterator[tuple[str, str, float, Callable[[], object]]]:
    """Kind, name, seconds that it may take, and function of each part, the most important first."""

    def models(family: str, what: str, mode: str) -> Callable[[], object]:
        return partial(compare, report, family, what, mode, batch_size)

    for what, seconds in (("inference", 10.0), ("training step", 15.0)):
        for mode in ("eager", "graph"):
            yield "models", f"T, {what}, {mode}", seconds, models("T", what, mode)
    yield "tests", "tests", 60.0, partial(run_tests, report, min(240.0, report.seconds_left / 2))
    yield "models", "T, inference, compiled", 40.0, models("T", "inference", "compiled")
    yield "models", "T, inference, compiled graph", 15.0, models("T", "inference", "compiled graph")
    yield "operators", "operators", 30.0, partial(measure_operators, report, batch_size)
    yield "models", "T, training step, compiled", 90.0, models("T", "training step", "compiled")
    yield "models", "T, training step, compiled graph", 20.0, models("T", "training step", "compiled graph")
    others = [family for family in FAMILIES if family != "T"]
    for family in others:
        yield "models", f"{family}, inference, graph", 20.0, models(family, "inference", "graph")
    for family in others:
        yield "models", f"{family}, training step, graph", 25.0, models(family, "training step", "graph")
    yield "loop", "training loop", 20.0, partial(training_loop, report, batch_size)
    for family in others:
        yield "models", f"{family}, inference, compiled graph", 60.0, models(family, "inference", "compiled graph")
    for family in others:
        yield "models", f"{family}, inference, eager", 15.0, models(family, "inference", "eager")
    for family in others:
        yield "models", f"{family}, training step, eager", 20.0, models(family, "training step", "eager")


@contextmanager
def kept_going(report: Report, name: str) -> Iterator[None]:
    """One part that fails is reported and does not end the others."""
    try:
        yield
    except Exception as error:
        report.line(f"{name} failed: {type(error).__name__}: {str(error)[:300]}")


def main() -> None:
    """Measure and write the report; the exit status is 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="leave out what does not fit")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_report"), help="folder for the report")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this report needs a CUDA GPU, and torch finds none: nothing was measured")
    report = Report(args.output, args.minutes)
    device = torch.cuda.get_device_properties(0)
    about = f"{device.name}, torch {torch.__version__}, batch {args.batch_size}, bfloat16"
    report.line(f"# {about}")
    report.row("about", text=about, command=" ".join(sys.argv))
    report.line(MODEL_HEADER)
    left_out = []
    for kind, name, seconds, part in sections(report, args.batch_size):
        if kind not in args.parts:
            continue
        if seconds > report.seconds_left:
            left_out.append(name)
            continue
        with kept_going(report, name):
            part()
    if left_out:
        report.line(f"\nLeft out for want of time: {'; '.join(left_out)}.")


if __name__ == "__main__":
    main()
