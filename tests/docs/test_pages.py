"""The pages of the documentation: links lead somewhere, commands parse, snippets and commands run as they stand.

Commands run in this process, because most of a short command's time is the import of torch. Training runs one epoch of
the small model in the package. `tests/cli/test_start.py` and `tests/train/test_processes.py` start commands as a shell
and torchrun do.
"""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_some_digits

import documents
import localvit
import localvit_cli
from published import published_state

SMALL = ["--model", "localvit_nano_patch4_32", "--finetune", "localvit_nano_patch4_32"]
RUN_HERE = (
    "README",
    "faq",
    "how_it_works",
    "models",
    "reproducibility",
    "train",
    "walk_own_images",
    "walk_own_network",
    "walk_reproduce",
    "zoo",
)
"""Pages whose snippets and commands run here. Those of ELSEWHERE have tests of their own."""
ELSEWHERE = {"localize", "hub", "many_images", "backbone", "explain"}
NOT_RUN = {
    "deploy": "tests/exporters run these exports and programs",
    "eval_speed": "benchmarks",
    "performance": "benchmarks",
    "small_images": "benchmarks",
    "study": "tests/cli/test_trust_documents.py reads its commands and its YAML",
    "train_speed": "benchmarks",
    "trust": "tests/cli/test_trust_documents.py reads its commands and its figures",
}
WRITTEN = {
    "README": ("report/report.html", "runs/mine/best.safetensors"),
    "train": ("report/report.html", "predictions.csv", "mine.pth", "runs.png", "runs/mine/summary.md"),
    "walk_own_images": ("report/report.html", "predictions.csv"),
}


def name_of(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", documents.PAGES, ids=name_of)
def test_every_command_parses(page):
    for block in documents.blocks(page):
        if block.kind == "bash":
            for words in documents.command_lines(block.text):
                documents.check_command(words)
    for words in documents.inline_commands(page):
        if len(words) > 2 and "..." not in words:
            documents.check_command(words)
        else:
            assert words[1] in localvit_cli.COMMANDS, words


def test_a_command_with_an_unknown_flag_does_not_parse(capsys):
    documents.check_command(["localvit", "eval", "m.pth", "--data-path", "images"])
    for command in ("localvit eval m.pth --data-folder images", "localvit train --receipt x", "localvit evaluate"):
        with pytest.raises(AssertionError):
            documents.check_command(command.split())


@pytest.mark.parametrize("page", [*documents.PAGES, *documents.NOTEBOOKS], ids=name_of)
def test_links_and_anchors_lead_somewhere(page):
    for link in documents.links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), link
        if anchor:
            assert anchor in documents.anchors(file), link


def test_each_page_runs_here_or_says_why_not():
    with_code = {
        page.stem for page in documents.PAGES if {block.kind for block in documents.blocks(page)} & {"python", "bash"}
    }
    assert with_code == {*RUN_HERE, *ELSEWHERE, *NOT_RUN}


def make_files(folder: Path) -> None:
    """What the pages name: two synsets of an ImageNet, digits, images of three classes, a photo."""
    rng = np.random.default_rng(0)
    classes = [f"imagenet/val/{synset}" for synset in ("n01440764", "n01484850")]
    classes += [f"images/{split}/{name}" for split in ("train", "val") for name in ("ape", "bat", "cow")]
    classes += [f"cifar10/val/{name}" for name in ("airplane", "automobile")]
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(5 if "train" in name else 2):
            Image.fromarray(rng.integers(0, 256, (37, 41, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    Image.new("RGB", (50, 40), "red").save(folder / "photo.jpg")
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 50), "blue").save(folder / "photos" / "1.jpg")
    (folder / "main.py").symlink_to(documents.ROOT / "main.py")
    (folder / "cache" / "localvit").mkdir(parents=True)
    write_some_digits(folder, classes=10, train=7, val=2).rename(folder / "cache" / "localvit" / "digits")


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The file of released weights that pages name."""
    path = tmp_path_factory.mktemp("released") / "localvit_t.pth"
    torch.save({"model": published_state("localvit_tiny_mlp4_act3_r192")}, path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch, released):
    make_files(tmp_path)
    shutil.copy(released, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def needs_more(words: list[str]) -> bool:
    """Whether a command needs a GPU, or an export: these take half a minute each, and tests/exporters runs them."""
    return "--cuda-graph" in words or "export" in words or any(word.endswith(".onnx") for word in words)


def run_command(words: list[str]) -> None:
    """Run a command of this package; others, and those that need eight GPUs, have been parsed above."""
    if needs_more(words):
        return
    program, name = (words[0], words[1]) if words[0] == "localvit" else (" ".join(words[:2]), "")
    if program not in ("localvit", "python main.py"):
        return
    if name == "train" and "finetune" in words:
        words = [*words, *([] if "--model" in words else SMALL), "--epochs", "1", "--batch-size", "4"]
    if name in ("train", "eval", "predict") and "--resume" not in words:
        words = [*words, "--workers", "0"]
    try:
        if program == "localvit":
            status = localvit_cli.main(words[1:])
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
            status = 0
    except SystemExit as end:
        status = end.code or 0
    assert status == 0, words


@pytest.mark.parametrize("name", RUN_HERE)
def test_every_block_runs_in_order(name, place, capsys):
    page = next(page for page in documents.PAGES if page.stem == name)
    if name == "reproducibility":
        run_command(["localvit", "train", "--recipe", "finetune", "--data-path", "images", "--output-dir", "runs/mine"])
    names: dict = {}
    for block in documents.blocks(page):
        if block.reason is not None:
            continue
        if block.kind == "bash":
            for words in documents.command_lines(block.text):
                run_command(words)
        elif block.kind == "python":
            exec(compile(block.text, str(page), "exec"), names)
    for written in WRITTEN.get(name, ()):
        assert (place / written).is_file(), written
    if name == "README":
        assert names["logits"].shape == (2, 10)
        assert isinstance(names["feed_forward"], localvit.LocalityFeedForward)
    if name == "train":
        assert names["checkpoint"].class_names == ["ape", "bat", "cow"]
    if name == "walk_own_network":
        assert names["x_BNC"].shape == (2, 281, 192)
        assert names["out_BNC"].shape == (2, 35, 32)


@pytest.mark.parametrize("notebook", documents.NOTEBOOKS, ids=name_of)
def test_notebooks_run(notebook, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra").use("agg")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(notebook), run_name="__main__")
    assert list(tmp_path.iterdir()) == []
    if notebook.stem == "first_look":
        assert names["prediction"].class_names[0] == "ship"
    else:
        assert [int((map_HW > 0).sum()) for map_HW in names["maps"]] == [9, 25, 49, 81]  # (2n + 1)^2
        names["plt"].close("all")
