"""Measuring: counts compared with closed forms, and statistics of timings on a fake clock."""

import statistics
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

import localvit.bench.measure
from localvit.bench.measure import LATENCY_CALLS, measure, number_of_rounds
from localvit.bench.prepare import BenchModel, BenchOptions, prepare, saved_bytes
from localvit.bench.result import Latency, Quartiles
from localvit.bench.tables import as_text, as_values
from localvit.checkpoints import save_checkpoint
from localvit.models.factory import create_model

NANO = "localvit_nano_patch4_32"
CPU = torch.device("cpu")


class Clocked(nn.Module):
    """A model whose forwards take the listed seconds, one after the other, on the fake clock."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def forward(self, x):
        self.clock.now += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        return x


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Replaces the clock of the measurements. A matrix product takes half a second on it."""
    clock = Clock()
    monkeypatch.setattr(localvit.bench.measure, "perf_counter", clock)

    def gemm(options):
        def call():
            clock.now += 0.5

        return call, 1000

    monkeypatch.setattr(localvit.bench.measure, "_gemm", gemm)
    return clock


def clocked(name, clock, seconds, options, **facts) -> BenchModel:
    defaults = {"parameters": 5, "multiply_adds": 10**8, "fused_multiply_adds": 10**8, "saved_bytes_per_image": 3}
    return BenchModel(
        name=name,
        input_size=(3, 2, 2),
        acc1=None,
        module=Clocked(clock, seconds),
        options=options,
        optimizer=None,
        **defaults | facts,
    )


def test_steady_models_are_measured_exactly(clock):
    options = BenchOptions(device=CPU, batch_sizes=(7, 2), rounds=5)
    models = [clocked("fast", clock, [0.2], options), clocked("slow", clock, [0.8], options)]
    counted = []
    measured = measure(models, options, baseline="slow", progress=counted.append)
    fast, slow = measured.models
    assert [batch.batch_size for batch in fast.batches] == [7, 2]
    # Sums of 0.2 round; nothing else can differ.
    assert fast.batches[0].images_per_second.median == pytest.approx(7 / 0.2, rel=1e-9)
    assert fast.batches[1].ratio.median == pytest.approx(4, rel=1e-9)
    assert slow.batches[0].ratio is None
    # 1000^3 multiply-adds in 0.5 s: at that rate the 1e8 of an image take 0.05 s, and those of 7 images 0.35 s.
    assert measured.gemm_multiply_adds_per_second.median == pytest.approx(2e9, rel=1e-9)
    assert slow.batches[0].share_of_gemm_rate.median == pytest.approx(0.35 / 0.8, rel=1e-9)
    assert slow.latency.p50_seconds == pytest.approx(0.8, rel=1e-9)
    assert LATENCY_CALLS <= slow.latency.calls < LATENCY_CALLS + 5
    assert measured.noise() == []
    assert sum(counted) == number_of_rounds(options) == 15


def test_a_training_step_counts_as_three_forwards(clock):
    class Learner(Clocked):
        num_classes = 5

        def __init__(self):
            super().__init__(clock, [0.8])
            self.head = nn.Linear(3 * 2 * 2, 5)

        def forward(self, x):
            return self.head(super().forward(x).flatten(1))

    options = BenchOptions(device=CPU, batch_sizes=(7,), rounds=3, train=True)
    learner = Learner()
    model = clocked("learner", clock, [0.8], options)
    optimizer = torch.optim.AdamW(learner.parameters())
    measured = measure([replace(model, module=learner, optimizer=optimizer)], options)
    # As above, 0.35 s of multiply-adds forward.
    assert measured.models[0].batches[0].share_of_gemm_rate.median == pytest.approx(3 * 0.35 / 0.8, rel=1e-9)
    assert measured.models[0].latency is None
    assert number_of_rounds(options) == 3


def test_short_calls_are_timed_together(clock):
    options = BenchOptions(device=CPU, batch_sizes=(1,), rounds=3)
    measured = measure([clocked("short", clock, [2**-8], options)], options)
    (batch,) = measured.models[0].batches
    assert batch.calls_per_round == 26  # 0.1 s / 2^-8 s, rounded up
    assert batch.images_per_second.median == 2**8


