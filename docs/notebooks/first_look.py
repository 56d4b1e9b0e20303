# %% [markdown]
# # A first look
# See [how](../localize.md).

# %%
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
plt.plot([1, 2])
1 + 1
