"""Evaluation equals the published result to the last digit, at any batch size and number of processes."""

import copy
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit.data.classes import imagenet_synsets, subset_classes
from localvit.data.datasets import open_images
from localvit.data.images import DataError, FileImages, UnreadableImage
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.evaluate import Evaluation, evaluate
from localvit.evaluation.metrics import real_accuracy
from localvit.inference.runner import InferenceOptions, load_model
from localvit.utils.intervals import interval_text
from processes import run_localvit, start_group, status_of
from published import SHARED, published_state

ROOT = Path(__file__).parents[2]
SAMPLE = SHARED / "data" / "imagenet-sample"
FIXTURE = SHARED / "reference" / "eval"
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs shared/data/imagenet-sample, which is not here")
NAMES = ["ape", "bat", "cow"]


@pytest.fixture(scope="module")
def published_file(tmp_path_factory) -> Path:
    """The evaluation fixture's checkpoint, in the published layout."""
    state = published_state("localvit_tiny_mlp4_act3_r192")
    head = np.load(FIXTURE / "head_localvit_tiny_mlp4_act3_r192.npz")
    state |= {"head.weight": torch.from_numpy(head["weight"]), "head.bias": torch.from_numpy(head["bias"])}
    path = tmp_path_factory.mktemp("published") / "localvit_t.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """17 images of three classes, noise of distinct brightness."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(17):
        path = root / NAMES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 100 + 50 * (number % 3), (37, 41, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return localvit.create_model("localvit_nano_patch4_32", num_classes=3).eval()


CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(input_size=(32, 32), crop_pct=1.0)


def run(nano, images, **arguments) -> Evaluation:
    options = InferenceOptions(
        batch_size=arguments.pop("batch_size", 4), workers=arguments.pop("workers", 0), device=CPU
    )
    return evaluate(nano, images, PREPROCESSING, options, class_names=NAMES, **arguments)


@needs_sample
def test_published_result_to_the_digit(published_file, monkeypatch, capsys):
    command = ["main.py", "--model", "localvit_tiny_mlp4_act3_r192", "--eval", "--resume", str(published_file)]
    options = ["--data-path", str(SAMPLE), "--output_dir", "unused", "--num_workers", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, *options])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == json.loads((FIXTURE / "expected.json").read_text())["line"]


@needs_sample
def test_every_row_of_the_published_evaluation(published_file):
    expected = json.loads((FIXTURE / "expected.json").read_text())
    model = localvit.create_model("localvit_tiny").eval()
    localvit.load_checkpoint(model, published_file)
    images = open_images("IMNET", SAMPLE)
    preprocessing = Preprocessing.published((224, 224))
    options = InferenceOptions(batch_size=67, workers=1, device=CPU)
    evaluation = evaluate(model, images, preprocessing, options, class_names=imagenet_synsets())
    assert len(evaluation.paths) == len(expected["per_image"]) == 200
    transform = preprocessing.transform()
    for row, (path, label, top5, top_logit, mean) in enumerate(expected["per_image"]):
        assert evaluation.paths[row] == path
        assert evaluation.labels_N[row] == label
        assert evaluation.top_classes_NK[row].tolist() == top5
        # The fixture is rounded to four decimals; float32 sums in another order add about 1e-5.
        assert evaluation.top_logits_NK[row, 0].item() == pytest.approx(top_logit, abs=7e-5)
        # Rounded to five decimals; the same arithmetic, so nothing is added.
        assert transform(images.load(row)).mean().item() == pytest.approx(mean, abs=6e-6)
    assert evaluation.loss == pytest.approx(expected["loss"], abs=1e-6)
    assert (evaluation.acc1, evaluation.acc5) == (expected["acc1"], expected["acc5"])


def test_rows_equal_a_loop_over_single_images(nano, folder):
    images = open_images("FOLDER", folder)
    evaluation = run(nano, images)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    losses, hits = [], 0
    for row, path in enumerate(evaluation.paths):
        image = Image.open(folder / path).resize((35, 32), Image.Resampling.BICUBIC)  # 37 x 41: short side to 32
        image = image.crop((2, 0, 34, 32))
        x = (torch.from_numpy(np.asarray(image) / np.float32(255)) - mean) / std
        with torch.no_grad():
            logits = nano(x.permute(2, 0, 1)[None]).double()[0]
        label = NAMES.index(path.split("/")[0])
        losses.append((logits.exp().sum().log() - logits[label]).item())
        hits += logits.argmax().item() == label
        assert evaluation.top_classes_NK[row].tolist() == logits.argsort(descending=True).tolist()
    # float32 logits of a batch against those of one image.
    torch.testing.assert_close(evaluation.losses_N, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert evaluation.acc1 == pytest.approx(100 * hits / 17)
    assert evaluation.acc5 == 100.0


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 0), (17, 0), (100, 2), (6, 3)])
def test_batch_size_and_workers_do_not_change_the_result(nano, folder, batch_size, workers):
    images = open_images("FOLDER", folder)
    evaluation = run(nano, images, batch_size=batch_size, workers=workers)
    reference = run(nano, images, batch_size=2)
    assert evaluation.paths == reference.paths
    assert evaluation.line() == reference.line()
    torch.testing.assert_close(evaluation.losses_N, reference.losses_N, rtol=1e-5, atol=1e-6)


