"""Triton kernels for CUDA tensors, and the functions that launch them.

Nothing here is imported before a tensor on a GPU reaches `kernels/ops.py`.
"""
