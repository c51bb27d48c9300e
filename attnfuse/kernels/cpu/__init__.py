"""Kernels for CPUs, one file each: ``sdpa`` (ATen's), ``flex`` (torch's), ``blocked`` and ``direct`` (ours).

``flex`` is for programs that products do not dominate. Milliseconds on two Zen 4 cores without AMX, torch 2.13, 8 heads
x 64, ours behind the stroke: float32 softcap at 2048 keys 62 / 79, ALiBi at 512 keys 4.0 / 4.4; bfloat16 plain 9.6 /
3.0. With AMX, bfloat16 at 512 keys: ALiBi 1.6 / 5.9, a window 1.9 / 7.4. Its first call compiles C++ for seconds.
"""