def test_the_number_of_processes_does_not_change_the_result(nano, folder, tmp_path):
    checkpoint = localvit.save_checkpoint(
        nano, tmp_path / "nano.safetensors", class_names=NAMES, preprocessing=PREPROCESSING.to_dict()
    )
    command = ["eval", checkpoint, "--data-set", "FOLDER", "--data-path", folder]
    options = ["--device", "cpu", "--batch-size", 4, "--workers", 0, "--report", tmp_path / "report"]
    out, err = tmp_path / "out", tmp_path / "err"
    group = start_group(3, run_localvit, *command, *options, out=out, err=err)
    assert [status_of(each) for each in group] == [0] * 3, err.read_text()
    assert out.read_text().splitlines() == [run(nano, open_images("FOLDER", folder)).line()]
    assert json.loads((tmp_path / "report" / "results.json").read_text())["count"] == 17


def test_an_unreadable_image_stops_all_processes(nano, folder, tmp_path):
    """Three processes, two images, one of them unreadable: all stop and the error names the file."""
    root = tmp_path / "two"
    for class_name in ("ape", "bat"):
        (root / class_name).mkdir(parents=True)
    (root / "ape" / "a.png").write_bytes((folder / "ape" / "00.png").read_bytes())
    (root / "bat" / "broken.png").write_bytes(b"not an image")
    checkpoint = localvit.save_checkpoint(nano, tmp_path / "nano.safetensors", class_names=NAMES)
    command = ["eval", checkpoint, "--data-set", "FOLDER", "--data-path", root, "--device", "cpu", "--workers", 0]
    group = start_group(3, run_localvit, *command, out=tmp_path / "out", err=tmp_path / "err")
    assert [status_of(each) for each in group] == [1, 1, 1]
    assert "broken.png" in (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text() == ""


def test_labels_are_matched_by_class_name(folder):
    """A model with its classes in another order has the same result."""
    torch.manual_seed(3)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3).eval()
    images = open_images("FOLDER", folder)
    before = run(model, images)
    order = [2, 0, 1]
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[order])
        model.head.bias.copy_(model.head.bias[order])
    options = InferenceOptions(batch_size=4, workers=0, device=CPU)
    names = [NAMES[index] for index in order]
    after = evaluate(model, images, PREPROCESSING, options, class_names=names)
    torch.testing.assert_close(after.losses_N, before.losses_N)
    assert [names[label] for label in after.labels_N] == [NAMES[label] for label in before.labels_N]


def test_unreadable_images_raise_or_are_skipped(nano, folder, tmp_path):
    images = open_images("FOLDER", folder)
    broken = FileImages(folder, [*zip(images.paths, images.labels, strict=True), ("ape/gone.png", 0)], NAMES)
    with pytest.raises(UnreadableImage, match=r"gone\.png.*--skip-unreadable"):
        run(nano, broken, workers=2)
    evaluation = run(nano, broken, skip_unreadable=True)
    assert evaluation.line() == run(nano, images).line()
    assert len(evaluation.skipped) == 1
    assert "gone.png" in evaluation.skipped[0]
    with pytest.raises(ValueError, match="no image"):
        run(nano, FileImages(folder, [("ape/gone.png", 0)], NAMES), skip_unreadable=True)


class DyingImages(FileImages):
    """Kills the worker process that decodes the third image, as the kernel does when memory runs out."""

    def load(self, index):
        if index == 2 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), 9)
        return super().load(index)


def test_a_killed_worker_raises_an_error(nano, folder):
    whole = open_images("FOLDER", folder)
    dying = DyingImages(folder, list(zip(whole.paths, whole.labels, strict=True)), NAMES)
    # torch's handler of SIGCHLD raises wherever the main process is: in the loader, or, rarely, in the model.
    with pytest.raises(RuntimeError, match=r"worker process that decodes images died|worker .* is killed by signal"):
        run(nano, dying, workers=2, batch_size=1)


