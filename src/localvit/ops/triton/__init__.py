"""Triton kernels for NVIDIA GPUs; each computes what `localvit.ops.reference` computes. Needs Triton."""
