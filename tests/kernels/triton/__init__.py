"""Triton kernels: texts, schedules, bodies in the interpreter, and what compilers make of them."""
