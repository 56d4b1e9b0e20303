"""What `localvit.bench.measure` measured, as plain values for programs and as a table for people."""

from dataclasses import asdict
from typing import Any

from localvit.bench.prepare import label
from localvit.bench.result import NOISE_LIMIT, BatchResult, Bench, ModelResult, Spread
from localvit.utils.tables import format_table

_SPEED_HEADINGS = ("model", "batch", "images/s", "quartiles", "x baseline", "quartiles", "of floor", "peak MiB")
_MODEL_HEADINGS = ("model", "input", "parameters", "multiply-adds", "saved/image", "latency p50", "p99")


def as_values(measured: Bench) -> dict[str, Any]:
    """Everything, ready for JSON: SI units, bytes, and counts an image."""
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
        "noisy": measured.noisy(),
        "baseline": measured.baseline,
        "gemm_size": measured.gemm_size,
        "gemm_multiply_adds_per_second": asdict(measured.gemm_multiply_adds_per_second),
        "hardware": measured.hardware,
        "versions": measured.versions,
        "models": [
            {
                "name": result.model.name,
                "input_size": list(result.model.input_size),
                "parameters": result.model.parameters,
                "multiply_adds": result.model.multiply_adds,
                "form_multiply_adds": result.model.form_multiply_adds,
                "saved_bytes_per_image": result.model.saved_bytes_per_image,
                "published_acc1": result.model.acc1,
                "latency": asdict(result.latency) if result.latency else None,
                "batches": [asdict(batch) for batch in result.batches],
            }
            for result in measured.models
        ],
    }


def as_text(measured: Bench) -> str:
    """Two tables, speeds and models, and what their columns mean."""
    options, hardware = measured.options, measured.hardware
    speeds = [_speed(result, batch) for result in measured.models for batch in result.batches]
    models = [_model(result) for result in measured.models]
    what = "training steps" if options.train else "inference"
    switches = ("compile", "channels_last", *(() if options.train else ("fuse",)))
    how = [name.replace("_", "-") for name in switches if getattr(options, name)]
    calls = next((result.latency.calls for result in measured.models if result.latency), 0)
    rate = measured.gemm_multiply_adds_per_second.median
    notes = (
        f"{what} in {str(options.dtype).removeprefix('torch.')}{''.join(f', {each}' for each in how)}, on "
        f"{hardware['name']} ({hardware['device']}), {hardware['threads']} threads, torch "
        f"{measured.versions['torch']}; medians over {options.rounds} rounds, all models in turn.",
        f"x baseline: speed over that of {measured.baseline}, round by round." if measured.baseline else "",
        f"of floor: time of the multiply-adds at this machine's rate, {rate / 1e9:,.1f} G/s in a product of matrices "
        f"of {measured.gemm_size}, over the time taken.",
        "peak MiB is measured on CUDA alone." if options.device.type != "cuda" else "",
        "multiply-adds are half the FLOPs; saved/image is what a training forward keeps for each image.",
        f"latency is of one image, in ms, over {calls} calls." if calls else "latency is measured in inference alone.",
    )
    return "\n\n".join(
        (
            format_table(speeds, headings=_SPEED_HEADINGS, right=range(1, len(_SPEED_HEADINGS))),
            format_table(models, headings=_MODEL_HEADINGS, right=range(2, len(_MODEL_HEADINGS))),
            "\n".join(filter(None, notes)),
        )
    )


def _speed(result: ModelResult, batch: BatchResult) -> tuple[str, ...]:
    def quartiles(spread: Spread, digits: int) -> str:
        return f"{spread.first_quartile:,.{digits}f}-{spread.third_quartile:,.{digits}f}"

    peak = batch.peak_memory_bytes
    return (
        label(result.model.name),
        str(batch.batch_size),
        f"{batch.images_per_second.median:,.1f}",
        quartiles(batch.images_per_second, 1),
        *((f"{batch.ratio.median:.2f}", quartiles(batch.ratio, 2)) if batch.ratio else ("-", "-")),
        f"{batch.share_of_floor.median:.0%}",
        "-" if peak is None else f"{peak / 2**20:,.1f}",
    )


def _model(result: ModelResult) -> tuple[str, ...]:
    model, latency = result.model, result.latency
    return (
        label(model.name),
        "x".join(map(str, model.input_size[1:])),
        f"{model.parameters:,}",
        f"{model.multiply_adds / 1e9:.3f} G",
        f"{model.saved_bytes_per_image / 2**20:,.2f} MiB",
        *((f"{latency.p50_seconds * 1e3:,.2f}", f"{latency.p99_seconds * 1e3:,.2f}") if latency else ("-", "-")),
    )
