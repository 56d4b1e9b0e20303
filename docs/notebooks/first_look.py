# %% [markdown]
# # A first look
#
# A trained model, a prediction, and what its neighbors contribute. Runs offline in a few seconds: the weights of this
# small model [are in the package](../models.md), and the image is drawn here.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

import localvit

torch.manual_seed(0)
model = localvit.create_model("localvit_nano_patch4_32", pretrained=True).eval()
print(sum(parameter.numel() for parameter in model.parameters()), "parameters")

# %% [markdown]
# ## An image
#
# The model knows CIFAR-10's ten classes, such as ships and airplanes. This is a ship, more or less.

# %%
image = Image.new("RGB", (320, 320), (150, 190, 230))
draw = ImageDraw.Draw(image)
draw.rectangle((0, 200, 320, 320), fill=(30, 70, 120))
draw.polygon([(40, 170), (290, 170), (250, 235), (80, 235)], fill=(90, 30, 30))
draw.rectangle((110, 120, 220, 170), fill=(235, 235, 235))
draw.rectangle((140, 70, 165, 120), fill=(40, 40, 40))
file = Path(tempfile.mkdtemp()) / "ship.png"
image.save(file)
plt.figure(figsize=(2.4, 2.4))
plt.imshow(image)
_ = plt.axis("off")

# %% [markdown]
# ## Predict
#
# `predict` resizes, crops and normalizes as in evaluation.

# %%
[prediction] = localvit.predict(model, [file])
for name, probability in zip(prediction.class_names, prediction.probabilities, strict=True):
    print(f"{name:12} {probability:.3f}")

# %% [markdown]
# ## The same, fused
#
# `fuse` folds the batch norms into the convolutions. The logits are equal up to rounding.

# %%
fused = localvit.fuse(model)
images = torch.randn(8, 3, 32, 32)
with torch.no_grad():
    print(f"largest difference {(fused(images) - model(images)).abs().max():.1e}")

# %% [markdown]
# ## The weights of the neighbors
#
# Each hidden channel has a 3x3 filter. These are the strongest 24 of the first block, each scaled by its largest
# weight: edges, blobs and differences in several directions, learned from 50,000 small images.

# %%
first = next(module for module in model.modules() if isinstance(module, localvit.LocalityFeedForward))
depthwise = next(layer for layer in first.conv if getattr(layer, "groups", 1) > 1)
filters = depthwise.weight.detach()[:, 0]
strongest = filters[filters.abs().amax((1, 2)).argsort(descending=True)[:24]]
figure, axes = plt.subplots(2, 12, figsize=(9, 1.7))
for axis, weights in zip(axes.flat, strongest, strict=True):
    axis.imshow(weights / weights.abs().max(), cmap="RdBu", vmin=-1, vmax=1)
    axis.axis("off")

# %% [markdown]
# ## How much of a filter is its center?
#
# A filter with all its weight in the center would mix no neighbors. Here, block by block, is the share of the absolute
# weight that lies on the eight neighbors.

# %%
feed_forwards = [module for module in model.modules() if isinstance(module, localvit.LocalityFeedForward)]
for number, module in enumerate(feed_forwards, start=1):
    depthwise = next(layer for layer in module.conv if getattr(layer, "groups", 1) > 1)
    weights = depthwise.weight.detach().abs()
    share = 1 - weights[..., 1, 1].sum() / weights.sum()
    print(f"block {number}: {share:.0%}")

# %% [markdown]
# Equal weights would give 89 %. The last block's filters do not count: [their output reaches
# nothing](../how_it_works.md#where-it-does-nothing), since the head of this model reads the class token.
