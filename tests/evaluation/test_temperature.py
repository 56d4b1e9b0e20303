"""Temperature scaling, compared with closed forms, NumPy and what `predict` writes."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit.checkpoints import CheckpointError, read_checkpoint
from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import expected_calibration_error, reliability_bins
from localvit.evaluation.temperature import calibrate, cross_fitted, effect_of, fit_temperature
from localvit.inference.calibration import CALIBRATION, Calibration
from localvit.utils.weight_files import read_weight_file
from localvit_cli import main


def evaluation_of(logits_NM, labels_N):
    """An evaluation with logits; of the rest, only what calibration reads."""
    probabilities_NM = logits_NM.double().softmax(1)
    top = logits_NM.topk(min(5, logits_NM.shape[1]))
    return Evaluation(
        paths=[f"{index}.png" for index in range(len(labels_N))],
        labels_N=labels_N,
        top_classes_NK=top.indices,
        top_logits_NK=top.values,
        top_probabilities_NK=probabilities_NM.gather(1, top.indices),
        losses_N=torch.nn.functional.cross_entropy(logits_NM.double(), labels_N, reduction="none"),
        class_names=[str(index) for index in range(logits_NM.shape[1])],
        logits_NM=logits_NM,
    )


def drawn(count, classes, temperature, seed=0):
    """Logits whose probabilities are right after division by `temperature`: labels drawn from these."""
    generator = torch.Generator().manual_seed(seed)
    logits_NM = 6 * torch.randn(count, classes, generator=generator)
    labels_N = (logits_NM.double() / temperature).softmax(1).multinomial(1, generator=generator)[:, 0]
    return logits_NM, labels_N


@pytest.mark.parametrize(("logit", "hits", "count"), [(7.0, 13, 17), (0.03, 61, 97), (250.0, 5, 7)])
def test_two_classes_have_a_closed_form(logit, hits, count):
    """Equal logits (a, 0): the cross-entropy is lowest where the probability is the share of hits."""
    logits_NM = torch.tensor([[logit, 0.0]]).repeat(count, 1)
    labels_N = (torch.arange(count) >= hits).long()
    expected = logit / math.log(hits / (count - hits))
    # The logits are float32, so 0.03 is off by 4e-8 of itself.
    assert fit_temperature(logits_NM, labels_N) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found(temperature):
    logits_NM, labels_N = drawn(7001, 11, temperature)
    found = fit_temperature(logits_NM, labels_N)
    # At the minimum, the expected logit is the mean logit of the true class (the derivative in 1 / T is zero).
    z = logits_NM.double().numpy()
    weights = np.exp(z / found - (z / found).max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    slope = (weights * z).sum(1).mean() - z[np.arange(len(z)), labels_N.numpy()].mean()
    assert abs(slope) < 1e-6
    # The variance of the estimate of 1 / T is one over the Fisher information, the sum of the logits' variances.
    information = ((weights * z**2).sum(1) - (weights * z).sum(1) ** 2).sum()
    assert abs(1 / found - 1 / temperature) < 4 / math.sqrt(information)


def test_a_temperature_cannot_be_fitted_without_mistakes_or_to_noise():
    logits_NM, labels_N = drawn(53, 5, 4.0)
    right_N = logits_NM.argmax(1)
    with pytest.raises(ValueError, match="all 53 images are classified correctly"):
        fit_temperature(logits_NM, right_N)
    with pytest.raises(ValueError, match="no better than chance"):
        fit_temperature(logits_NM, logits_NM.argmin(1))
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(logits_NM.index_fill(0, torch.tensor([3]), math.inf), labels_N)
    one_wrong_N = right_N.clone()
    one_wrong_N[7] = logits_NM[7].argmin()
    with pytest.raises(ValueError, match="misclassifies 1 of the 53 images"):
        calibrate(evaluation_of(logits_NM, one_wrong_N))


def test_no_image_has_a_temperature_that_was_fitted_to_it():
    logits_NM, labels_N = drawn(101, 7, 3.0)
    before_N = cross_fitted(logits_NM, labels_N)[:, 0]
    changed_NM = logits_NM.clone()
    changed_NM[41] *= 1.5  # the same order of classes
    after_N = cross_fitted(changed_NM, labels_N)[:, 0]
    same_N = before_N == after_N
    assert same_N[41]
    assert same_N.sum() < 30  # its part of five; all others have a fit that it was part of
    assert len(before_N.unique()) == 5


def test_calibration_lowers_the_error_of_an_overconfident_model_on_other_images_too():
    logits_NM, labels_N = drawn(4001, 7, 3.0)
    evaluation = evaluation_of(logits_NM, labels_N)
    calibration = calibrate(evaluation)
    confidences_N, classes_N = logits_NM.double().softmax(1).max(1)
    before = expected_calibration_error(reliability_bins(confidences_N, classes_N == labels_N))
    assert before > 0.2
    assert calibration.ece_before == pytest.approx(before, rel=1e-12)
    loss = torch.nn.functional.cross_entropy(logits_NM.double(), labels_N).item()
    assert calibration.loss_before == pytest.approx(loss, rel=1e-12)
    # About 200 images in each of 15 bins give differences of 0.8 * sqrt(0.2 / 200) even for perfect probabilities.
    assert calibration.ece_after < 0.04
    assert calibration.loss_after < calibration.loss_before
    effect = effect_of(evaluation, calibration)
    assert (effect.is_cross_fitted, effect.ece, effect.loss) == (True, calibration.ece_after, calibration.loss_after)
    other = evaluation_of(*drawn(3001, 7, 3.0, seed=1))
    effect = effect_of(other, calibration)
    assert not effect.is_cross_fitted
    expected = torch.nn.functional.cross_entropy(other.logits_NM.double() / calibration.temperature, other.labels_N)
    assert effect.loss == pytest.approx(expected.item(), rel=1e-12)
    assert effect.ece < 0.04


RECORD = {"temperature": 2.0, "num_images": 9, "images": "ab", "ece_before": 0.2, "ece_after": 0.1}
RECORD |= {"loss_before": 1.0, "loss_after": 0.5}


@pytest.mark.parametrize(
    "crafted",
    [
        "2.0",
        {},
        [1],
        *(RECORD | {"temperature": value} for value in ("2", -2.0, 1e300, math.nan)),
        *(RECORD | {name: value} for name, value in (("num_images", True), ("images", 3))),
    ],
)
def test_a_crafted_record_is_refused(crafted):
    assert Calibration.of({CALIBRATION: RECORD | {"weights": "raw", "other": 1}}, "x").temperature == 2.0
    with pytest.raises(CheckpointError, match=r"^x has a damaged temperature \("):
        Calibration.of({CALIBRATION: crafted}, "x")


# On the command line


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkpoint that tells bright images from dark ones, too confidently, and 40 images of which some are in the
    folder of the other class."""
    root = tmp_path_factory.mktemp("calibration")
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=2, depth=1).eval()
    generator = np.random.default_rng(0)
    for index in range(40):
        is_bright = index % 2 == 1
        levels = generator.integers(0, 120, (32, 32, 3)) + (120 if is_bright else 0)
        name = ("bright" if is_bright else "dark") if index % 7 else ("dark" if is_bright else "bright")
        path = root / "images" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels.astype(np.uint8)).save(path)
    with torch.no_grad():
        images = torch.stack([torch.full((3, 32, 32), value) for value in (1.0, -1.0)])
        bright, dark = model.forward_head(model.forward_features(images), pre_logits=True)
        direction = (bright - dark) / (bright - dark).norm() ** 2
        model.head.weight[:] = torch.stack([direction, -direction]) * 6
        model.head.bias[:] = -model.head.weight @ (bright + dark) / 2
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    localvit.save_checkpoint(
        model, root / "model.safetensors", class_names=["bright", "dark"], ema=ema, about={"note": "kept"}
    )
    return root


