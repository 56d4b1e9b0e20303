"""Weights of an ONNX file in float16, each with an operator that makes float32 of it, so that any runtime takes it."""

from pathlib import Path

LEAST_VALUES = 64
"""Smaller weights stay in float32: there is nothing to save."""


def store_in_float16(path: Path) -> None:
    """Rewrite a file. Everything is computed in float32 as before; runtimes convert the weights when they load it."""
    import numpy as np
    import onnx

    model = onnx.load(path)
    graph = model.graph
    weights, casts = [], []
    for weight in graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size >= LEAST_VALUES:
            with np.errstate(over="ignore"):  # to infinity, which the proof finds
                half = values.astype(np.float16)
            casts.append(onnx.helper.make_node("Cast", [f"{weight.name}_float16"], [weight.name], to=1))
            weight = onnx.numpy_helper.from_array(half, f"{weight.name}_float16")
        weights.append(weight)
    nodes = list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(weights)
    graph.node.extend([*casts, *nodes])
    onnx.save(model, path)
