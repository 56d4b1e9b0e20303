"""Classify images with an exported model. It needs onnxruntime, numpy and pillow, and nothing of localvit.

localvit export run/best.safetensors --include resize --output model.onnx
python onnx_predict.py model.onnx photo.jpg ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
for path in sys.argv[2:]:
    image_HWC = np.asarray(Image.open(path).convert("RGB"))
    [[probabilities_M]] = session.run(None, {"images": image_HWC.transpose(2, 0, 1)[None]})
    best = probabilities_M.argmax()
    print(f"{path}\t{class_names[best]}\t{probabilities_M[best]:.6f}")