FLAGS = ("--device", "cpu", "--workers", "0")


def run(capsys, *arguments):
    status = main([*map(str, arguments), *FLAGS])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def fit(capsys, workplace, output, *more):
    data = ("--data-set", "FOLDER", "--data-path", workplace / "images")
    return run(capsys, "eval", workplace / "model.safetensors", *data, "--fit-temperature", output, *more)


def test_eval_fits_and_predict_applies(workplace, capsys, tmp_path):
    output = tmp_path / "calibrated.safetensors"
    status, out, err = fit(capsys, workplace, output, "--report", tmp_path / "report")
    assert status == 0, err
    assert out.startswith("* Acc@1 ")
    assert "calibration error (ECE): " in err
    assert "cross-fitted" in err
    before, after = read_weight_file(workplace / "model.safetensors"), read_weight_file(output)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    checkpoint = read_checkpoint(output)
    assert checkpoint.about["note"] == "kept"
    temperature = checkpoint.about[CALIBRATION]["temperature"]
    assert temperature > 1.5
    calibrated = json.loads((tmp_path / "report" / "results.json").read_text())["calibrated"]
    assert calibrated["temperature"] == temperature
    assert calibrated["cross_fitted"]
    assert localvit.load_model(output).calibration.temperature == temperature
    assert localvit.load_model(output, weights="ema").calibration is None

    loaded = localvit.load_model(output)
    images = sorted((workplace / "images" / "dark").iterdir())[:5]
    with torch.inference_mode():
        prepared = torch.stack([loaded.preprocessing.transform()(Image.open(image)) for image in images])
        logits_NM = loaded.model(prepared).double()
    for flags, divisor in (((), 1.0), (("--calibrated",), temperature)):
        _, out, _ = run(capsys, "predict", output, *images, "--format", "jsonl", *flags)
        found = [json.loads(line)["predictions"][0]["probability"] for line in out.splitlines()]
        expected = (logits_NM / divisor).softmax(1).amax(1).tolist()
        assert found == pytest.approx(expected, abs=1e-5)  # the fused model rounds otherwise


