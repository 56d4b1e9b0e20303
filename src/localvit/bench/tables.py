"""The result of a measurement as plain values, for programs, and as tables, for people."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from localvit.bench.prepare import label
from localvit.bench.result import NOISE_LIMIT, BatchResult, BenchResult, ModelResult, Quartiles
from localvit.utils.tables import format_table, wrap_text

_MODEL_HEADINGS = ("input", "params (M)", "GMACs", "saved (MiB)", "p50 (ms)", "p99 (ms)")


def as_values(measured: BenchResult) -> dict[str, Any]:
    """Everything as values that JSON can hold: SI units, bytes, and counts per image."""
    options = measured.options
    return {
        "mode": "training" if options.train else "inference",
        "device": str(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "compile": options.compile,
        "channels_last": options.channels_last,
        "fuse": options.fuse and not options.train,
        "rounds": options.rounds,
        "noise_limit": NOISE_LIMIT,
        "noise": measured.noise(),
        "baseline": measured.baseline,
        "gemm_size": measured.gemm_size,
        "gemm_multiply_adds_per_second": asdict(measured.gemm_multiply_adds_per_second),
        "hardware": measured.hardware,
        "versions": measured.versions,
        "models": [
            {
                "name": result.model.name,
                "runtime": result.model.runtime,
                "input_size": list(result.model.input_size),
                "parameters": result.model.parameters,
                "multiply_adds": result.model.multiply_adds,
                "fused_multiply_adds": result.model.fused_multiply_adds,
                "saved_bytes_per_image": result.model.saved_bytes_per_image,
                "published_acc1": result.model.acc1,
                "latency": asdict(result.latency) if result.latency else None,
                "batches": [asdict(batch) for batch in result.batches],
            }
            for result in measured.models
        ],
    }


def as_text(measured: BenchResult) -> str:
    """A table of speeds per batch size, a table of the models, and what the columns mean."""
    options = measured.options
    speeds = [
        f"batch size {batch_size}\n{_speeds(measured, index)}" for index, batch_size in enumerate(options.batch_sizes)
    ]
    names = _name_headings(measured)
    rows = [(*_names(result, len(names) > 1), *_model(result)) for result in measured.models]
    headings = (*names, *_MODEL_HEADINGS)
    models = format_table(rows, headings=headings, right=range(len(names) + 1, len(headings)))
    return "\n\n".join((*speeds, models, "\n".join(map(wrap_text, _notes(measured)))))


def _speeds(measured: BenchResult, index: int) -> str:
    """The table of the batch size at `index`, without columns that nothing was measured for."""
    batches = [result.batches[index] for result in measured.models]
    compared = any(batch.ratio for batch in batches)
    with_memory = any(batch.peak_memory_bytes is not None for batch in batches)
    names = _name_headings(measured)
    headings = [*names, "images/s", "quartiles", *(["speedup", "quartiles"] if compared else []), "GEMM rate"]
    headings += ["peak MiB"] if with_memory else []
    rows = [
        (
            *_names(result, len(names) > 1),
            *_speed(batch, compared=compared, with_memory=with_memory),
        )
        for result, batch in zip(measured.models, batches, strict=True)
    ]
    return format_table(rows, headings=headings, right=range(len(names), len(headings)))


def _name_headings(measured: BenchResult) -> list[str]:
    """Of the columns that name a model: its runtime only where one is not torch."""
    return ["model", *(["runtime"] if any(result.model.runtime != "torch" for result in measured.models) else [])]


def _names(result: ModelResult, with_runtime: bool) -> tuple[str, ...]:
    name = label(result.model.name)
    return (name, result.model.runtime) if with_runtime else (name,)


def _speed(batch: BatchResult, *, compared: bool, with_memory: bool) -> Iterator[str]:
    yield from _median_and_quartiles(batch.images_per_second, 1)
    if compared:
        yield from _median_and_quartiles(batch.ratio, 2)
    yield "-" if batch.share_of_gemm_rate is None else f"{batch.share_of_gemm_rate.median:.0%}"
    if with_memory:
        peak = batch.peak_memory_bytes
        yield "-" if peak is None else f"{peak / 2**20:,.1f}"


def _median_and_quartiles(values: Quartiles | None, digits: int) -> tuple[str, str]:
    if values is None:
        return "-", "-"
    return f"{values.median:,.{digits}f}", f"{values.first_quartile:,.{digits}f}-{values.third_quartile:,.{digits}f}"


def _model(result: ModelResult) -> tuple[str, ...]:
    model, latency = result.model, result.latency
    return (
        "x".join(map(str, model.input_size[1:])),
        _number(model.parameters, 1e6, 2),
        _number(model.multiply_adds, 1e9, 3),
        _number(model.saved_bytes_per_image, 2**20, 2),
        *((f"{latency.p50_seconds * 1e3:,.2f}", f"{latency.p99_seconds * 1e3:,.2f}") if latency else ("-", "-")),
    )


def _number(value: int | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _notes(measured: BenchResult) -> Iterator[str]:
    options, hardware = measured.options, measured.hardware
    mode = "training steps" if options.train else "inference"
    switches = {"compiled": options.compile, "channels-last": options.channels_last}
    switches["fused"] = options.fuse and not options.train
    dtype = str(options.dtype).removeprefix("torch.")
    settings = [f"{mode} in {dtype}", *(name for name, on in switches.items() if on)]
    yield (
        f"Measured: {', '.join(settings)}, on {hardware['name']} ({hardware['device']}), "
        f"{hardware['threads']} CPU threads, torch {measured.versions['torch']}. Numbers are medians over "
        f"{options.rounds} rounds."
    )
    if measured.baseline and len(measured.models) > 1:
        yield f"Speedup: speed relative to {measured.baseline}, compared round by round."
    rate = measured.gemm_multiply_adds_per_second.median
    if any(result.model.runtime != "torch" for result in measured.models):
        yield (
            "Runtimes other than torch run exported files with as many threads, not fused, with images and logits as "
            "torch has them. Speedup: in the same runtime."
        )
    yield (
        f"GEMM rate: multiply-adds per second, relative to the {rate / 1e9:,.1f} G/s of a product of two "
        f"{measured.gemm_size} x {measured.gemm_size} matrices."
    )
    yield "GMACs: billions of multiply-adds per image (half the FLOPs), before fusing."
    yield "Saved: memory per image that a forward pass in training saves for the backward pass."
    calls = next((result.latency.calls for result in measured.models if result.latency), 0)
    yield f"p50, p99: latency of one image, over {calls} calls." if calls else "Latency is measured in inference only."
    if options.device.type != "cuda":
        yield "Peak memory is measured on CUDA only."
