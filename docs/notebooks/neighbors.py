# %% [markdown]
# # What a neighbor changes
#
# How far does a change of one patch reach, in one layer and through several? Runs offline in a few seconds.

# %%
import matplotlib.pyplot as plt
import timm
import torch

import localvit

torch.manual_seed(0)


def reach(module, map_BCHW, row, column):
    """Where the output of `module` changes when the patch (row, column) changes: the largest change of any channel."""
    changed = map_BCHW.clone()
    changed[:, :, row, column] += 1
    with torch.no_grad():
        return (module(changed) - module(map_BCHW)).abs().amax((0, 1))


def show(maps, titles):
    """Maps side by side, each scaled by its largest value."""
    _, axes = plt.subplots(1, len(maps), figsize=(2.6 * len(maps), 2.8), squeeze=False)
    for axis, map_HW, title in zip(axes[0], maps, titles, strict=True):
        axis.imshow((map_HW / map_HW.max()) ** 0.5, cmap="magma", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.axis("off")


# %% [markdown]
# ## One feed-forward
#
# Without the depth-wise convolution, a patch changes itself only. With it, a patch and its eight neighbors. With a
# gate, every patch changes a little, because the gate reads the mean of the whole map. (Brightness is the square root
# of the change, so that small changes are visible.)

# %%
map_BCHW = torch.randn(1, 16, 11, 11)
alone = localvit.LocalityFeedForward(16, 16, act="hs", wo_dp_conv=True).eval()
local = localvit.LocalityFeedForward(16, 16, act="hs").eval()
gated = localvit.LocalityFeedForward(16, 16, act="hs+se").eval()
maps = [reach(module, map_BCHW, 5, 5) for module in (alone, local, gated)]
show(maps, ["no neighbors", "locality", "locality and gate"])
[int((map_HW > 0).sum()) for map_HW in maps]

# %% [markdown]
# Those are 1, 9 and all 121 patches.
#
# ## Several feed-forwards
#
# Each one adds a ring: after n of them, a patch reaches a square of 2n + 1 patches, even without attention.

# %%
stack = [localvit.LocalityFeedForward(16, 16, act="hs") for _ in range(4)]
maps = [reach(torch.nn.Sequential(*stack[:depth]).eval(), map_BCHW, 5, 5) for depth in (1, 2, 3, 4)]
show(maps, ["1 layer", "2 layers", "3 layers", "4 layers"])
[int((map_HW > 0).sum()) for map_HW in maps]

# %% [markdown]
# ## A trained model without its neighbors
#
# The model in the package was [trained on CIFAR-10](../models.md). Set every weight of its 3x3 filters to zero except
# the center, and its neighbors are gone; all else stays. How often does the class stay the same?

# %%
model = localvit.create_model("localvit_nano_patch4_32", pretrained=True).eval()
without = localvit.create_model("localvit_nano_patch4_32", pretrained=True).eval()
center = torch.zeros(3, 3)
center[1, 1] = 1
for module in without.modules():
    if isinstance(module, localvit.LocalityFeedForward):
        depthwise = next(layer for layer in module.conv if getattr(layer, "groups", 1) > 1)
        depthwise.weight.data *= center

images = torch.nn.functional.interpolate(torch.randn(64, 3, 6, 6), size=32, mode="bicubic")
with torch.no_grad():
    same = model(images).argmax(1) == without(images).argmax(1)
print(f"{same.sum()} of {len(same)} smooth random images get the same class")

# %% [markdown]
# These images show nothing, so this is no accuracy. Networks that are trained without neighbors from the start
# [lose 16 points](../models.md#what-locality-contributes) after 34 epochs.
#
# ## Locality in a model that has none
#
# `localize` adds a depth-wise convolution to the feed-forwards of any vision transformer. It starts at zero, so the
# model is unchanged until it is trained.

# %%
vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
localized = localvit.localize(vit)
images = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    print(torch.equal(vit(images), localized(images)))
print(localvit.locality_report(localized, (3, 224, 224)))
