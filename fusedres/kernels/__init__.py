"""Triton kernels: the maths alone, on pointers and strides. backends/triton.py launches them."""
