"""`bench --runtime`: the same model in several runtimes, each beside the baseline in the same one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_files import PREPROCESSING, tiny_model

from localvit.bench.measure import measure
from localvit.bench.prepare import BenchOptions, prepare_exported
from localvit.checkpoints import save_checkpoint
from localvit_cli import UsageError, main
from localvit_cli.bench_runtimes import parse_runtimes, prepare_all

SMALL = BenchOptions(device=torch.device("cpu"), batch_sizes=(2,), rounds=3)


def test_runtimes_are_named_or_refused():
    assert parse_runtimes("openvino, torch,openvino") == ["openvino", "torch"]
    for text in ("tensorrt", ","):
        with pytest.raises(UsageError, match="choose from torch, torch-compile, onnxruntime"):
            parse_runtimes(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = save_checkpoint(tiny_model(), folder / "tiny.safetensors", preprocessing=PREPROCESSING.to_dict())
    return prepare_all([str(checkpoint)], None, ["torch", "onnxruntime", "onnxruntime-int8"], SMALL, None, folder)


def test_one_model_in_every_runtime(models):
    assert [model.runtime.split()[0] for model in models] == ["torch", "ONNX", "ONNX"]
    assert [model.runtime.endswith("int8") for model in models] == [False, False, True]
    assert len({model.parameters for model in models}) == 1
    images = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = tiny_model()(images)
        others = [model.module(images) for model in models[1:]]
    for model, found in zip(models[1:], others, strict=True):
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        # float32 rounds; int8 has 8 bits, and was calibrated with noise too.
        assert error < (0.5 if "int8" in model.runtime else 1e-4), model.runtime
        assert (error > 1e-3) == ("int8" in model.runtime), model.runtime
    measured = measure(models, SMALL)
    assert all(result.batches[0].images_per_second.median > 0 for result in measured.models)
    assert all(result.latency.p50_seconds > 0 for result in measured.models)


def test_an_exported_file_is_measured_in_its_runtime(models, capsys):
    path = str(models[1].module.path)
    arguments = ["bench", path, "--baseline", path, "--batch-sizes", "2", "--rounds", "3", "--force"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["models"]
    assert result["runtime"].startswith("ONNX Runtime")
    assert result["parameters"] is None
    assert main([*arguments, "--device", "cpu", "--input-size", "32"]) == 2
    assert "--input-size has no effect on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="leave out train and dtype"):
        prepare_exported(Path(path), replace(SMALL, dtype=torch.bfloat16))


def test_a_processor_without_bfloat16_is_said(tmp_path):
    openvino = pytest.importorskip("openvino")
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has bfloat16")
    with pytest.raises(ValueError, match="this processor has no bfloat16"):
        prepare_all(["localvit_nano_patch4_32"], None, ["openvino-bfloat16"], SMALL, None, tmp_path)


def test_other_runtimes_than_torch_do_not_train(capsys):
    assert main(["bench", "localvit_nano_patch4_32", "--runtime", "openvino", "--train", "--device", "cpu"]) == 2
    assert "run inference on the CPU" in capsys.readouterr().err
