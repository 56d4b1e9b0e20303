"""The hosts that are known: one file a library or family group. Importing them registers their rules."""

from localvit.surgery.hosts import huggingface, timm_naflex, timm_plain, timm_pyramids
