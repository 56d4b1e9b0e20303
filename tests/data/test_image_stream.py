"""Streams of images: each image once, in order, by any number of readers, without more than a batch in memory."""

import functools
import gzip
import http.server
import json
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch

import localvit
from localvit.data.datasets import open_images, open_stream
from localvit.data.image_stream import ImageStream, StreamedImage
from localvit.data.images import DataError, FileImages
from localvit.evaluation.evaluate import evaluate
from localvit.inference.runner import InferenceOptions
from localvit_cli import main
from processes import run_localvit, start_group, status_of
from tar_sets import png_bytes, write_set, write_shard

NAMES = ["ape", "bat", "cow"]
CPU = torch.device("cpu")


class Made(ImageStream):
    """A stream that is made when it is read, and counts what was read."""

    title, class_names, num_images = "made", NAMES, None

    def __init__(self, counts, labels=range(3), content=png_bytes):
        self.counts, self.labels, self.content = counts, list(labels), content
        self.num_shards = len(counts)
        self.num_read = 0

    def read_shard(self, shard):
        start = sum(self.counts[:shard])
        for index in range(self.counts[shard]):
            number = start + index
            self.num_read += 1
            label = self.labels[number % len(self.labels)]
            yield StreamedImage((shard, index), f"{number:02d}.png", label, self.content(number))


@pytest.mark.parametrize("counts", [(13,), (5, 1, 7), (2, 0, 3, 5, 1, 4, 1)])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("limit", [None, 1, 4, 100])
def test_readers_share_the_images(counts, num_parts, limit):
    stream = Made(counts)
    whole = [image.position for shard in range(len(counts)) for image in stream.read_shard(shard)]
    parts = [[image.position for image in stream.share(part, num_parts, limit)] for part in range(num_parts)]
    assert Counter(position for part in parts for position in part) == Counter(whole[:limit])
    assert all(part == sorted(part) for part in parts)


