"""Triton kernels of lcpt_kernels, in families: one file for each kernel and its launch."""
