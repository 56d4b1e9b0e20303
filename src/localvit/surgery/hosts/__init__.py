"""The supported hosts, one file for each library or group of families. Importing them registers their rules."""

from localvit.surgery.hosts import huggingface, timm_blocks, timm_hierarchical, timm_naflex, timm_plain