def test_a_limit_reads_no_further():
    stream = Made((5, 1, 7))
    assert len(list(stream.share(0, 1, 4))) == 4
    assert stream.num_read == 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3, depth=1).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    return localvit.save_checkpoint(model, path, class_names=[*reversed(NAMES)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The 13 images of the sets below, as files."""
    root = tmp_path_factory.mktemp("files")
    for number in range(13):
        path = root / NAMES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png_bytes(number))
    return FileImages(root, [(f"{NAMES[n % 3]}/{n:02d}.png", n % 3) for n in range(13)], NAMES)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_result_is_that_of_the_files(model, files, workers):
    """Classes go by name: the model's order is another one."""
    options = InferenceOptions(device=CPU, batch_size=4, workers=workers)
    mine, expected = (
        evaluate(model, images, options=options, class_names=[*reversed(NAMES)], keep_logits=True)
        for images in (Made((5, 1, 7)), files)
    )
    assert mine.paths == [path.partition("/")[2] for path in expected.paths]
    assert mine.labels_N.tolist() == [2 - number % 3 for number in range(13)]
    assert torch.equal(mine.logits_NM, expected.logits_NM)
    assert mine.line() == expected.line()


def test_only_a_few_batches_are_in_memory(model):
    """With a worker, the loader reads two batches ahead."""
    stream = Made((1000,))
    first = []

    def progress(done):
        first.append(stream.num_read)
        if len(first) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, stream, options=InferenceOptions(device=CPU, batch_size=8, workers=1), progress=progress)
    assert max(first) <= 8 * (3 + 3)


def test_what_cannot_be_counted_stops_and_names_the_image(model):
    options = InferenceOptions(device=CPU, workers=0)
    with pytest.raises(DataError, match=r"01\.png is of the class 'bat', which is not a class of the model"):
        evaluate(model, Made((3,)), options=options, class_names=["ape", "cow", "dog"])
    with pytest.raises(DataError, match="none of the data set's 3 classes"):
        evaluate(model, Made((3,)), options=options, class_names=["x", "y"])
    with pytest.raises(DataError, match=r"00\.png is of the class number -1"):
        evaluate(model, Made((3,), labels=[-1]), options=options, class_names=NAMES)
    unnamed = Made((3,), labels=[3])
    unnamed.class_names = None
    with pytest.raises(DataError, match=r"00\.png has the label 3, and the model has the classes 0 to 2"):
        evaluate(model, unnamed, options=options)
    short = Made((3,))
    short.num_images = 4
    with pytest.raises(DataError, match="says 4 images, and its shards have 3"):
        evaluate(model, short, options=options, class_names=NAMES)
    assert len(evaluate(model, short, options=options, class_names=NAMES, limit=2).paths) == 2
    damaged = Made((3,), content=lambda number: png_bytes(number)[: 900 if number != 1 else 30])
    with pytest.raises(ValueError, match=r"01\.png: cannot be read as an image"):
        evaluate(model, damaged, options=options, class_names=NAMES)
    skipping = evaluate(model, damaged, options=options, class_names=NAMES, skip_unreadable=True)
    assert skipping.paths == ["00.png", "02.png"]
    assert skipping.skipped[0].startswith("01.png: ")


@pytest.fixture
def compressed(tmp_path):
    """A webdataset of three compressed shards."""
    pytest.importorskip("webdataset", reason="webdataset is an extra that is not installed")
    folder = write_set(tmp_path / "set")
    for shard in folder.glob("*.tar"):
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    return folder


@pytest.fixture
def server(compressed):
    """The address of a server, on this machine, of the set; and the paths that it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(compressed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_processes_share_the_shards_of_a_server(tmp_path, server, files, checkpoint, model, capsys):
    """Each of three processes fetches one shard. Of two, one fetches two; of five, each all of them."""
    address, asked = server
    flags = ["--device", "cpu", "--workers", "0", "--batch-size", "2"]
    arguments = ["eval", str(checkpoint), "--data-set", "wds/", "--data-path", address, *flags]
    expected = evaluate(model, files, options=InferenceOptions(device=CPU, workers=0)).line()
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == expected
    asked.clear()
    out, err = tmp_path / "out", tmp_path / "err"
    group = start_group(3, run_localvit, *arguments, out=out, err=err)
    assert [status_of(each) for each in group] == [0, 0, 0], err.read_text()
    assert out.read_text().strip() == expected
    assert Counter(path for path in asked if path.endswith(".tar")) == Counter(
        f"/validation-{index:04d}.tar" for index in range(3)
    )


def test_tar_files_are_what_they_were_before_compression(compressed, files):
    stream = open_stream("wds/", compressed)
    images = list(stream.share(0, 1))
    assert [image.label for image in images] == files.labels
    assert images[5].name == "validation-0001.tar/a.b/005"
    for index, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(image.load()), np.asarray(files.load(index)))
    assert open_images("wds/", compressed).labels == files.labels  # for training, which needs any order


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([("7.png", png_bytes(7))], r"sample validation-0001\.tar/7 has no label"),
        ([("7.cls", b"1")], "7 has no image"),
        ([("7.png", png_bytes(7)), ("7.jpg", png_bytes(7)), ("7.cls", b"1")], "7 has 2 images"),
        ([("7.png", png_bytes(7)), ("7.cls", b"ape")], "the label of the sample .*7 is not a number"),
        ([("7.png", png_bytes(7)), ("8.png", png_bytes(7)), ("7.cls", b"1")], "must follow one another"),
    ],
)
def test_a_sample_that_is_not_complete_is_an_error(compressed, content, message):
    write_shard(compressed / "validation-0001.tar", content)
    with pytest.raises(DataError, match=message):
        list(open_stream("wds/", compressed).share(0, 1))


@pytest.mark.parametrize("kind", ["truncated", "absent"])
def test_a_transfer_that_fails_is_an_error(server, compressed, checkpoint, capsys, kind):
    address, _ = server
    shard = compressed / "validation-0001.tar"
    if kind == "absent":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-300])
    arguments = ["eval", str(checkpoint), "--data-set", "wds/", "--data-path", address, "--workers", "0"]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert "validation-0001.tar cannot be read to its end as a tar file" in capsys.readouterr().err


def test_labels_in_json(tmp_path):
    """timm's alternative label, -1 for images that are not of the split."""
    pytest.importorskip("webdataset", reason="webdataset is an extra that is not installed")
    folder = write_set(tmp_path / "set", counts=(1,))
    content = []
    for number, label in enumerate((2, -1, 1)):
        content += [(f"{number}.png", png_bytes(number)), (f"{number}.json", json.dumps({"real": label}).encode())]
    write_shard(folder / "validation-0000.tar", content)
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["validation"] |= {"alt_label": "real", "num_samples": 3}
    (folder / "_info.json").write_text(json.dumps(info))
    found = [(image.name, image.label) for image in open_stream("wds/", folder).share(0, 1)]
    assert found == [("validation-0000.tar/0", 2), ("validation-0000.tar/2", 1)]


def test_options_that_need_files_are_refused(compressed, checkpoint, capsys):
    arguments = ["eval", str(checkpoint), "--data-set", "wds/", "--data-path", str(compressed), "--device", "cpu"]
    assert main([*arguments, "--explain", "--report", str(compressed / "report")]) == 2
    assert "--explain needs images that can be found again" in capsys.readouterr().err


def test_a_report_of_a_stream(compressed, checkpoint, tmp_path):
    arguments = ["eval", str(checkpoint), "--data-set", "wds/", "--data-path", str(compressed), "--device", "cpu"]
    assert main([*arguments, "--workers", "0", "--report", str(tmp_path / "report")]) == 0
    assert json.loads((tmp_path / "report" / "results.json").read_text())["count"] == 13


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set of the Hugging Face Hub, in a folder: three Parquet files, its only split is test."""
    datasets = pytest.importorskip("datasets", reason="datasets is an extra that is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features(
        img=datasets.Image(), id=datasets.Value("int64"), label=datasets.ClassLabel(names=NAMES)
    )
    numbers = iter(range(13))
    (tmp_path / "set").mkdir()
    for shard, count in enumerate((5, 1, 7)):
        rows = [next(numbers) for _ in range(count)]
        images = [{"bytes": png_bytes(number), "path": None if number == 1 else "x.png"} for number in rows]
        columns = {"img": images, "id": rows, "label": [number % 3 for number in rows]}
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(str(tmp_path / "set" / f"test-{shard:05d}-of-00003.parquet"))
    return tmp_path / "set"


def test_a_data_set_of_the_hub(hub_folder, tmp_path, model, files):
    stream = open_stream(f"hfids/{hub_folder}", tmp_path / "cache")
    assert stream.class_names == NAMES
    for num_parts in (1, 2, 3, 5):
        images = sorted(
            (image for part in range(num_parts) for image in stream.share(part, num_parts)),
            key=lambda image: image.position,
        )
        assert [image.label for image in images] == files.labels
        assert [image.content for image in images] == [png_bytes(number) for number in range(13)]
    assert images[1].name.endswith("set[0, 1]")
    assert images[5].name.endswith("set[1, 0] x.png")
    options = InferenceOptions(device=CPU, workers=1)
    mine, expected = (
        evaluate(model, each, options=options, class_names=[*reversed(NAMES)]) for each in (stream, files)
    )
    assert mine.line() == expected.line()


def test_a_folder_of_images_is_a_data_set_of_the_hub(tmp_path, files, monkeypatch):
    """There, `datasets` has the path of each file, not its content. Its classes are the folders."""
    pytest.importorskip("datasets", reason="datasets is an extra that is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(files.root, tmp_path / "set" / "validation")
    images = list(open_stream(f"hfids/{tmp_path / 'set'}", tmp_path / "cache").share(0, 1))
    assert Counter(image.label for image in images) == Counter(files.labels)
    assert {image.content for image in images} == {png_bytes(number) for number in range(13)}


def test_data_sets_of_the_hub_that_cannot_be_evaluated(hub_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    (hub_folder / "test-00000-of-00003.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DataError, match=r"hfids/.*set"):
        list(open_stream(f"hfids/{hub_folder}", tmp_path / "cache").share(0, 1))
    (tmp_path / "texts").mkdir()
    made = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    made.to_parquet(str(tmp_path / "texts" / "validation.parquet"))
    with pytest.raises(DataError, match=r"has no columns of Image.*text \(Value\), label \(Value\)"):
        open_stream(f"hfids/{tmp_path / 'texts'}", tmp_path / "cache")
    (tmp_path / "other").mkdir()
    made.to_parquet(str(tmp_path / "other" / "train.parquet"))
    with pytest.raises(DataError, match="has no split validation or val or valid or test, only train"):
        open_stream(f"hfids/{tmp_path / 'other'}", tmp_path / "cache")


def test_tensorflow_datasets(tmp_path, files):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    tf = pytest.importorskip("tensorflow")

    def rows():
        for number in range(13):
            yield {"image": png_bytes(number), "label": number % 3}

    signature = {"image": tf.TensorSpec((), tf.string), "label": tf.TensorSpec((), tf.int64)}
    data = tf.data.Dataset.from_generator(rows, output_signature=signature)
    data = data.map(lambda row: {"image": tf.io.decode_png(row["image"], 3), "label": row["label"]})
    features = {"image": tfds.features.Image(shape=(16, 16, 3), encoding_format="png")}
    tfds.dataset_builders.store_as_tfds_dataset(
        "made",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features | {"label": tfds.features.ClassLabel(names=NAMES)}),
        split_datasets={"test": data},
        data_dir=str(tmp_path),
    )
    stream = open_stream("tfds/made", tmp_path)
    assert (stream.class_names, stream.num_images) == (NAMES, 13)
    for num_parts in (1, 2, 3):
        images = sorted(
            (image for part in range(num_parts) for image in stream.share(part, num_parts)),
            key=lambda image: image.position,
        )
        pixels = {np.asarray(image.load()).tobytes(): image.label for image in images}
        assert len(images) == len(pixels) == 13
        assert pixels == {np.asarray(files.load(n)).tobytes(): files.labels[n] for n in range(13)}
    assert images[12].name == "tfds/made[12]"
    with pytest.raises(DataError, match=r"cannot be opened|no split"):
        open_stream("tfds/absent", tmp_path)


def test_a_set_without_shards_has_no_images(model):
    with pytest.raises(ValueError, match="no image could be evaluated"):
        evaluate(model, Made(()), options=InferenceOptions(device=CPU, workers=0))


def test_postscript_in_a_stream_is_not_run():
    image = StreamedImage((0, 0), "x", 0, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="PostScript"):
        image.load()
