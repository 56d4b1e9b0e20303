"""Where the size of the images is fixed, position embeddings are constants of the exported graph."""

import pytest
import torch
from exported_files import PREPROCESSING, tiny_model
from timm import create_model as timm_model
from torch import nn

from localvit.data.preprocessing import Preprocessing
from localvit.exporters import Onnx, export
from localvit.exporters.graph import build_graph, plain_copy, trace
from localvit.inference.runner import LoadedModel
from localvit.models.factory import create_model

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}


def not_square() -> nn.Module:
    return create_model("localvit_tiny", img_size=(24, 40), reduction=8, **SMALL).eval()


def baseline() -> nn.Module:
    return timm_model("deit_tiny_patch16_224", img_size=(24, 40), dynamic_img_size=True, **SMALL).eval()


def of_another_size() -> nn.Module:
    return create_model("localvit_tiny", img_size=(48, 48), reduction=8, **SMALL).eval()


def operators_on_positions(program: torch.export.ExportedProgram) -> set[str]:
    """Names of the operators that are computed from parameters and constants only, not from the images."""
    inputs = set(program.graph_signature.user_inputs)
    moving, found = {node for node in program.graph.nodes if node.name in inputs}, set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if moving & set(node.all_input_nodes):
            moving.add(node)
        else:
            found.add(str(node.target))
    return found


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (not_square, {"dynamic": "none"}),
        (not_square, {"dynamic": "batch"}),
        (not_square, {"include": ("resize",), "dynamic": "none"}),
        (baseline, {"dynamic": "none"}),
        (of_another_size, {"dynamic": "batch"}),
    ],
)
def test_nothing_is_resampled_in_the_graph(make, options):
    settings = Onnx(**options)
    preprocessing = Preprocessing(input_size=(24, 40))
    program = trace(build_graph(plain_copy(make()), preprocessing, settings), settings, (24, 40), 0)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [each for each in operators if "upsample" in each]
    # Views of the parameter are left; weights of resampling would be computed by comparisons and products.
    arithmetic = {"aten.where.self", "aten.matmul.default", "aten.mm.default", "aten.bmm.default"}
    assert not operators_on_positions(program) & arithmetic


def test_positions_of_an_open_size_are_resampled_in_the_graph():
    """The control: there, they must be."""
    settings = Onnx(dynamic="size")
    program = trace(build_graph(plain_copy(tiny_model()), PREPROCESSING, settings), settings, (24, 24), 8)
    assert "aten.where.self" in {str(node.target) for node in program.graph.nodes}


def test_a_model_made_for_another_size_computes_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    loaded = LoadedModel(
        model=of_another_size(),
        name="tiny",
        class_names=None,
        preprocessing=Preprocessing(input_size=(24, 40)),
        description="tiny",
    )
    report = export(loaded, tmp_path / "fixed.onnx", Onnx(dynamic="none"))
    assert report.max_rel < 1e-5
    operators = {node.op_type for node in onnx.load(report.path).graph.node}
    assert not operators & {"Resize", "Upsample", "Where"}
    assert loaded.model.patch_embed.img_size == (48, 48)  # the given model stays as it is