def test_the_evaluated_file_may_be_the_one_that_is_written(workplace, capsys, tmp_path):
    own = tmp_path / "own.safetensors"
    own.write_bytes((workplace / "model.safetensors").read_bytes())
    data = ("--data-set", "FOLDER", "--data-path", workplace / "images")
    assert run(capsys, "eval", own, *data, "--fit-temperature", own)[0] == 0
    assert localvit.load_model(own).calibration is not None
    # On the images that it was fitted to, the result of the stored temperature is that of cross-fitting again.
    _, _, err = run(capsys, "eval", own, *data)
    assert "after, cross-fitted" in err
    _, _, err = run(capsys, "eval", own, *data, "--limit", "30")
    assert "after, with temperature" in err


def test_abstaining_is_written_in_every_format(workplace, capsys):
    model, folder = workplace / "model.safetensors", workplace / "images" / "dark"
    _, out, _ = run(capsys, "predict", model, folder, "--format", "jsonl")
    best = sorted(json.loads(line)["predictions"][0]["probability"] for line in out.splitlines())
    threshold = str((best[2] + best[3]) / 2)
    arguments = ("predict", model, folder, "--abstain-below", threshold, "--format")
    status, out, err = run(capsys, *arguments, "jsonl")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["abstained"] for row in rows] == [
        row["predictions"][0]["probability"] < float(threshold) for row in rows
    ]
    assert sum(row["abstained"] for row in rows) == 3
    assert f"abstained on 3 of {len(rows)} images" in err
    _, out, _ = run(capsys, *arguments, "csv")
    lines = list(csv.DictReader(out.splitlines()))
    assert {line["file"]: line["abstained"] for line in lines} == {
        row["file"]: str(row["abstained"]).lower() for row in rows
    }
    _, out, _ = run(capsys, *arguments, "table")
    assert out.count("abstained  the best probability is below") == 3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["predict", "@/model.safetensors", "@/images", "--calibrated"], 1, "has no temperature to calibrate"),
        (["predict", "@/model.safetensors", "@/images", "--abstain-below", "50"], 2, "a probability from 0 to 1"),
        (["eval", "@/model.safetensors", "--fit-temperature", "x.pth"], 2, "x.pth must end in .safetensors"),
        (
            ["eval", "@/model.safetensors", "--fit-temperature", "x.safetensors", "--limit", "1"],
            1,
            "of the 1 images, and a temperature needs at least 2 mistakes",
        ),
        (
            ["eval", "@/model.safetensors", "--fit-temperature", "x.safetensors", "--input-size", "64"],
            2,
            "leave out --input-size",
        ),
    ],
)
def test_bad_usage(arguments, status, message, workplace, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "eval":
        arguments = [*arguments, "--data-set", "FOLDER", "--data-path", "@/images"]
    found, _, err = run(capsys, *(each.replace("@", str(workplace)) for each in arguments))
    assert found == status
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_exported_file_computes_calibrated_probabilities(workplace, capsys, tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    checkpoint = tmp_path / "calibrated.safetensors"
    fit(capsys, workplace, checkpoint)
    localvit.export(checkpoint, tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    loaded = localvit.load_model(checkpoint)
    with torch.inference_mode():
        logits_BM = loaded.model(loaded.preprocessing.normalized(torch.from_numpy(pixels))).double()
    expected = (logits_BM / loaded.calibration.temperature).softmax(1).numpy()
    assert session.run(None, {"images": pixels})[0] == pytest.approx(expected, abs=1e-5)
    # This package reads the model's own logits from them, so both results are those of the checkpoint.
    image = next((workplace / "images" / "dark").iterdir())
    for flags in ((), ("--calibrated",)):
        rows = [
            json.loads(run(capsys, "predict", file, image, "--format", "jsonl", *flags)[1])["predictions"][0]
            for file in (checkpoint, tmp_path / "model.onnx")
        ]
        assert rows[0]["probability"] == pytest.approx(rows[1]["probability"], abs=1e-4)
