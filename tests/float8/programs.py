"""Attention of quantised tensors, as people write it where torch multiplies no float8, and the spec that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse.spec import AttentionSpec
from tests.kernels.cases import spec

__all__ = ["CASES", "Case", "quantised"]

B, H, N, D = 2, 4, 48, 16
#: Dimensions that have one scale together.
SCALED = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "batch and head": (2, 3), "token": (3,), "channel": (2,)}
AXES = {"tensor": "", "head": "h", "batch and head": "b0,h"}


def quantised(tensor: Tensor, dims: tuple[int, ...], dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A float8 tensor, and the bfloat16 scale that it is to be multiplied with."""
    scale = (tensor.abs().amax(dims, keepdim=True) / torch.finfo(dtype).max).to(torch.bfloat16)
    return (tensor / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), scale


def each_operand(q8: Tensor, k8: Tensor, v8: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """The scales multiply what they belong to."""
    q, k, v = q8.to(torch.bfloat16) * sq, k8.to(torch.bfloat16) * sk, v8.to(torch.bfloat16) * sv
    weights = torch.softmax((q @ k.transpose(-1, -2)).float() * 0.25, dim=-1)
    return weights.to(torch.bfloat16) @ v


def in_float32(q8: Tensor, k8: Tensor, v8: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """They do so in float32, and what they make is rounded."""
    q, k, v = ((x.float() * scale.float()).to(torch.bfloat16) for x, scale in ((q8, sq), (k8, sk), (v8, sv)))
    return torch.softmax(q @ k.mT * 0.25, dim=-1) @ v


def inverted(q8: Tensor, k8: Tensor, v8: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """They divide, and stand on the left."""
    q, k, v = q8.to(torch.bfloat16) / (1 / sq), sk * k8.to(torch.bfloat16), v8.to(torch.bfloat16) * sv
    return torch.softmax(q @ k.mT * 0.25, dim=-1) @ v


def called(q8: Tensor, k8: Tensor, v8: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """In one call."""
    q, k, v = q8.to(torch.bfloat16) * sq, k8.to(torch.bfloat16) * sk, v8.to(torch.bfloat16) * sv
    return F.scaled_dot_product_attention(q, k, v)


def quantised_weights(q8: Tensor, k8: Tensor, v8: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """The weights are quantised too, and what they and the values were divided by multiplies the result."""
    q, k = q8.to(torch.bfloat16) * sq, k8.to(torch.bfloat16) * sk
    weights = torch.softmax((q @ k.transpose(-1, -2)).float() * 0.25, dim=-1)
    weights8 = (weights * 448.0).clamp(max=448.0).to(torch.float8_e4m3fn)
    return (weights8.to(torch.bfloat16) @ v8.to(torch.bfloat16)) * (sv / 448.0)


def dequantised_weights(q8: Tensor, k8: Tensor, v8: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """The weights are quantised and dequantised before the product."""
    q, k, v = q8.to(torch.bfloat16) * sq, k8.to(torch.bfloat16) * sk, v8.to(torch.bfloat16) * sv
    weights = torch.softmax((q @ k.transpose(-1, -2)).float() * 0.25, dim=-1)
    weights8 = (weights * 448.0).to(torch.float8_e4m3fn)
    return (weights8.to(torch.bfloat16) / 448.0) @ v


def cache(q: Tensor, k8: Tensor, v8: Tensor, sk: Tensor, sv: Tensor) -> Tensor:
    """A cache of keys and values is float8, the query is not."""
    k, v = k8.to(q.dtype) * sk, v8.to(q.dtype) * sv
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1) @ v


@dataclass(frozen=True)
class Case:
    """A program, how it is quantised, and its spec: what is read where every operand is seen as the float8 it was."""

    program: Callable[..., Tensor]
    scaled: str
    spec: AttentionSpec
    dtype: torch.dtype = torch.float8_e4m3fn

    @property
    def name(self) -> str:
        return f"{self.program.__name__}, {self.scaled}, {str(self.dtype).removeprefix('torch.float8_')}"

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]
        first = [drawn[0].to(torch.bfloat16)] if self.program is cache else []
        pairs = [quantised(x, SCALED[self.scaled], self.dtype) for x in drawn[len(first) :]]
        return (*first, *(x for x, _ in pairs), *(scale for _, scale in pairs))


_OUT = {"out_dtype": "bfloat16"}
_ROUNDED = {**_OUT, "weight_dtype": "float8_e4m3fn"}
_TOKEN = spec(
    "0.25 * (t0 * t1 * s)", "bfloat16[b0,h,m]", "bfloat16[b0,h,n]", "bfloat16[b0,h,n]", weight="t2 * p", **_OUT
)


def _scales(axes: str) -> tuple[str, str, str]:
    return (f"bfloat16[{axes}]",) * 3  # type: ignore[return-value]


def _case(program: Callable[..., Tensor], scaled: str, dtype: str) -> Case:
    scales = [f"{dtype}[{AXES[scaled]}]"] * 3
    return Case(program, scaled, spec("0.25 * (t0 * t1 * s)", *scales, weight="t2 * p", **_OUT))


CASES = (
    *(_case(each_operand, scaled, "bfloat16") for scaled in AXES),
    *(_case(in_float32, scaled, "float32") for scaled in AXES),
    Case(each_operand, "token", _TOKEN),
    Case(each_operand, "head", spec("0.25 * (t0 * t1 * s)", *_scales("h"), weight="t2 * p", **_OUT), torch.float8_e5m2),
    Case(
        each_operand,
        "head",
        spec("0.25 * (t0 * t1 * s)", *_scales("h"), weight="t2 * p", **_OUT),
        torch.float8_e4m3fnuz,
    ),
    Case(inverted, "head", spec("0.25 * (t0 / t1 * s)", *_scales("h"), weight="t2 * p", **_OUT)),
    Case(
        called,
        "head",
        spec("0.25 * (t0 * t1 * s)", *_scales("h"), weight="t2 * p", empty_rows="zero", exact_scores=True, **_OUT),
    ),
    Case(quantised_weights, "head", spec("0.25 * (t0 * t1 * s)", *_scales("h"), weight="t2 * p", **_ROUNDED)),
    Case(dequantised_weights, "head", spec("0.25 * (t0 * t1 * s)", *_scales("h"), weight="t2 * p", **_ROUNDED)),
    Case(cache, "token", spec("0.25 * (t0 * s)", "bfloat16[b0,h,n]", "bfloat16[b0,h,n]", weight="t1 * p", **_OUT)),
)