def test_drift_shared_by_all_models_is_not_noise(clock):
    """The machine slows down to a third of its speed; the ratio stays the same."""
    options = BenchOptions(device=CPU, batch_sizes=(1,), rounds=5)
    # Four warm-up calls, one call in each of 5 rounds, and the rest for the latency.
    drift = [1, 1, 1, 1, 1.0, 1.5, 2.0, 2.5, 3.0] + [3] * 300
    models = [clocked(name, clock, [base * each for each in drift], options) for name, base in [("a", 1), ("b", 2)]]
    compared = measure(models, options, baseline="b")
    assert compared.models[0].batches[0].ratio == Quartiles(median=2, first_quartile=2, third_quartile=2)
    assert compared.noise() == []
    single = measure([clocked("a", clock, drift, options)], options)
    # Of 1, 1/1.5, 1/2, 1/2.5 and 1/3 the quartiles are the fourth and the second.
    assert single.models[0].batches[0].images_per_second.relative_range == pytest.approx((1 / 1.5 - 1 / 2.5) / 0.5)
    assert single.noise() == ["a at batch size 1: the interquartile range of its images/s is 53.3% of the median"]


@pytest.mark.parametrize(("off", "noisy"), [(0.04, False), (0.06, True)])
def test_noise_in_the_ratio_is_found(clock, off, noisy):
    options = BenchOptions(device=CPU, batch_sizes=(1,), rounds=5)
    # Speeds 1 - off, 1 - off, 1, 1 + off, 1 + off: quartiles 2 * off apart, about the median 1.
    wave = [1.0] * 4 + [1 / (1 + each) for each in (-off, off, 0, -off, off)] + [1.0] * 300
    measured = measure(
        [clocked("wavy", clock, wave, options), clocked("still", clock, [1.0], options)], options, baseline="still"
    )
    assert measured.models[0].batches[0].ratio.relative_range == pytest.approx(2 * off)
    found = measured.noise()
    assert len(found) == noisy
    assert all("wavy at batch size 1" in each and "12.0%" in each and "still" in each for each in found)


def test_a_quartile_that_is_not_a_number_is_noise(clock):
    options = BenchOptions(device=CPU, batch_sizes=(1,), rounds=3)
    measured = measure([clocked("a", clock, [1.0], options)], options)
    (result,) = measured.models
    nan = Quartiles(median=1.0, first_quartile=float("nan"), third_quartile=1.0)
    broken = replace(result, batches=(replace(result.batches[0], images_per_second=nan),))
    assert len(replace(measured, models=(broken,)).noise()) == 1


def test_every_other_round_runs_in_reverse_order(clock):
    options = BenchOptions(device=CPU, batch_sizes=(1,), rounds=3)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    localvit.bench.measure.time_rounds(calls, dict.fromkeys(calls, 1), options, lambda rounds: None)
    assert "".join(order) == "abccbaabc"


def test_percentiles_are_those_of_numpy():
    import numpy as np

    seconds = np.random.default_rng(3).lognormal(size=211).tolist()
    latency = Latency.of(seconds)
    assert latency.p50_seconds == pytest.approx(statistics.median(seconds))
    assert latency.p99_seconds == pytest.approx(np.percentile(seconds, 99))
    spread = Quartiles.of(seconds)
    expected = [np.percentile(seconds, percent) for percent in (25, 50, 75)]
    assert [spread.first_quartile, spread.median, spread.third_quartile] == pytest.approx(expected)


def test_the_baseline_must_be_among_the_models(clock):
    options = BenchOptions(device=CPU)
    with pytest.raises(ValueError, match="the baseline b is not among the models: a"):
        measure([clocked("a", clock, [1.0], options)], options, baseline="b")


