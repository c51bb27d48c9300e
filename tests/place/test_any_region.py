"""Values made in any way: whatever is decided, the numbers stay, and the kernel gets what the report says."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attnfuse import rewrite
from tests.place.conftest import Picky
from tests.place.programs import WIDTH, B, D, H, N, attend, heads

#: What can happen to a value ``[B, H, N, D]`` between where it is made and where it is read.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scale": lambda v, x: v * 0.5,
    "bias": lambda v, x: v + x[0, 0, :D],
    "activation": lambda v, x: F.silu(v),
    "residual": lambda v, x: v + heads(x),
    "residual first": lambda v, x: heads(x) + v,
    "contiguous": lambda v, x: v.contiguous(),
    "clone": lambda v, x: v.clone(),
    "transposed copy": lambda v, x: v.mT.contiguous().mT,
    "merged heads": lambda v, x: v.reshape(B * H, N, D).sin().reshape(B, H, N, D),
    "merged rows": lambda v, x: v.transpose(1, 2).reshape(B * N, H * D).cos().view(B, N, H, D).transpose(1, 2),
    "cache": lambda v, x: torch.cat([heads(x), v], dim=2)[:, :, N // 2 : N // 2 + N],
    "concatenated columns": lambda v, x: torch.cat([v[..., D // 2 :], -v[..., : D // 2]], dim=-1),
    "stack": lambda v, x: torch.stack([v, heads(x)], dim=1)[:, 0],
    "stacked last": lambda v, x: torch.stack([v, heads(x)], dim=-1).sum(-1),
    "chunks": lambda v, x: v.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1),
    "rows again": lambda v, x: v.index_select(2, torch.arange(N).flip(0)),
    "norm": lambda v, x: v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1.0),
    "layer norm": lambda v, x: F.layer_norm(v, (D,)),
    "mixed rows": lambda v, x: v.transpose(-2, -1).softmax(-1).transpose(-2, -1),
    "expanded": lambda v, x: v[:, :, None].expand(B, H, 2, N, D)[:, :, 1],
    "flipped": lambda v, x: v.flip(1),
}
SOURCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "input": lambda x, w: heads(x),
    "linear": lambda x, w: heads(F.linear(x, w)),
    "linear with bias": lambda x, w: heads(F.linear(x, w, w[0])),
    "heads by matmul": lambda x, w: x[:, None] @ w.view(H, D, WIDTH).mT,
    "addmm": lambda x, w: heads(torch.addmm(w[0], x.reshape(-1, WIDTH), w, beta=0.5).view(B, N, WIDTH)),
    "transposed product": lambda x, w: (w @ x.mT).view(B, H, D, N).mT,
    "convolution": lambda x, w: F.conv1d(x.mT, w[..., None], w[1]).view(B, H, D, N).mT,
    "image": lambda x, w: (
        F.conv2d(x.mT.reshape(B, WIDTH, 2, N // 2), w[..., None, None]).flatten(2).view(B, H, D, N).mT
    ),
}
FACTORS = st.fixed_dictionaries({
    name: st.fixed_dictionaries({"d": st.sampled_from((1.0, 1.5, 3.0)), "n": st.sampled_from((1.0, 2.0))})
    for name in ("query", "key", "value")
})  # fmt: skip


class Program(nn.Module):
    """Query, key and value of one source each, the latter two with steps; all are returned, if asked for."""

    def __init__(self, source: str, key: list[str], value: list[str], *, returned: bool) -> None:
        super().__init__()
        self.source, self.steps, self.returned = source, (key, value), returned

    def forward(self, x: Tensor, w: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        made = SOURCES[self.source](x, w)
        key, value = made, made
        for step in self.steps[0]:
            key = STEPS[step](key, x)
        for step in self.steps[1]:
            value = STEPS[step](value, x)
        out = attend(heads(other), key, value)
        return (out, value) if self.returned else (out,)


@given(
    source=st.sampled_from(tuple(SOURCES)),
    key=st.lists(st.sampled_from(tuple(STEPS)), max_size=2),
    value=st.lists(st.sampled_from(tuple(STEPS)), max_size=4),
    returned=st.booleans(),
    factors=FACTORS,
    seconds=st.sampled_from((1e-9, 1e-7, 1.0)),
    decomposed=st.booleans(),
)
def test_the_numbers_stay(
    picky: Picky, source: str, key: list[str], value: list[str], returned: bool, factors: dict[str, dict[str, float]],
    seconds: float, decomposed: bool,
) -> None:  # fmt: skip
    module = Program(source, key, value, returned=returned)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in ((B, N, WIDTH), (WIDTH, WIDTH), (B, N, WIDTH)))
    program = torch.export.export(module, inputs)
    program = program.run_decompositions() if decomposed else program
    name = picky(factors, seconds)
    result, report = rewrite(program, custom_op=True, kernel=name, profit=False, target="cuda:sm90", certify="off")
    run = result.module()
    picky.seen.clear()
    for mine, true in zip(run(*inputs), module(*inputs), strict=True):
        # float64, a dozen steps on numbers of up to a few hundred
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)
        # who gets a value may rely on how it lies
        assert mine.stride() == true.stride() or decomposed
    for site in report.fused:
        assert not report.regions or {each: picky.layouts(each).pop() for each in site.layouts} == site.layouts
    for region in report.regions:
        operands = [value for value in region.values if value.what == "operand"]
        # two operands of one kernel may gain less together than each alone, and are left alone then
        rules = region.seconds.values() if len(operands) == 1 else [region.seconds["fold"]]
        assert region.seconds["chosen"] <= min(rules) * (1 + 1e-12)
        assert "placing" not in " ".join(note for site in report.fused for note in site.notes)
