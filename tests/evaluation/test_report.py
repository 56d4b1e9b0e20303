"""The report, compared with hand-computed numbers, an HTML parser, PIL and a real browser."""

import base64
import csv
import html
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import reliability_bins
from localvit.evaluation.report.files import write_report
from localvit.evaluation.report.mistakes import ExplainedImage
from localvit.evaluation.temperature import Effect
from localvit.inference.calibration import Calibration

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "hr", "link", "input"}
NASTY = ["a\"b'c & d", "<script>alert(1)</script>", "</td></table>", "$title ${body}", "naïve 猫"]


def evaluation_of(logits, labels, *, class_names=None, paths=None, skipped=()):
    """Evaluation from float64 logits, by torch's softmax and cross-entropy."""
    logits_NC = torch.as_tensor(logits, dtype=torch.float64)
    labels_N = torch.as_tensor(labels)
    probabilities_NC = logits_NC.softmax(1)
    top = logits_NC.topk(min(5, logits_NC.shape[1]))
    return Evaluation(
        paths=paths or [f"{index}.png" for index in range(len(labels_N))],
        labels_N=labels_N,
        top_classes_NK=top.indices,
        top_logits_NK=top.values.float(),
        top_probabilities_NK=probabilities_NC.gather(1, top.indices),
        losses_N=torch.nn.functional.cross_entropy(logits_NC, labels_N, reduction="none"),
        class_names=class_names or [f"class {index}" for index in range(logits_NC.shape[1])],
        skipped=list(skipped),
    )


def random_evaluation(count, classes, *, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, classes, (count,), generator=generator)
    logits_NC = 2 * torch.randn(count, classes, generator=generator)
    logits_NC[torch.arange(count), labels_N] += 2
    return evaluation_of(logits_NC, labels_N, **more)


