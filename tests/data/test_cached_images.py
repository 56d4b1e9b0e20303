"""Images in memory: the same pixels, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torchvision import transforms

from localvit.data.batch_augmentation import BatchAugmentation
from localvit.data.cached_batches import CachedBatches, RandomlyTransformedCache, ahead
from localvit.data.cached_images import DecodedImages, cache_for_evaluation, cache_images
from localvit.data.datasets import open_images
from localvit.data.images import DataError, DatasetImages, PreparedImages, UnreadableImage
from localvit.data.preprocessing import Preprocessing
from localvit.data.split import ImageSubset
from localvit.inference.runner import InferenceOptions, Runner
from localvit.models.factory import create_model
from localvit.train.augmentation import augmentation
from localvit.train.config import TrainConfig
from localvit.utils.memory import available_memory

RESIZE = transforms.Resize(32, transforms.InterpolationMode.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """140 images of 20 x 20 pixels in two classes: more than two batches that are decoded together."""
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(70):
            pixels = generator.integers(0, 256, (20, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number:02}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_names_and_labels_are_those_of_the_files(folder, caplog, workers):
    caplog.set_level(logging.INFO, logger="localvit")
    images = open_images("FOLDER", folder)
    cached = cache_images(images, RESIZE, workers, title="training ")
    for index in (0, 63, 64, 139):
        expected = np.asarray(RESIZE(images.load(index)))
        assert np.array_equal(cached.pixels_NCHW[index].permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(np.asarray(cached.load(index)), expected)
        assert (cached.name(index), cached.labels[index]) == (images.name(index), images.labels[index])
    assert "cache: decoding 140 training images of 32 x 32 pixels, 0 MB" in caplog.text


@pytest.mark.parametrize("size", [(32, 32), (24, 16)])
def test_evaluation_gets_the_same_numbers_from_memory(folder, size):
    Image.new("RGB", (50, 30), "red").save(folder / "a" / "wide.png")  # cropped to the size of the others
    images, preprocessing = open_images("FOLDER", folder), Preprocessing(input_size=size)
    cached = cache_for_evaluation(images, preprocessing, workers=0)
    model = create_model("localvit_nano_patch4_32").eval()
    runner = Runner.of(model, preprocessing, InferenceOptions(batch_size=50, device=torch.device("cpu")))
    expected = [PreparedImages(images, preprocessing.transform())[index][1] for index in range(5, 141)]
    batches = list(runner.load_batches(cached, range(5, 141)))
    assert [index for indices, _, _ in batches for index in indices] == list(range(5, 141))
    assert torch.equal(torch.cat([batch for _, batch, _ in batches]), torch.stack(expected))
    assert [failed for _, _, failed in batches] == [[], [], []]
    other = Runner.of(
        model, Preprocessing(input_size=(16, 16)), InferenceOptions(workers=0, device=runner.options.device)
    )
    assert next(other.load_batches(cached, range(3)))[1].shape == (3, 3, 16, 16)


def test_images_of_several_sizes_are_refused(folder):
    Image.new("RGB", (40, 20)).save(folder / "b" / "wide.png")
    with pytest.raises(DataError, match=r"a/00.png has 32 x 32 pixels and b/wide.png has 32 x 64: leave out --cache"):
        cache_images(open_images("FOLDER", folder), RESIZE, workers=0)


def test_images_that_do_not_fit_into_memory_are_refused(folder):
    images = open_images("FOLDER", folder)
    copies = available_memory() // (140 * 3 * 32 * 32) + 10**4
    with pytest.raises(DataError, match=r"needs 0.0 GB of memory in each of \d+ processes for 140 images of 32 x 32"):
        cache_images(images, RESIZE, workers=0, copies=copies)


def test_an_unreadable_image_is_named(folder):
    (folder / "b" / "69.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"b/69.png: cannot be read as an image .*; --skip-unreadable leaves"):
        cache_images(open_images("FOLDER", folder), RESIZE, workers=2)


def test_available_memory_is_less_than_all():
    assert 2**20 < available_memory() < 2**50


def test_resizing_and_normalizing_are_the_evaluation_transform():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 37, 3)).astype(np.uint8))
    for crop_mode in ("center", "squash", "border"):
        preprocessing = Preprocessing(input_size=(24, 24), crop_mode=crop_mode, mean=(0.5, 0.4, 0.3))
        resized = MaybeToTensor()(preprocessing.resizing()(image)) * 255
        batched = preprocessing.normalized(resized.round().byte()[None])[0]
        assert torch.equal(batched, preprocessing.transform()(image))


def batches_of(folder, *, batch_size, processes=1, process=0, repeats=1, erase_first=True, seed=0, random_erasing=0.25):
    cached = cache_images(open_images("FOLDER", folder), RESIZE, workers=0)
    augment = BatchAugmentation(augmentation(TrainConfig(), Preprocessing.published((32, 32)), random_erasing))
    samples = RandomlyTransformedCache(cached, augment, seed, torch.device("cpu"), erase_first=erase_first)
    return CachedBatches(samples, batch_size=batch_size, repeats=repeats, num_processes=processes, process=process)


def test_an_image_is_a_function_of_seed_epoch_index_and_repeat(folder):
    """Whatever the batch size, the first batch and the number of processes."""
    one = batches_of(folder, batch_size=20, repeats=3)
    whole = dict(zip(list(one.order), torch.cat([images for images, _ in one.epoch(0)]), strict=False))
    labels = torch.cat([labels for _, labels in one.epoch(0)]).tolist()
    assert labels == [one.images.images.labels[index] for _, index, _ in list(one.order)[: len(labels)]]
    assert len(whole) == 140
    for process in range(2):
        part = batches_of(folder, batch_size=14, repeats=3, processes=2, process=process)
        own = list(part.order)
        for number, (images_BCHW, _) in enumerate(part.epoch(0, first=2), 2):
            for key, image in zip(own[number * 14 : number * 14 + 14], images_BCHW, strict=True):
                assert key not in whole or torch.equal(image, whole[key])
        assert torch.equal(part.batch(0, 3)[0], list(part.epoch(0))[3][0])
    for changes, epoch in (({}, 1), ({"seed": 1}, 0)):
        other = batches_of(folder, batch_size=20, repeats=3, **changes)
        images = torch.cat([images for images, _ in other.epoch(epoch)])
        pairs = [(whole.get((0, *key[1:])), image) for key, image in zip(other.order, images, strict=True)]
        both = [(before, image) for before, image in pairs if before is not None]
        assert len(both) > 30
        # The same of 162 crops and flips, and no visible operation, happens to one in a thousand.
        assert sum(torch.equal(before, image) for before, image in both) <= 2
    repeats = [image for (_, index, _), image in whole.items() if index == next(iter(whole))[1]]
    assert len(repeats) == 3
    assert not torch.equal(repeats[0], repeats[1])


def test_the_first_repeat_is_not_erased_with_resplit(folder):
    """It is then the image that there is without erasing; about a quarter of the other repeats are not."""
    images_BCHW, whole_BCHW = (
        next(batches_of(folder, batch_size=140, repeats=3, erase_first=False, **changes).epoch(0))[0]
        for changes in ({}, {"random_erasing": 0.0})
    )
    repeat_B = torch.tensor([repeat for _, _, repeat in batches_of(folder, batch_size=140, repeats=3).order])
    is_erased_B = (images_BCHW != whole_BCHW).flatten(1).any(1)
    assert not is_erased_B[repeat_B == 0].any()
    assert 0.1 < is_erased_B[repeat_B > 0].double().mean() < 0.4


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_thread_is_at_most_one_result_ahead(count):
    started = []

    def square(number):
        started.append(number)
        return number * number

    for number, result in enumerate(ahead(square, range(count))):
        assert result == number**2
        assert len(started) <= number + 2
    assert started == list(range(count))


def test_an_error_in_the_thread_reaches_the_caller():
    results = ahead(lambda number: 1 // number, [2, 0, 1])
    assert next(results) == 0
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_images_are_decoded_once_for_several_runs(folder):
    """For the same files in the same size only, and those of one use do not replace those of another."""
    decoded = DecodedImages()

    def cached(images=None, resizing=RESIZE, title="training "):
        return cache_images(images or open_images("FOLDER", folder), resizing, 0, title=title, decoded=decoded)

    first = cached()
    seconds = decoded.seconds
    assert seconds > 0
    assert torch.equal(first.pixels_NCHW, cache_images(open_images("FOLDER", folder), RESIZE, 0).pixels_NCHW)
    other = cached(title="validation ")
    assert other.pixels_NCHW is not first.pixels_NCHW
    again = cached()
    assert again.pixels_NCHW is first.pixels_NCHW
    images = open_images("FOLDER", folder)
    fewer = cached(ImageSubset(images, range(1, len(images))))
    assert torch.equal(fewer.pixels_NCHW, first.pixels_NCHW[1:])
    smaller = cached(resizing=transforms.Resize((16, 16)))
    assert smaller.pixels_NCHW.shape[-1] == 16
    assert cached().pixels_NCHW is not first.pixels_NCHW  # only the last ones are kept
    preprocessing = [Preprocessing(input_size=(32, 32), crop_pct=share) for share in (1.0, 1.0, 0.5)]
    one, same, margin = (
        cache_for_evaluation(open_images("FOLDER", folder), each, 0, decoded=decoded) for each in preprocessing
    )
    assert same.pixels_NCHW is one.pixels_NCHW
    assert not torch.equal(margin.pixels_NCHW, one.pixels_NCHW)
    unnamed = DatasetImages(images.load, images.labels, images.class_names, "x")
    assert cached(unnamed).pixels_NCHW is not cached(unnamed).pixels_NCHW
    assert decoded.seconds > seconds