def test_each_runtime_is_compared_with_the_baseline_in_it(clock):
    options = BenchOptions(device=CPU, batch_sizes=(1,), rounds=3)
    seconds = {("a", "torch"): 8.0, ("a", "x"): 2.0, ("b", "torch"): 4.0, ("b", "x"): 3.0, ("a", "y"): 1.0}
    models = [
        replace(clocked(name, clock, [each], options), runtime=runtime) for (name, runtime), each in seconds.items()
    ]
    measured = measure(models, options, baseline="b")
    ratios = {
        (result.model.name, result.model.runtime): result.batches[0].ratio and result.batches[0].ratio.median
        for result in measured.models
    }
    assert ratios == {
        ("a", "torch"): 0.5,
        ("a", "x"): 1.5,
        ("a", "y"): 4,  # where the baseline is not, with the first: torch
        ("b", "torch"): None,
        ("b", "x"): None,
    }
    table = as_text(measured)
    assert [line.split()[:2] for line in table.splitlines()[2:5]] == [["a", "torch"], ["a", "x"], ["b", "torch"]]
    assert [each["runtime"] for each in as_values(measured)["models"]] == ["torch", "x", "torch", "x", "y"]


class Twice(nn.Module):
    """Two layers save one tensor, a third saves a view of it, and an in-place activation saves its output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 5), nn.Linear(7, 11), nn.Linear(7, 13)

    def forward(self, x):
        return self.first(x).relu_().sum() + self.second(x).sum() + self.third(x.view(-1, 7)).sum()


@pytest.mark.parametrize(
    ("model", "floats_per_image", "other_floats"),
    [
        (nn.Linear(7, 5), 7, 0),  # the input, for the gradient of the weight; the weight itself is not counted
        (nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 11)), 7 + 5, 0),
        (nn.Sequential(nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Linear(5, 11)), 7 + 5, 0),  # saved twice, stored once
        (nn.BatchNorm1d(7), 7, 7 + 7),  # the input, and the mean and deviation of each channel over the batch
        (Twice(), 7 + 5, 0),
    ],
)
def test_saved_bytes_are_the_closed_form(model, floats_per_image, other_floats):
    for images in (3, 17):
        saved = saved_bytes(model, torch.randn(images, 7))
        assert saved == 4 * (images * floats_per_image + other_floats)


def prepared(*, source=NANO, input_size=None, **options) -> BenchModel:
    return prepare(source, BenchOptions(device=CPU, batch_sizes=(2,), rounds=3, **options), input_size)


def test_counts_before_and_after_fusing():
    fused, plain, training = prepared(), prepared(fuse=False), prepared(train=True)
    model = create_model(NANO)
    assert fused.parameters == plain.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert fused.multiply_adds == plain.multiply_adds == plain.fused_multiply_adds == training.fused_multiply_adds
    assert fused.fused_multiply_adds < fused.multiply_adds  # fusing leaves out what the last block computes in vain
    assert fused.saved_bytes_per_image == plain.saved_bytes_per_image == training.saved_bytes_per_image > 0


def test_float16_and_channels_last_reach_the_model():
    model = prepared(dtype=torch.float16, channels_last=True)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float16}
    assert not model.module.training
    seen = []
    model.module.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.call(5)()
    (images_BCHW,) = seen
    assert images_BCHW.dtype == torch.float16
    assert images_BCHW.shape == (5, 3, 32, 32)
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert images_BCHW.is_inference() is False  # made outside of inference mode


def test_half_precision_saves_less():
    # Nearly everything saved is maps and tokens, which autocast halves; norms save theirs in float32.
    assert prepared(dtype=torch.bfloat16).saved_bytes_per_image < 0.85 * prepared().saved_bytes_per_image


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_step_trains(dtype):
    """Repeated steps change the parameters, leave no gradients, and fill the state of the optimizer."""
    torch.manual_seed(0)
    model = prepared(train=True, dtype=dtype)
    call = model.call(4)
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    for _ in range(3):
        call()
    assert model.module.training
    changed = [not torch.equal(old, new) for old, new in zip(before, model.module.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    # AdamW keeps two moments of each trained parameter, and a count of steps.
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    buffers = sum(buffer.nbytes for buffer in model.module.buffers())
    steps = 4 * len(before)
    assert model.resident_bytes() == 3 * weights + buffers + steps


def test_accuracy_is_given_for_the_published_weights_and_image_size_only(tmp_path):
    name = "localvit_nano_patch4_32"
    save_checkpoint(create_model(name, num_classes=3), tmp_path / "own.safetensors")
    own = prepared(source=str(tmp_path / "own.safetensors"))
    assert own.acc1 is None
    assert own.module.num_classes == 3
    tiny = prepared(source="localvit_tiny", input_size=(32, 64))
    assert (tiny.input_size, tiny.acc1) == ((3, 32, 64), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": ()}, "give one or more sizes"),
        ({"batch_sizes": (4, 0)}, "batch_sizes: 4 0 given; give one or more sizes, each at least 1"),
        ({"batch_sizes": (4, 4)}, "give each size once"),
        ({"rounds": 0}, "rounds=0 must be at least 3"),
        ({"rounds": 2}, "rounds=2 must be at least 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchOptions(device=CPU, **changes)


def test_the_plot_shows_models_with_published_accuracy_only(clock, tmp_path):
    from localvit.bench.plot import draw_speeds

    options = BenchOptions(device=CPU, batch_sizes=(3, 2), rounds=3)
    models = [clocked("localvit_tiny", clock, [0.5], options), clocked("other", clock, [0.25], options)]
    measured = measure([replace(models[0], acc1=74.838), models[1]], options, baseline="other")
    assert draw_speeds(measured, tmp_path / "speed.png") == ["other"]
    with Image.open(tmp_path / "speed.png") as image:
        assert image.format == "PNG"
    draw_speeds(measured, tmp_path / "speed.svg")
    svg = (tmp_path / "speed.svg").read_text()
    assert "LocalViT-T" in svg
    assert "batch size 3" in svg
    with pytest.raises(ValueError, match="must end in"):
        draw_speeds(measured, tmp_path / "speed.gif")
    with pytest.raises(ValueError, match="no accuracy is published for other"):
        draw_speeds(replace(measured, models=measured.models[1:]), tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.png", "speed.svg"]


def test_tables_and_values_agree(clock):
    options = BenchOptions(device=CPU, batch_sizes=(3, 6), rounds=3)
    models = [clocked("a", clock, [0.25], options), clocked("b", clock, [0.5], options)]
    measured = measure(models, options, baseline="b")
    threes, sixes, facts, notes = as_text(measured).split("\n\n")
    assert [line.split() for line in threes.splitlines()] == [
        ["batch", "size", "3"],
        ["model", "images/s", "quartiles", "speedup", "quartiles", "GEMM", "rate"],
        ["a", "12.0", "12.0-12.0", "2.00", "2.00-2.00", "60%"],
        ["b", "6.0", "6.0-6.0", "-", "-", "30%"],
    ]
    assert sixes.splitlines()[2].split() == ["a", "24.0", "24.0-24.0", "2.00", "2.00-2.00", "120%"]
    assert facts.splitlines()[1].split() == ["a", "2x2", "0.00", "0.100", "0.00", "250.00", "250.00"]
    assert "over 201 calls" in notes
    values = as_values(measured)
    assert values["models"][0]["batches"][0]["ratio"] == {"median": 2, "first_quartile": 2, "third_quartile": 2}
    assert values["models"][0]["latency"] == {"p50_seconds": 0.25, "p99_seconds": 0.25, "calls": 201}
    assert values["noise"] == []


def test_tables_fit_80_columns_and_leave_out_what_was_not_measured(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = BenchOptions(device=CPU, batch_sizes=(64,), rounds=3)
    names = ("localvit_tiny_mlp4_act3_r192", "deit_tiny_patch16_224")
    facts = {"parameters": 5_908_696, "multiply_adds": 1_266_000_000, "saved_bytes_per_image": 20 << 20}
    models = [clocked(name, clock, [0.25], options, **facts) for name in names]
    shown = as_text(measure(models, options, baseline=names[1]))
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count(names[0]) == 2  # one line of speeds, one of facts
    assert "peak MiB" not in shown
    single = as_text(measure(models[:1], options))
    assert "speedup" not in single.lower()
