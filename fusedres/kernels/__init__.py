"""Triton kernels: the maths alone, on pointers, sizes and strides. What launches them is backends/triton.py."""
