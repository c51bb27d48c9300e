"""The operator: opcheck, compilation, autocast, dropout, and calls that make no sense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnfuse.errors import BadInput, BadProgram
from attnfuse.op import attention
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import SIZES, SPECS, case

BOTTOM_RIGHT = AttentionSpec(parse("where(n <= m + (z1 - z0), 0.25 * s, -inf)"), symbols=2).to_text()


@pytest.mark.parametrize(
    ("name", "kernel"), [("scaled", "sdpa"), ("bias", "sdpa"), ("everything", "blocked"), ("sink", "direct")]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(name: str, kernel: str, with_lse: bool) -> None:
    given = case(SPECS[name], replace(SIZES["grouped heads"], batch=(1,), rows=5, keys=6), torch.float32).leaves()
    arguments = (*given.tensors[:3], list(given.captures), [], given.spec.to_text(), kernel, with_lse)
    opcheck(torch.ops.attnfuse.attention.default, arguments)
    with torch.no_grad():
        out, lse = attention(*arguments)
        needs = [x.is_floating_point() for x in given.tensors]
        plain = [x.detach() for x in given.tensors]
        backward = (out, None, *plain[:3], out, lse, plain[3:], [], given.spec.to_text(), kernel, needs)
        opcheck(torch.ops.attnfuse.attention_backward.default, backward)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_symbolic_sizes(backend: str) -> None:
    def program(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sizes = [query.shape[1], key.shape[1]]
        heads_first = [x.transpose(1, 2) for x in (query, key, value)]
        out, _ = attention(*heads_first, [], sizes, BOTTOM_RIGHT, "blocked")
        return out.transpose(1, 2).flatten(2).sin()  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(program, dynamic=True, fullgraph=True, backend=backend)
    for rows in (5, 7, 11):
        operands = [torch.randn(2, n, h, 16, requires_grad=True) for n, h in ((rows, 4), (rows + 3, 2), (rows + 3, 2))]
        ours, theirs = compiled(*operands), program(*operands)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(out.sum(), operands) for out in (ours, theirs)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_operands_and_leaves_the_captures(compiled: bool) -> None:
    given = case(SPECS["bias"], SIZES["odd"], torch.float32)
    # -inf once it is bfloat16
    bias = given.captures[0].masked_fill(given.captures[0] > 0.5, torch.finfo(torch.float32).min).requires_grad_()
    query = given.query.detach().requires_grad_()

    def program(query: Tensor) -> Tensor:
        out: Tensor = attention(query, given.key, given.value, [bias], [], given.spec.to_text(), "blocked")[0]
        return out

    run = torch.compile(program, backend="aot_eager") if compiled else program
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(query)
    low = [x.to(torch.bfloat16) for x in (query, given.key, given.value)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*low, [bias], [], given.spec.to_text(), "blocked")[0])
    grads = torch.autograd.grad(out.float().sum(), [query, bias])
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


def test_dropout_is_a_function_of_the_seed() -> None:
    given = case(SPECS["dropout"], SIZES["odd"], torch.float32)
    text = given.spec.to_text()
    outs = [attention(*given.tensors[:3], [torch.tensor([seed])], [], text, "blocked")[0] for seed in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_dropout_without_a_seed_is_an_error() -> None:
    given = case(SPECS["dropout"], SIZES["odd"], torch.float32)
    with pytest.raises(BadProgram, match="needs its seed as capture 0"):
        attention(*given.tensors[:3], [], [], given.spec.to_text(), "blocked")


def test_an_unknown_kernel_is_an_error_that_names_the_known() -> None:
    given = case(SPECS["plain"], SIZES["odd"], torch.float32)
    with pytest.raises(BadInput, match=r"no kernel 'none'; there are .*blocked.*sdpa"):
        attention(*given.tensors[:3], [], [], given.spec.to_text(), "none")


def test_activation_checkpointing_draws_the_same_dropout() -> None:
    given = case(SPECS["dropout"], SIZES["odd"], torch.float32)
    text = given.spec.to_text()

    def program(query: Tensor) -> Tensor:
        seed = torch.randint(2**62, (1,))
        out: Tensor = attention(query, given.key, given.value, [seed], [], text, "blocked")[0]
        return out

    grads = []
    for wrapped in (program, lambda q: torch.utils.checkpoint.checkpoint(program, q, use_reentrant=False)):
        torch.manual_seed(5)
        query = given.query.detach().requires_grad_()
        grads.append(torch.autograd.grad(wrapped(query).square().sum(), query)[0])
    torch.testing.assert_close(*grads)
