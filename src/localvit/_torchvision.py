"""Makes `import torchvision` work beside a torch that torchvision's compiled operators were not built for.

A CPU build of torch next to a CUDA build of torchvision, a common pair where packages come from one index, fails while
torchvision declares the shapes of an operator that it could not load ("operator torchvision::nms does not exist",
pytorch/pytorch issue 122494). The models, transforms and data sets used here need none of its operators, so
declaring the missing two is enough. Nothing happens where torchvision imports by itself.
"""

import importlib
import sys

import torch

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
