"""`localvit bench`: its output, messages and exit status. Timings depend on the machine and are never asserted."""

import json
import sys

import pytest

import localvit.bench.measure
from localvit_cli import main

NANO = "localvit_nano_patch4_32"
QUICK = ("--baseline", "None", "--batch-sizes", "2", "--rounds", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """As few timings as possible."""
    monkeypatch.setattr(localvit.bench.measure, "LATENCY_CALLS", 6)
    monkeypatch.setattr(localvit.bench.measure, "_SECONDS_PER_TIMING", 0.0)


def bench(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["bench", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def strict(text: str):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def test_json_with_a_baseline(capsys):
    arguments = (NANO, "--baseline", "vit_tiny_patch16_224", "--input-size", "32", "--rounds", "3", "--device", "cpu")
    status, out, err = bench(capsys, *arguments, "--batch-sizes", "2", "1", "--json", "--force")
    assert status == 0, err
    facts = strict(out)
    assert (facts["mode"], facts["dtype"], facts["rounds"]) == ("inference", "float32", 3)
    assert (facts["fuse"], facts["compile"], facts["noise_limit"]) == (True, False, 0.1)
    assert {"localvit", "torch", "timm", "python"} <= set(facts["versions"])
    assert facts["hardware"]["threads"] == 1
    model, baseline = facts["models"]
    assert (model["name"], baseline["name"], facts["baseline"]) == (
        NANO,
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224",
    )
    assert model["input_size"] == baseline["input_size"] == [3, 32, 32]
    assert model["parameters"] == 731_074  # as in tests/cli/test_compare_command.py, and counted there by training
    assert model["latency"]["calls"] == 6
    assert [batch["batch_size"] for batch in model["batches"]] == [2, 1]
    for batch, base in zip(model["batches"], baseline["batches"], strict=True):
        assert batch["images_per_second"]["median"] > 0
        assert batch["ratio"]["first_quartile"] <= batch["ratio"]["median"] <= batch["ratio"]["third_quartile"]
        assert base["ratio"] is None
        assert batch["share_of_gemm_rate"]["median"] > 0
        assert batch["peak_memory_bytes"] is None  # measured on CUDA only
    assert "bench: 9 of 9 rounds" in err


def test_tables_of_training(capsys):
    status, out, err = bench(capsys, NANO, *QUICK, "--train", "--dtype", "bfloat16", "--force")
    assert status == 0, err
    speeds, facts, notes = out.split("\n\n")
    assert speeds.splitlines()[0] == "batch size 2"
    assert speeds.splitlines()[2].startswith(NANO)
    assert facts.splitlines()[-1].split()[:3] == [NANO, "32x32", "0.73"]
    assert notes.startswith("Measured: training steps in bfloat16, on ")
    assert "Latency is measured in inference only." in notes


def test_a_noisy_machine_is_refused(capsys, monkeypatch):
    # A clock with which every timing is longer than the one before.
    ticks = iter(range(10**6))
    monkeypatch.setattr(localvit.bench.measure, "perf_counter", lambda: 1.05 ** next(ticks))
    status, out, err = bench(capsys, NANO, *QUICK)
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(
        "localvit: error: this machine is too noisy to compare models: localvit_nano_patch4_32 at batch size 2"
    )
    for word in ("interquartile", "%", "--rounds", "--force"):
        assert word in last
    status, out, err = bench(capsys, NANO, *QUICK, "--force", "--json")
    assert status == 0
    assert "warning: this machine is too noisy to compare models" in err
    assert len(strict(out)["noise"]) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "no model given"),
        (["localvit_tinny", *QUICK], 1, "no model is called 'localvit_tinny'; did you mean localvit_tiny"),
        ([NANO, "--baseline", "deit_tinny"], 1, "no model is called 'deit_tinny'"),
        (["missing.safetensors", *QUICK], 1, "missing.safetensors"),
        ([NANO, "--batch-sizes", "0"], 2, "batch_sizes: 0 given; give one or more sizes, each at least 1"),
        ([NANO, "--rounds", "0"], 2, "rounds=0 must be at least 3"),
        ([NANO, "--device", "abacus"], 2, "abacus"),
        ([NANO, "--input-size", "0"], 2, "--input-size 0"),
        ([NANO, *QUICK, "--plot", "speed.png"], 2, f"no accuracy is published for {NANO}"),
        ([NANO, "--plot", "speed.gif"], 2, "must end in .png, .svg, .pdf"),
    ],
)
def test_an_error_is_one_line(capsys, arguments, status, message):
    got, out, err = bench(capsys, *arguments)
    assert (got, out) == (status, "")
    assert message in err.splitlines()[-1]


def test_a_plot_needs_matplotlib(capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "localvit.bench.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = bench(capsys, NANO, *QUICK, "--plot", str(tmp_path / "speed.png"))
    assert (status, out) == (1, "")
    assert 'pip install "localvit[plot]"' in err
    assert "bench:" not in err  # refused before anything is measured
