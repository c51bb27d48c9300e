"""Kernels for CPUs, one file each."""
