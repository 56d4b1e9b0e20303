"""What int8 costs, quantized in several ways: accuracy, agreement of the top class and error of logits.

python benchmarks/int8_ways.py localvit_nano_patch4_32 CIFAR10_FOLDER

The folder has train/ and val/ with a folder per class. 100 images calibrate, 1,000 are evaluated.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import localvit
from localvit.data.datasets import open_images
from localvit.inference.runner import load_model
from localvit.inference.runtimes import OnnxRuntime, OpenVINORuntime, Runtime

os.environ["NNCF_CI"] = "1"  # NNCF then sends no reports of usage

CALIBRATION_IMAGES, IMAGES = 100, 1000


def openvino_ways() -> dict[str, dict]:
    """Arguments of NNCF by what they do."""
    import nncf

    transformer = {"model_type": nncf.ModelType.TRANSFORMER}

    def without(*types: str) -> dict:
        return transformer | {"ignored_scope": nncf.IgnoredScope(types=list(types), validate=False)}

    def overflow(fix: object) -> dict:
        return transformer | {"advanced_parameters": nncf.AdvancedQuantizationParameters(overflow_fix=fix)}

    return {
        "defaults": {},
        "mixed preset": {"preset": nncf.QuantizationPreset.MIXED},
        "for transformers": transformer,
        "for transformers, without depth-wise convolutions": without("GroupConvolution"),
        "for transformers, without convolutions": without("GroupConvolution", "Convolution"),
        "for transformers, without products": without("MatMul"),
        "for transformers, 8 bits": overflow(nncf.OverflowFix.DISABLE),
        "for transformers, 7 bits": overflow(nncf.OverflowFix.ENABLE),
    }


def onnx_ways() -> dict[str, dict]:
    """Arguments of ONNX Runtime's static quantization by what they do."""
    from onnxruntime.quantization import QuantType

    products, convolutions = ["MatMul", "Gemm"], ["Conv"]
    seven_bits = {"per_channel": True, "reduce_range": True, "activation_type": QuantType.QUInt8}
    return {
        "all operators, 7 bits": seven_bits,
        "all operators, 8 bits": seven_bits | {"reduce_range": False},
        "all operators, signed activations": {"per_channel": True},
        "products and convolutions, 7 bits": seven_bits | {"op_types_to_quantize": products + convolutions},
        "products, 7 bits": seven_bits | {"op_types_to_quantize": products},
    }


def write_openvino(float32: Path, path: Path, images: np.ndarray, arguments: dict) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    dataset = nncf.Dataset([image[None] for image in images])
    model = nncf.quantize(openvino.Core().read_model(float32), dataset, subset_size=len(images), **arguments)
    openvino.save_model(model, path, compress_to_fp16=False)


def write_onnx(float32: Path, path: Path, images: np.ndarray, arguments: dict) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    simplified = path.with_name("simplified.onnx")
    quant_pre_process(str(float32), str(simplified), skip_symbolic_shape=True)
    quantize_static(str(simplified), str(path), Reader(), **arguments)


def logits_of(runtime: Runtime, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Centered logits of all images, and seconds of processor time."""
    started = time.process_time()
    logits = np.concatenate([runtime.run(images[index : index + 16]) for index in range(0, len(images), 16)])
    return logits - logits.mean(1, keepdims=True), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    train, val = (open_images("FOLDER", arguments.folder, split=split) for split in ("train", "val"))
    resize, rng = loaded.preprocessing.resizing(), np.random.default_rng(0)
    chosen = rng.permutation(len(train))[:CALIBRATION_IMAGES], rng.permutation(len(val))[:IMAGES]
    calibration, images = (
        np.stack([np.asarray(resize(data.load(index))).transpose(2, 0, 1) for index in indices])
        for data, indices in zip((train, val), chosen, strict=True)
    )
    names = loaded.class_names or val.class_names
    labels = np.array([names.index(val.class_names[val.labels[index]]) for index in chosen[1]])
    formats: list[tuple[localvit.Onnx | localvit.OpenVINO, type[Runtime], Callable, dict]] = [
        (localvit.Onnx(include=("preprocessing",)), OnnxRuntime, write_onnx, onnx_ways()),
        (localvit.OpenVINO(include=("preprocessing",)), OpenVINORuntime, write_openvino, openvino_ways()),
    ]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for settings, runtime, write, ways in formats:
            path = Path(folder) / f"float32{settings.suffix}"
            localvit.export(loaded, path, settings)
            expected, seconds = logits_of(runtime(path), images)
            print(f"{settings.name} float32: Acc@1 {100 * (expected.argmax(1) == labels).mean():.1f}, {seconds:.2f} s")
            for way, options in ways.items():
                quantized = path.with_stem("int8")
                write(path, quantized, calibration, options)
                found, seconds = logits_of(runtime(quantized), images)
                error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
                print(
                    f"{settings.name} {way}: Acc@1 {100 * (found.argmax(1) == labels).mean():.1f}, same top class "
                    f"{100 * (found.argmax(1) == expected.argmax(1)).mean():.1f} %, error {error:.3f}, {seconds:.2f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
