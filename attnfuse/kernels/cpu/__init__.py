"""Kernels for CPUs, one file each: ``sdpa`` (ATen's), ``blocked`` and ``direct`` (ours).

flex_attention is left out, since it is no faster. Milliseconds, 4 heads x 2048 x 64, one Zen 4 core, torch
2.13, ours behind the stroke:

======== ============ ============ ============ ============ ============
dtype    plain        causal       softcap      window 512   ALiBi
======== ============ ============ ============ ============ ============
float32  86 / 52      44 / 33      57 / 61      23 / 23      44 / 40
bfloat16 136 / 34     69 / 29      83 / 36      36 / 20      70 / 32
======== ============ ============ ============ ============ ============

Besides, its first call compiles C++ for 3 to 6 seconds, and it has no backward on CPUs.
"""
