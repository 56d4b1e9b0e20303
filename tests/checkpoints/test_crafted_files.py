"""Files that try to load something else, to run code or to use up memory: all are refused with an error."""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import torch

import localvit
from localvit.checkpoints import make_header, read_checkpoint
from localvit.checkpoints.arguments import architecture_arguments
from localvit.utils.weight_files import CheckpointError
from processes import run_source, start, status_of

NANO = "localvit_nano_patch4_32"


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return localvit.create_model(NANO, num_classes=3)


def write(folder, model, layout="localvit", **changes):
    """A checkpoint of `model` whose header has `changes`, in our layout or as a training state."""
    header = make_header(model, None, None, None)
    header |= {key: {**header["args"], **value} if key == "args" else value for key, value in changes.items()}
    if layout == "training state":
        path = folder / "crafted.pth"
        torch.save({"model": model.state_dict(), "localvit": header}, path)
        return path
    path = folder / "crafted.safetensors"
    tensors = {f"raw/{key}": value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={"localvit": json.dumps(header)})
    return path


LOADING = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:1/weights.pth"},
    "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "checkpoint_path": "/etc/passwd",
    "cache_dir": "/tmp",
    "features_only": True,
    "pretrained_filter_fn": "print",
    "pretrained_strict": False,
    "scriptable": True,
    "device": "meta",
    "unheard_of": 1,
}


@pytest.mark.parametrize("layout", ["localvit", "training state"])
@pytest.mark.parametrize(("key", "value"), LOADING.items())
def test_arguments_that_are_not_of_the_architecture_are_refused(key, value, layout, nano, tmp_path):
    path = write(tmp_path, nano, layout, args={key: value})
    with pytest.raises(CheckpointError, match=rf"crafted.* asks for {key}, which was refused"):
        localvit.model_from_checkpoint(path)


READS_EACH_FILE = """
import sys
import localvit
from localvit.utils.weight_files import CheckpointError

events = []
sys.addaudithook(lambda event, args: events.append(f"{event} {args}"))
for path in sys.argv[1:]:
    open(path, "rb").close()
    assert path in events[-1]
    try:
        localvit.model_from_checkpoint(path)
    except CheckpointError as error:
        print(error)
wrong = [event for event in events if event.startswith("socket.connect") or "secret" in event]
assert not wrong, wrong
"""


def test_a_crafted_file_opens_no_connection_and_no_other_file(nano, tmp_path):
    """In a process of its own that records every file it opens and every address it connects to."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    secret = localvit.save_checkpoint(nano, tmp_path / "secret.pth", layout="published")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    attempts = (
        {"pretrained": True, "pretrained_cfg_overlay": {"url": url}},
        {"pretrained": True, "pretrained_cfg": {"url": url}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(secret)}},
        {"checkpoint_path": str(secret)},
    )
    paths = []
    for layout in ("localvit", "training state"):
        for number, args in enumerate(attempts):
            (tmp_path / f"{layout} {number}").mkdir()
            paths.append(write(tmp_path / f"{layout} {number}", nano, layout, args=args))
    try:
        out, err = tmp_path / "out", tmp_path / "err"
        status = status_of(start(run_source, READS_EACH_FILE, *paths, out=out, err=err))
    finally:
        server.shutdown()
        server.server_close()
    assert status == 0, err.read_text()
    assert out.read_text().count("was refused") == len(paths) == 8
    assert requested == []


@pytest.mark.parametrize("layout", ["localvit", "training state"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"embed_dim": 10**9}, "argument 'embed_dim' that was refused"),
        ({"num_classes": 10**18}, "argument 'num_classes' that was refused"),
        ({"local_blocks": "1-999999999999"}, "argument 'local_blocks' that was refused"),
        ({"drop_rate": float("inf")}, "argument 'drop_rate' that was refused"),
        ({"localize": {"blocks": "1-999999999999"}}, "argument 'localize' that was refused"),
        ({"depth": 90_000}, r"asks for depth=90000 and has only \d+ tensors"),
        ({"embed_dim": 90_000, "num_heads": 1}, "does not fit the model"),
        ({"img_size": [90_000, 90_000]}, "does not fit the model"),
        ({"embed_dim": "wide"}, "cannot be made with the arguments in it"),
        ({"norm_layer": "os.system"}, "cannot be made with the arguments in it"),
        ({"block_fn": "print"}, "cannot be made with the arguments in it"),
        ({"localize": {"url": "http://127.0.0.1:1"}}, "cannot be made with the arguments in it"),
        ({"act": [[[[[["hs"]]]]]]}, "argument 'act' that was refused"),
    ],
)
def test_values_that_are_absurd_or_not_plain_are_refused(args, message, layout, nano, tmp_path):
    path = write(tmp_path, nano, layout, args=args)
    with pytest.raises(CheckpointError, match=message):
        localvit.model_from_checkpoint(path)


def test_objects_in_a_training_state_are_refused(nano, tmp_path):
    for value in (argparse.Namespace(url="http://127.0.0.1:1"), torch.zeros(3), {1, 2}):
        path = write(tmp_path, nano, "training state", args={"norm_layer": value})
        with pytest.raises(CheckpointError, match="'norm_layer' that was refused"):
            localvit.model_from_checkpoint(path)


def test_names_with_a_source_are_not_models(nano, tmp_path):
    """timm's create_model would fetch these names from the hub, or read a folder."""
    for name in ("hf-hub:someone/model", "local-dir:/tmp/model", "hf_hub:someone/model"):
        with pytest.raises(CheckpointError, match="is of an unknown model"):
            localvit.model_from_checkpoint(write(tmp_path, nano, name=name))