def test_limit(nano, folder):
    evaluation = run(nano, open_images("FOLDER", folder), limit=5)
    assert len(evaluation.paths) == 5


def _evaluation(classes: list[list[int]], paths: list[str], labels: list[int]) -> Evaluation:
    top = torch.tensor(classes)
    zeros = torch.zeros(top.shape)
    return Evaluation(
        paths=paths,
        labels_N=torch.tensor(labels),
        top_classes_NK=top,
        top_logits_NK=zeros,
        top_probabilities_NK=zeros,
        losses_N=torch.zeros(len(paths)),
        class_names=imagenet_synsets(),
    )


def test_real_labels_accuracy_equals_timms(folder):
    """timm's evaluator on all 50,000 file names, with random predictions."""
    from timm.data import RealLabelsImagenet

    names = [f"n0/ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    torch.manual_seed(5)
    logits = torch.randn(50_000, 1000)
    theirs = RealLabelsImagenet(names)
    theirs.add_result(logits)
    real1, real5, count = real_accuracy(_evaluation(logits.topk(5).indices.tolist(), names, [0] * 50_000))
    assert real1 == pytest.approx(theirs.get_accuracy(1), abs=1e-12)
    assert real5 == pytest.approx(theirs.get_accuracy(5), abs=1e-12)
    assert count == len(theirs.is_correct[1])


def test_real_labels_need_imagenet_file_names():
    with pytest.raises(DataError, match="ILSVRC2012_val_00000001"):
        real_accuracy(_evaluation([[0, 1, 2, 3, 4]], ["n01440764/cat.jpg"], [0]))


def test_imagenet_subsets_are_scored_on_their_classes_only(tmp_path):
    """Of 1,000 classes only the 200 count: a larger logit of another class is ignored."""
    classes = subset_classes("IMNET-A")
    assert len(classes) == len(set(classes)) == len(subset_classes("IMNET-R")) == 200
    synset = imagenet_synsets()[classes[7]]
    (tmp_path / synset).mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / synset / "a.png")
    outside = next(index for index in range(1000) if index not in classes)
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=1000).eval()
    with torch.no_grad():
        model.head.bias[outside] = 1e4
        model.head.bias[classes[7]] = 100.0
    images = open_images("IMNET-A", tmp_path)
    options = InferenceOptions(workers=0, device=CPU)
    whole = evaluate(model, images, PREPROCESSING, options, class_names=imagenet_synsets())
    part = evaluate(model, images, PREPROCESSING, options, class_names=imagenet_synsets(), valid_classes=classes)
    assert whole.acc1 == 0.0
    assert part.acc1 == 100.0
    assert set(part.top_classes_NK[0].tolist()) <= set(classes)


def test_any_source_of_the_model_and_the_images_gives_the_same_result(nano, folder, tmp_path):
    path = localvit.save_checkpoint(
        nano, tmp_path / "nano.safetensors", class_names=NAMES, preprocessing=PREPROCESSING.to_dict()
    )
    reference = run(nano, open_images("FOLDER", folder))
    options = InferenceOptions(batch_size=4, workers=0, device=CPU)
    for model in (path, str(path), load_model(path)):
        result = evaluate(model, str(folder), options=options)
        assert (result.paths, result.class_names) == (reference.paths, NAMES)
        # The fused model rounds differently in float32.
        torch.testing.assert_close(result.losses_N, reference.losses_N, rtol=1e-4, atol=1e-5)


def test_a_printed_evaluation_shows_its_metrics(nano, folder):
    evaluation = run(nano, open_images("FOLDER", folder))
    hits = sum(label == top for label, (top, *_) in zip(evaluation.labels_N, evaluation.top_classes_NK, strict=True))
    accuracy = 100 * hits / 17
    start = f"top-1 accuracy {accuracy:.2f} % (95 % interval {interval_text(accuracy, 17)}), top-5 accuracy 100.00 %, "
    assert str(evaluation).startswith(start)
    assert str(evaluation).endswith("(17 images)")


def test_a_module_that_cannot_run_raises_an_error(nano, folder):
    with pytest.raises(ValueError, match=r"in training mode; call model\.eval\(\)"):
        evaluate(copy.deepcopy(nano).train(), folder, PREPROCESSING, class_names=NAMES)
    with pytest.raises(ValueError, match=r"Flatten does not define its preprocessing"):
        evaluate(torch.nn.Flatten().eval(), folder, class_names=NAMES)
    options = InferenceOptions(device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"is on cpu, and options\.device is meta"):
        evaluate(nano, folder, PREPROCESSING, options, class_names=NAMES)
