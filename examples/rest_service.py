"""A web service that classifies images with an exported model.

localvit export run/best.safetensors --include resize --output model.onnx
pip install fastapi uvicorn python-multipart onnxruntime numpy pillow
MODEL=model.onnx uvicorn rest_service:app
curl -F images=@photo.jpg -F images=@other.jpg http://localhost:8000/classify
"""

import io
import json
import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image

MOST_IMAGES = 16
"""Of one request."""
MOST_BYTES = 10_000_000
"""Of one image's file."""
MOST_PIXELS = 40_000_000
"""Of one image. A small file may claim to hold billions."""

session = onnxruntime.InferenceSession(os.environ["MODEL"])
if isinstance(session.get_inputs()[0].shape[2], int):
    raise SystemExit(f"{os.environ['MODEL']} takes images of one size only: export it with --include resize")
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
app = FastAPI(title="Image classification")


@app.post("/classify")
def classify(images: list[UploadFile]) -> list[dict[str, float]]:
    """The probabilities of the five most likely classes of each image."""
    if len(images) > MOST_IMAGES:
        raise HTTPException(413, f"{len(images)} images: send at most {MOST_IMAGES} in one request")
    return [_five_classes(_pixels(image)) for image in images]


def _pixels(upload: UploadFile) -> np.ndarray:
    """An uploaded image (H, W, 3). Images of different sizes cannot be one batch, so each is run by itself."""
    content = upload.file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise HTTPException(413, f"{upload.filename} has more than {MOST_BYTES:,} bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"])
        if image.width * image.height > MOST_PIXELS:
            raise HTTPException(413, f"{upload.filename} has more than {MOST_PIXELS:,} pixels")
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HTTPException(415, f"{upload.filename} is not a JPEG, PNG or WebP image: {error}") from error


def _five_classes(image_HWC: np.ndarray) -> dict[str, float]:
    [[probabilities_M]] = session.run(None, {"images": image_HWC.transpose(2, 0, 1)[None]})
    return {class_names[index]: float(probabilities_M[index]) for index in np.argsort(-probabilities_M)[:5]}