@pytest.mark.parametrize("layout", ["localvit", "training state"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "1"}, "no format number"),
        ({"format": True}, "no format number"),
        ({"name": ["localvit_tiny"]}, "header: name missing or of the wrong type"),
        ({"args": None, "about": 3}, "header: args, about missing or of the wrong type"),
        ({"class_names": ["a", 2, "c"]}, "header: class_names missing"),
        ({"img_size": [32]}, "header: img_size missing"),
        ({"img_size": [32, -4]}, "header: img_size missing"),
        ({"img_size": [36, 28]}, "not the grid of 36 x 28 pixels that its header says"),
        ({"preprocessing": "none"}, "header: preprocessing missing"),
    ],
)
def test_damaged_headers_are_refused(changes, message, layout, nano, tmp_path):
    if changes.get("args", 0) is None:
        header = make_header(nano, None, None, None) | changes
        path = tmp_path / "damaged.pth"
        torch.save({"model": nano.state_dict(), "localvit": header}, path)
    else:
        path = write(tmp_path, nano, layout, **changes)
    with pytest.raises(CheckpointError, match=message):
        localvit.model_from_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"text"', "[" * 100_000])
@pytest.mark.parametrize("key", ["localvit", "localvit_locality"])
def test_headers_that_are_not_a_json_object_are_refused(key, text, nano, tmp_path):
    path = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file({"raw/x": torch.zeros(1)}, path, metadata={key: text})
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors has a damaged header"):
        localvit.load_locality(nano, path) if key == "localvit_locality" else read_checkpoint(path)


@pytest.mark.parametrize("missing", ["format", "name", "args", "img_size", "class_names", "preprocessing", "about"])
def test_headers_without_a_key_are_refused(missing, nano, tmp_path):
    header = make_header(nano, None, None, None)
    del header[missing]
    torch.save({"model": nano.state_dict(), "localvit": header}, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="format number" if missing == "format" else f"header: {missing} missing"):
        read_checkpoint(tmp_path / "damaged.pth")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"url": "http://127.0.0.1:1/weights.pth"}, "damaged header"),
        ({"blocks": "1-999999999999"}, "argument 'blocks' that was refused"),
        ({"kernel_size": 10**9}, "argument 'kernel_size' that was refused"),
        ({"filter_fn": {"a": {"b": {"c": {"d": {"e": 1}}}}}}, "argument 'filter_fn' that was refused"),
    ],
)
def test_files_of_locality_pass_only_plain_arguments(header, message, tmp_path):
    path = tmp_path / "locality.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"localvit_locality": json.dumps(header)})
    with pytest.raises(CheckpointError, match=message):
        localvit.load_locality(localvit.create_model("test_vit"), path)


def test_architecture_arguments_are_those_of_the_constructors():
    for name in ("localvit_tiny", "localvit_T2t_conv7", "pvt_tiny", "localvit_swin_tiny.in1k", "vit_tiny_patch16_224"):
        assert {"img_size", "drop_path_rate", "num_classes", "localize"} <= architecture_arguments(name)
    assert "distilled" in architecture_arguments("localvit_tiny")
    assert {"act", "local_blocks"} <= architecture_arguments("localvit_tnt_tiny")
    assert not LOADING.keys() & architecture_arguments("localvit_tiny")
    assert not LOADING.keys() & architecture_arguments("resnet18")


def test_a_model_that_a_checkpoint_could_not_rebuild_is_not_saved(tmp_path):
    model = localvit.create_model(NANO, norm_layer=torch.nn.LayerNorm)
    with pytest.raises(ValueError, match="it was made with norm_layer"):
        localvit.save_checkpoint(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