class Page(HTMLParser):
    """Checks that tags are nested correctly, and collects texts, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag} {attrs}"
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    def values(self, tag, name):
        return [value for found_tag, found_name, value in self.attributes if (found_tag, found_name) == (tag, name)]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def report(evaluation, directory, *, dataset_root=None, about=None):
    """Write the report; return the results, the CSV rows and the parsed page."""
    paths = write_report(evaluation, directory, dataset_root=dataset_root, about=about or {})
    assert [path.name for path in paths] == ["results.json", "per_class.csv", "report.html"]
    assert sorted(directory.iterdir()) == sorted(paths)  # no temporary files remain

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads(paths[0].read_text(), parse_constant=refuse)
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    return results, rows, Page(paths[2].read_text())


# The numbers


def by_hand():
    """Seven images of a four-class model. Class 2 has none; class 0 is predicted as 1 and as 3 equally often."""
    top_class = torch.tensor([0, 3, 1, 0, 1, 3, 1])
    return Evaluation(
        paths=[f"{name}.png" for name in "abcdefg"],
        labels_N=torch.tensor([0, 0, 0, 1, 1, 3, 3]),
        top_classes_NK=torch.stack([top_class, (top_class + 1) % 4], 1),
        top_logits_NK=torch.zeros(7, 2),
        top_probabilities_NK=torch.tensor([0.5, 0.7, 0.9, 0.5, 0.7, 1.0, 0.5], dtype=torch.float64)[:, None].repeat(
            1, 2
        ),
        losses_N=torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25, 0.0, 0.25], dtype=torch.float64),
        class_names=["tabby, tabby cat", 'the "other"', "absent", "dog"],
        skipped=["broken.png", "gone.png"],
    )


def wilson_by_roots(hits, count):
    """The shares p for which the observed one is z standard deviations away: the roots of a quadratic."""
    z2, share = statistics.NormalDist().inv_cdf(0.975) ** 2, hits / count
    return sorted(np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2]).real.tolist())


def test_results_equal_hand_computed_numbers(tmp_path):
    about = {"model": "m", "preprocessing": {"mean": (0.5, math.nan)}, "dtype": torch.float32, "root": Path("x/y")}
    about |= {"seconds": math.inf, "throughput": torch.tensor(2.5), "amp": False, "checkpoint": None}
    results, _, page = report(by_hand(), tmp_path, about=about)
    # a, e and f are correct. Three confidences are 0.5 (one correct), two 0.7 (one), one is 0.9 (none), one is 1 (one).
    ece = (3 * abs(1 / 3 - 0.5) + 2 * 0.2 + 0.9 + 0) / 7
    assert results == {
        "acc1": pytest.approx(300 / 7),
        # Wilson's ends solve |p - k / n| = z * sqrt(p * (1 - p) / n).
        "acc1_interval": [pytest.approx(100 * end) for end in wilson_by_roots(3, 7)],
        "acc5_interval": [pytest.approx(100 * end) for end in wilson_by_roots(5, 7)],
        # The second class is the next one, so d (0, then 1) and b (3, then 0) are correct in the top 5.
        "acc5": pytest.approx(500 / 7),
        "loss": pytest.approx(1.0),
        "ece": pytest.approx(ece),
        "count": 7,
        "skipped": {"count": 2, "names": ["broken.png", "gone.png"]},
        "non_finite_loss": {"count": 0, "names": []},
        "model": "m",
        "preprocessing": {"mean": [0.5, None]},
        "dtype": "torch.float32",
        "root": "x/y",
        "seconds": None,
        "throughput": 2.5,
        "amp": False,
        "checkpoint": None,
    }
    assert "Evaluation of m" in page.text
    assert "15.8 to 75.0 (7 images)" in page.text.replace("\xa0", " ")
    for text in ("42.86 %", "71.43 %", "1.000", f"{100 * ece:.2f} %", "2 skipped", "broken.png", "torch.float32"):
        assert text in page.text.replace("\xa0", " ")


def test_per_class_rows_equal_hand_computed_numbers(tmp_path):
    _, rows, _ = report(by_hand(), tmp_path)
    header = ("class", "name", "images", "correct", "accuracy", "mean_confidence", "most_common_wrong")
    header += ("accuracy_low", "accuracy_high")
    ends = {
        hits: tuple(f"{100 * end:.3f}" for end in wilson_by_roots(1, count)) for hits, count in (("1/3", 3), ("1/2", 2))
    }
    assert [tuple(row.values()) for row in rows] == [
        ("0", "tabby, tabby cat", "3", "1", "33.333", "0.700000", 'the "other"', *ends["1/3"]),
        ("1", 'the "other"', "2", "1", "50.000", "0.600000", "tabby, tabby cat", *ends["1/2"]),
        ("3", "dog", "2", "1", "50.000", "0.750000", 'the "other"', *ends["1/2"]),
    ]
    assert tuple(rows[0]) == header


def test_about_must_not_use_names_of_the_results(tmp_path):
    with pytest.raises(ValueError, match="about contains acc1, loss"):
        write_report(by_hand(), tmp_path / "new", dataset_root=None, about={"loss": 1, "acc1": 2, "model": "m"})
    assert not (tmp_path / "new").exists()


def test_an_empty_evaluation_is_an_error(tmp_path):
    empty = Evaluation(
        paths=[],
        labels_N=torch.zeros(0, dtype=torch.int64),
        top_classes_NK=torch.zeros(0, 5, dtype=torch.int64),
        top_logits_NK=torch.zeros(0, 5),
        top_probabilities_NK=torch.zeros(0, 5, dtype=torch.float64),
        losses_N=torch.zeros(0, dtype=torch.float64),
        class_names=["a"] * 5,
        skipped=["x.png"],
    )
    with pytest.raises(ValueError, match=r"no image was evaluated \(1 skipped\)"):
        write_report(empty, tmp_path, dataset_root=None, about={})
    assert list(tmp_path.iterdir()) == []


# The page


INF, NAN = math.inf, math.nan
EYE = torch.eye(3).mul(3).tolist()
EDGES = {
    "one image": (evaluation_of([[1.0, 0, 0]], [0]), ["1 ", "None: every image is classified correctly"]),
    "one class": (evaluation_of([[1.0], [2.0]], [0, 0]), ["always 100 % with 1 class", "None: every image"]),
    "two classes": (evaluation_of([[1.0, 0], [2.0, 0]], [0, 1]), ["always 100 % with 2 classes", "Mistakes"]),
    "all right": (evaluation_of(EYE, [0, 1, 2]), ["100.00 %", "None: every image", "Confusion matrix"]),
    "all wrong": (evaluation_of(EYE, [1, 2, 0]), ["0.00 %", "3 of 3 misclassified images", "All pairs."]),
    "infinite loss": (
        evaluation_of([[1.0, -INF, 0], [0, 5.0, 0]], [1, 1]),
        ["1 image with a non-finite loss", "0.0 %", "Mistakes"],
    ),
    "not a number": (
        evaluation_of([[NAN] * 3, [0, 1.0, 5.0]], [1, 1]),
        ["1 image with a non-finite loss", "no calibration error for the whole data set", "not finite"],
    ),
    "nothing finite": (evaluation_of([[NAN] * 3] * 23, [1] * 23), ["No image has a finite confidence", "and 3 more"]),
    "61 classes, all right": (
        evaluation_of(torch.eye(61).repeat(2, 1) * 9, [*range(61)] * 2),
        ["The 20 weakest of 61 classes"],
    ),
}


@pytest.mark.parametrize(("evaluation", "texts"), EDGES.values(), ids=EDGES.keys())
def test_edge_cases(evaluation, texts, tmp_path):
    results, rows, page = report(evaluation, tmp_path)
    text_of_page = page.text.replace("\xa0", " ")
    for text in texts:
        assert text in text_of_page
    assert results["count"] == len(evaluation.paths) == sum(int(row["images"]) for row in rows)
    finite = bool(evaluation.losses_N.isfinite().all())
    assert (results["loss"] is not None) == finite == (results["non_finite_loss"]["count"] == 0)
    assert (results["ece"] is not None) == bool(evaluation.top_probabilities_NK.isfinite().all())
    assert "0 most confused" not in text_of_page
    assert "nan" not in re.findall(r"\w+", text_of_page.lower())


def table_after(text, heading):
    """Rows of cells of the first table after a heading."""
    table = text[text.index(f"<h2>{heading}") :].split("<table", 1)[1].split("</table>")[0]
    rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S))
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]


def test_the_confusion_matrix_counts_each_image(tmp_path):
    evaluation = random_evaluation(311, 11)
    report(evaluation, tmp_path)
    matrix = table_after((tmp_path / "report.html").read_text(), "Confusion matrix")
    counts = np.zeros((11, 11), dtype=int)
    np.add.at(counts, (evaluation.labels_N.numpy(), evaluation.top_classes_NK[:, 0].numpy()), 1)
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] == evaluation.class_names
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]] == counts.tolist()


def test_of_many_classes_the_matrix_shows_the_most_confused(tmp_path):
    labels, predicted = [*range(60)] * 3, [*range(60)] * 3
    for position, (true, taken) in enumerate([(7, 41), (7, 41), (41, 7), (3, 5), (3, 58)]):
        labels[position], predicted[position] = true, taken
    _, _, page = report(evaluation_of(torch.eye(60)[predicted] * 9, labels), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert table_after(text, "Most confused pairs")[1][:3] == ["class 7", "class 41", "2"]
    assert "Confusion matrix of the 5 most confused classes" in page.text
    assert "out of 60 with images" in page.text
    matrix = table_after(text, "Confusion matrix")
    # Rows of class 3, 5, 7, 41, 58: three images each, changed by the first five labels.
    assert matrix[0] == ["", "class 3", "class 5", "class 7", "class 41", "class 58"]
    assert matrix[1] == ["class 3", "2", "1", "", "", "1"]
    assert matrix[3] == ["class 7", "", "", "3", "2", ""]
    assert matrix[4] == ["class 41", "", "", "1", "3", ""]

    report(random_evaluation(997, 60), tmp_path)
    matrix = table_after((tmp_path / "report.html").read_text(), "Confusion matrix of the")
    assert len(matrix[0]) in {17, 18}  # a corner, "other classes", and up to 16 classes, which come in pairs
    assert matrix[0][-1] == "other classes"
    with (tmp_path / "per_class.csv").open(newline="") as file:
        images = {row["name"]: int(row["images"]) for row in csv.DictReader(file)}
    assert all(sum(int(cell or 0) for cell in row[1:]) == images[row[0]] for row in matrix[1:])


def test_mistakes_are_one_list_by_loss(tmp_path):
    # Images 1 and 3 are correct; 0 has the highest loss, 2 the highest confidence.
    logits = [[2.0, -9.0, 2.0], [0, 9.0, 0], [6.0, 1.0, -9.0], [0, 5.0, 0], [1.0, 0.0, 0.0]]
    _, _, page = report(evaluation_of(logits, [1] * 5), tmp_path)
    mistakes = page.text.split("Mistakes")[1]
    assert re.findall(r"\d\.png", mistakes) == ["0.png", "2.png", "4.png"]
    assert "3 of 3 misclassified images" in mistakes
    # Image 4: 1 / (e + 2) for the true class, e / (e + 2) for the predicted one.
    assert "true class 1 21.2 % predicted class 0 57.6 % 4.png" in page.text.replace("\xa0", " ")


def test_explained_mistakes_have_both_maps_beside_the_image(tmp_path):
    logits = [[2.0, -9.0, 2.0], [0, 9.0, 0], [6.0, 1.0, -9.0], [1.0, 0.0, 0.0]]  # 0, 2 and 3 are wrong
    colors = {"image": (250, 0, 0), "true_map": (0, 250, 0), "predicted_map": (0, 0, 250)}
    solid = {name: Image.new("RGB", (448, 224), color) for name, color in colors.items()}
    explained = {2: ExplainedImage(**solid), 1: ExplainedImage(**solid)}  # 1 is not listed
    write_report(evaluation_of(logits, [1] * 4), tmp_path, dataset_root=None, about={}, explained=explained)
    page = Page((tmp_path / "report.html").read_text())
    assert page.values("img", "alt") == ["class 1, predicted class 0", "map for class 1", "map for class 0"]
    for source, color in zip(page.values("img", "src"), colors.values(), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as image:
            assert image.size == (168, 84)
            assert np.abs(np.asarray(image).astype(int) - color).max() < 6  # JPEG of one color
    mistakes = page.text.split("Mistakes")[1]
    assert "image true class predicted class true class 1 0.7 %" in mistakes.replace("\xa0", " ")
    assert mistakes.count("no thumbnail") == 2
    assert "Grad-CAM" in mistakes
    write_report(evaluation_of(logits, [1] * 4), tmp_path, dataset_root=None, about={})
    assert "Grad-CAM" not in (tmp_path / "report.html").read_text()


def test_of_many_mistakes_the_24_of_highest_loss_are_listed(tmp_path):
    evaluation = random_evaluation(1009, 7)
    report(evaluation, tmp_path)
    shown = re.findall(r'class="path muted">(\d+)\.png', (tmp_path / "report.html").read_text())
    wrong_N = evaluation.top_classes_NK[:, 0] != evaluation.labels_N
    losses = evaluation.losses_N.tolist()
    ranked = sorted(wrong_N.nonzero().flatten().tolist(), key=lambda index: -losses[index])
    assert [int(index) for index in shown] == ranked[:24]


def test_18_images_of_6_classes_make_no_page_of_zeros(tmp_path):
    """A row of 0.0 % for each class, and pairs that occur once, say nothing that the list of mistakes does not."""
    labels = [index % 6 for index in range(18)]
    predicted = [(label + 1 + index // 6) % 6 for index, label in enumerate(labels)]
    _, rows, page = report(evaluation_of(torch.eye(6)[predicted] * 9, labels), tmp_path)
    assert [row["correct"] for row in rows] == ["0"] * 6
    text = page.text.replace("\xa0", " ")
    assert "6 of 6 classes, of at most 3 images each, have no correctly classified image: class 0, class 1" in text
    assert "Most often confused with" not in text
    assert "Most confused pairs" not in text
    assert "0.0 to 17.6 (18 images)" in text


def test_few_images_of_40_classes_make_no_matrix_of_blanks(tmp_path):
    labels = [index % 40 for index in range(60)]
    predicted = list(labels)
    predicted[3] = predicted[43] = 7  # twice
    report(evaluation_of(torch.eye(40)[predicted] * 9, labels), tmp_path)
    matrix = table_after((tmp_path / "report.html").read_text(), "Confusion matrix of the 2 most confused classes")
    assert matrix == [["", "class 3", "class 7"], ["class 3", "", "2"], ["class 7", "", "2"]]


def test_the_effect_of_a_temperature_is_shown_beside_the_diagram_without(tmp_path):
    evaluation = random_evaluation(401, 7)
    bins = reliability_bins(torch.full((401,), 0.5), torch.arange(401) % 2 == 0)
    effect = Effect(bins=bins, ece=0.0321, loss=1.234, is_cross_fitted=True)
    losses = {"loss_before": 2.0, "loss_after": 1.234}
    calibration = Calibration(temperature=1.375, num_images=401, images="", ece_before=0.5, ece_after=0.0321, **losses)
    write_report(evaluation, tmp_path, dataset_root=None, about={}, calibrated=(calibration, effect))
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 2
    for text in ("With the temperature: ECE 3.21", "temperature, 1.375", "fitted to the others (cross-fitting)"):
        assert text in page.text
    assert json.loads((tmp_path / "results.json").read_text())["calibrated"] == {
        "temperature": 1.375,
        "fitted_images": 401,
        "ece": 0.0321,
        "loss": 1.234,
        "cross_fitted": True,
    }
    other = Effect(bins=bins, ece=0.0321, loss=1.234)
    write_report(evaluation, tmp_path, dataset_root=None, about={}, calibrated=(calibration, other))
    assert (
        "The temperature was fitted to 401 images of another set." in Page((tmp_path / "report.html").read_text()).text
    )


def test_many_classes_with_one_image_make_a_short_report(tmp_path):
    """Tables of the first of 61 classes with 0 of 1 images, and of pairs that occur once, would say nothing."""
    labels = list(range(83))
    predicted = [*labels[1:62], 0, *labels[62:]]
    _, rows, page = report(evaluation_of(torch.eye(83)[predicted] * 9, labels), tmp_path)
    assert len(rows) == 83
    assert "62 of 83 classes have a single image, which is misclassified" in page.text
    assert "Mistakes" in page.text
    for absent in ("0 of 1", "weakest", "confused", "Confusion matrix"):
        assert absent not in page.text


def test_names_are_escaped_and_the_page_is_self_contained(tmp_path):
    paths = [f"<img src=//example.org/x.png>{name}.png" for name in NASTY[:-1]] + ["caf\udce9.png"]
    evaluation = evaluation_of(
        torch.eye(5) * 3, [1, 2, 3, 4, 0], class_names=NASTY, paths=paths, skipped=["<b>skipped</b>"]
    )
    Image.new("RGB", (7, 5)).save(tmp_path / "caf\udce9.png")
    results, rows, page = report(
        evaluation, tmp_path / "out", dataset_root=tmp_path, about={"model": "<i>", "<u>": {"x": ["<s>", "$body"]}}
    )
    assert [row["name"] for row in rows] == NASTY
    assert results["<u>"] == {"x": ["<s>", "$body"]}
    for text in (*NASTY, *paths[:-1], "caf\\udce9.png", "<b>skipped</b>", "Evaluation of <i>", "<s>, $body"):
        assert text in page.texts or text in page.text
    assert not {"script", "link", "iframe", "object", "embed", "b>skipped", "i", "u", "s"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"}:
            assert value.startswith("data:image/jpeg;base64,"), (tag, name, value)
    assert set(page.values("th", "title")) == set(NASTY)
    assert page.values("img", "alt") == [f"{NASTY[0]}, predicted {NASTY[4]}"]
    style = re.search("<style>(.*)</style>", (tmp_path / "out" / "report.html").read_text(), re.S)[1]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_thumbnails_can_be_decoded(mode, tmp_path):
    name = "image.tiff" if mode == "CMYK" else "image.png"
    Image.new("RGB", (113, 211), (200, 30, 60)).convert("I" if mode == "I;16" else mode).convert(mode).save(
        tmp_path / name
    )
    _, _, page = report(evaluation_of([[5.0, 0]], [1], paths=[name]), tmp_path / "out", dataset_root=tmp_path)
    sources = page.values("img", "src")
    assert len(sources) == 1  # the only mistake is both the worst and the most confident
    image = Image.open(io.BytesIO(base64.b64decode(sources[0].removeprefix("data:image/jpeg;base64,"), validate=True)))
    assert image.size == (51, 96)  # 113 * 96 / 211 = 51.4
    if mode in {"RGB", "RGBA", "P"}:
        # JPEG of one color is off by a few steps; the palette of P by up to half its spacing of 51.
        assert np.abs(np.asarray(image).mean((0, 1)) - (200, 30, 60)).max() < (30 if mode == "P" else 4)


def test_a_thumbnail_of_16_bits_shows_what_the_model_saw(tmp_path):
    """The upper 8 bits; PIL's own conversion to RGB would make all of these values white."""
    levels = np.repeat(np.linspace(1000, 60000, 64).astype(np.uint16)[None], 32, 0)
    Image.fromarray(levels).save(tmp_path / "x.png")
    _, _, page = report(evaluation_of([[5.0, 0]], [1], paths=["x.png"]), tmp_path / "out", dataset_root=tmp_path)
    source = page.values("img", "src")[0].removeprefix("data:image/jpeg;base64,")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("L")).astype(float)
    assert np.abs(shown - levels / 256).max() < 4  # a JPEG of smooth gray levels is off by a few steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "image not found"),
        (b"not an image", "image not readable (UnidentifiedImageError)"),
        ("cut", "image not readable (OSError)"),
    ],
    ids=["missing", "not an image", "truncated"],
)
def test_an_unreadable_image_has_a_placeholder(content, message, tmp_path):
    if content == "cut":
        file = io.BytesIO()
        Image.effect_noise((64, 64), 50).save(file, "JPEG")
        content = file.getvalue()[: file.tell() // 2]
    if content:
        (tmp_path / "0.png").write_bytes(content)
    evaluation = evaluation_of([[5.0, 0]], [1])
    _, _, page = report(evaluation, tmp_path / "out", dataset_root=tmp_path)
    assert message in page.text
    _, _, page = report(evaluation, tmp_path / "out", dataset_root=None)
    assert "no thumbnail: the data set is not a folder" in page.text
    assert "img" not in page.tags


# Writing


def test_files_are_replaced_atomically(tmp_path):
    report(random_evaluation(5, 3), tmp_path)
    # A hard link to the old file keeps the old content only if the new file is another one.
    os.link(tmp_path / "results.json", tmp_path.parent / "old.json")
    old = (tmp_path.parent / "old.json").read_text()
    report(random_evaluation(7, 3), tmp_path)
    assert (tmp_path.parent / "old.json").read_text() == old != (tmp_path / "results.json").read_text()


def test_a_write_error_leaves_no_temporary_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_report(by_hand(), tmp_path / "file", dataset_root=None, about={})
    (tmp_path / "out" / "per_class.csv").mkdir(parents=True)
    with pytest.raises(OSError, match="per_class"):
        write_report(by_hand(), tmp_path / "out", dataset_root=None, about={})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["per_class.csv", "results.json"]


# How it looks


def colors(css):
    return {name: np.array([int(rgb[i : i + 2], 16) for i in (0, 2, 4)]) / 255 for name, rgb in css}


def luminance(rgb):
    """Relative luminance as defined by the Web Content Accessibility Guidelines 2."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme, tmp_path):
    report(by_hand(), tmp_path)
    found = re.findall(r"--(\w+): #(\w{6})", (tmp_path / "report.html").read_text())
    half = len(found) // 2
    color = colors(found[:half] if scheme == "light" else found[half:])
    assert len(color) == half == 8
    surface = color["surface"]
    fullest = {
        kind: 0.55 * color[kind] + 0.45 * surface for kind in ("right", "wrong")
    }  # the darkest cells of the matrix
    pairs = [("text", surface), ("text", color["page"]), ("text", color["warning"]), ("muted", surface)]
    pairs += [("muted", color["page"]), ("text", fullest["right"]), ("text", fullest["wrong"])]
    for name, background in pairs:
        dark, light = sorted((luminance(color[name]), luminance(background)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, background)  # level AA for text


def browse(page, tmp_path, *flags):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def page_for_browser(tmp_path):
    if not BROWSER:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    generator = np.random.default_rng(0)
    for index in range(53):
        pixels = generator.integers(0, 256, (61, 89, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    names = [*NASTY, *(f"a rather long class name, number {index}" for index in range(6, 19))]
    evaluation = random_evaluation(53, len(names), class_names=names, skipped=["x" * 300])
    about = {"model": "localvit_tiny_mlp4_act3_r192", "checkpoint": "/folder" * 30}
    report(evaluation, tmp_path / "out", dataset_root=tmp_path, about=about)
    return tmp_path / "out" / "report.html"


@pytest.mark.parametrize(
    ("scheme", "setting", "page_color"), [("light", 1, (245, 246, 248)), ("dark", 0, (15, 18, 22))]
)
def test_a_browser_renders_the_page(scheme, setting, page_color, page_for_browser, tmp_path):
    screenshot = tmp_path / "screenshot.png"
    flags = f"--screenshot={screenshot}", "--window-size=1280,1600", f"--blink-settings=preferredColorScheme={setting}"
    browse(page_for_browser, tmp_path, *flags)
    image = Image.open(screenshot).convert("RGB")
    assert image.size == (1280, 1600)
    assert image.getpixel((3, 3)) == page_color
    # The thumbnails are noise of thousands of colors; a blank or broken page has only a few.
    assert len(image.getcolors(1 << 24)) > 5000


def test_the_page_fits_any_width_in_a_browser(page_for_browser, tmp_path):
    # The page has no scripts, so a page around it measures its width, images and rendered text.
    frames = "".join(
        f'<iframe srcdoc="{html.escape(page_for_browser.read_text())}" style="width:{width}px;height:900px"></iframe>'
        for width in (320, 400, 1280)
    )
    measure = """
    onload = () => {
      const frames = [...document.querySelectorAll("iframe")];
      document.body.dataset.measured = JSON.stringify(frames.map(({contentDocument: page}) => ({
        width: page.documentElement.clientWidth,
        needed: page.documentElement.scrollWidth,
        images: [...page.images].filter(image => image.naturalWidth).length,
        text: page.body.innerText,
      })));
      frames.forEach(frame => frame.remove());
    }"""
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!DOCTYPE html><meta charset='utf-8'><body>{frames}<script>{measure}</script>")
    dom = browse(outer, tmp_path, "--dump-dom")
    measured = json.loads(html.unescape(re.search(r'data-measured="([^"]*)"', dom)[1]))
    assert [frame["width"] for frame in measured] == [320, 400, 1280]
    for frame in measured:
        assert frame["needed"] == frame["width"]  # nothing is wider than the page
        assert 12 <= frame["images"] <= 24
        for text in ("Top-1 accuracy", "Calibration", "Mistakes", "Confusion matrix", *NASTY):
            assert text in frame["text"]
