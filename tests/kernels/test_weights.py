"""Weights as the result, and their gradients: as exact as the written-out program's, in no more memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from attnfuse.kernels import Operand, choose, kernels, lookup
from attnfuse.kernels import differentiated as by_rows
from attnfuse.kernels.cpu.blocks import SCORES
from attnfuse.kernels.differentiated import weights_gradients
from attnfuse.kernels.kernel import Kernel
from attnfuse.operands import Operands
from attnfuse.reference import Scope, compute_dtype, evaluate, normalised, repeat_heads, weights
from attnfuse.score import P
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from attnfuse.weights_op import attention_weights
from tests.kernels.cases import BATCHES, SIZES, SPECS, Case, Sizes, assert_as_exact, case, conditioning

#: What happens to weights afterwards is not theirs.
SOFTMAXES = {name: replace(each, weight=P, dropout=0.0) for name, each in SPECS.items() if each.normaliser == "softmax"}
#: Of query and key, and of the weights.
TYPES = (
    *((dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    (torch.bfloat16, torch.float32),
)
Gradients = Callable[..., tuple[Tensor | None, ...]]
GRADIENTS: dict[str, Gradients] = {"blocked": lookup("blocked").weights_backward, "any": weights_gradients}


def of_type(of: AttentionSpec, dtype: torch.dtype) -> AttentionSpec:
    return replace(of, out_dtype=str(dtype).removeprefix("torch."))


def of_weights(given: Case) -> Operands:
    return Operands.of_weights(given.query, given.key, given.captures)


def written_out(given: Case, dtype: torch.dtype) -> Tensor:
    """As a careful user writes it: the product in the operands' type, softmax in float32."""
    scope = Scope.whole(given.operands)
    score = (given.query @ repeat_heads(given.key, given.query.shape[-3]).mT).to(compute_dtype(given.query.dtype))
    logit = evaluate(given.spec.score, replace(scope, score=score)).expand(score.shape)
    if given.spec.sink is not None:
        logit = torch.cat([logit, evaluate(given.spec.sink, scope).expand(*logit.shape[:-1], 1)], dim=-1)
    return normalised(given.spec, logit)[..., : score.shape[-1]].to(dtype)


def exact(given: Case) -> Tensor:
    wide = given.to(torch.float64)
    return weights(replace(wide.spec, out_dtype=None), wide.operands)


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("kernel", [name for name, each in kernels().items() if each.gives_weights])
def test_every_spec(name: str, kernel: str) -> None:
    able = lookup(kernel)
    if "cpu" not in able.devices:
        pytest.skip("not for CPU")
    batches = BATCHES if "b0" not in str(SOFTMAXES[name]) else {}
    for sizes in (*SIZES.values(), *batches.values()):
        for dtype, out in TYPES:
            given = case(of_type(SOFTMAXES[name], out), sizes, dtype)
            found = able.weights(given.spec, of_weights(given))
            assert found.is_contiguous()
            assert found.dtype == out
            # a weight is no more exact than its score, which is rounded to the operands' type
            roundings = (4.0 + conditioning(given)) * torch.finfo(dtype).eps / torch.finfo(out).eps
            assert_as_exact([found], [written_out(given, out)], [exact(given)], roundings)


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("by", GRADIENTS)
def test_gradients(name: str, by: str) -> None:
    for sizes in (SIZES["grouped heads"], SIZES["more rows than keys"]):
        given = case(of_type(SOFTMAXES[name], torch.float32), sizes, torch.float32)
        grad = torch.randn(*given.query.shape[:-1], sizes.keys, generator=torch.Generator().manual_seed(1))
        found = differentiated(given, grad, GRADIENTS[by])
        truth = differentiated(given.to(torch.float64), grad.double(), reference)
        assert_as_exact(found, differentiated(given, grad, reference), truth, 16.0)


def reference(
    spec: AttentionSpec, grad: Tensor, operands: Operands, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """By autograd, in one piece."""
    read = (operands.query, operands.key, *operands.captures)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(read, needs, strict=True)]
    found = weights(of_type(spec, leaves[0].dtype), Operands.of_weights(leaves[0], leaves[1], tuple(leaves[2:])))
    floats = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(found, floats, grad, materialize_grads=True)


def differentiated(given: Case, grad: Tensor, by: Gradients) -> list[Tensor]:
    needs = [x.is_floating_point() for x in (given.query, given.key, *given.captures)]
    return [x for x in by(given.spec, grad, of_weights(given), needs) if x is not None]


def test_rows_apart_have_the_gradients_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(of_type(SOFTMAXES["alibi"], torch.float64), SIZES["grouped heads"], torch.float64)
    grad = torch.randn(*given.query.shape[:-1], given.key.shape[-2], dtype=torch.float64)
    whole = differentiated(given, grad, weights_gradients)
    monkeypatch.setattr(by_rows, "SCORES", 3000)
    torch.testing.assert_close(differentiated(given, grad, weights_gradients), whole)


def test_scores_are_never_whole() -> None:
    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                self.sizes[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes() // found.itemsize
            return found

    given = case(SOFTMAXES["scaled"], Sizes((1,), 4, 4, 1100, 1100, 8, 8), torch.float32)
    with Largest() as seen:
        found = lookup("blocked").weights(given.spec, of_weights(given))
    seen.sizes.pop(found.untyped_storage().data_ptr())
    assert max(seen.sizes.values()) <= torch.get_num_threads() * SCORES < found.numel()


def test_opcheck() -> None:
    given = case(of_type(SOFTMAXES["two biases"], torch.float32), SIZES["grouped heads"], torch.float32).leaves()
    arguments = (given.query, given.key, list(given.captures), [], given.spec.to_text(), "blocked")
    opcheck(torch.ops.attnfuse.attention_weights.default, arguments)
    query, key, *captures = (x.detach() for x in (given.query, given.key, *given.captures))
    grad = attention_weights(query, key, captures, *arguments[3:])
    backward = (grad, query, key, captures, *arguments[3:], [True, False, True, True])
    opcheck(torch.ops.attnfuse.attention_weights_backward.default, backward)


def test_autocast_leaves_the_type_that_the_spec_names() -> None:
    given = case(of_type(SOFTMAXES["bias"], torch.float32), SIZES["odd"], torch.float32)
    arguments = (list(given.captures), [], given.spec.to_text(), "blocked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_weights(given.query, given.key, *arguments)
    halves = (x.to(torch.bfloat16) for x in (given.query, given.key))
    torch.testing.assert_close(found, attention_weights(*halves, *arguments), rtol=0, atol=0)


def test_a_kernel_that_never_heard_of_weights_is_not_asked() -> None:
    class Plain(Kernel):
        name, devices = "plain", ("cpu",)

        def refuses(self, problem: Any, target: Target) -> tuple[str, ...]:
            raise AssertionError("asked")

        def cost(self, problem: Any, target: Target) -> float:
            raise AssertionError("asked")

        def run(self, *operands: Any) -> Tensor:
            raise AssertionError("run")

    problem = case(SOFTMAXES["causal"], SIZES["odd"], torch.float32).problem()
    problem = replace(problem, value=Operand((*problem.key.shape[:-1], 0), torch.float32), weights=True)
    assert Plain().reasons_against(problem, Target("cpu")) == ("gives no weights",)


@pytest.mark.parametrize(
    ("target", "name", "pays"),
    [
        ("cpu", "causal", True),
        # Inductor's loop reads the mask and the scores once: as fast
        ("cpu", "bias", False),
        ("cuda:sm90", "causal", True),
        ("cuda:sm90", "scaled", True),
    ],
)
def test_whether_it_pays(target: str, name: str, pays: bool) -> None:
    given = case(SOFTMAXES[name], Sizes((1,), 8, 8, 16, 16, 64, 64), torch.float32).problem()
    long = {
        each: Operand((1, 8, 2048, width), torch.float32) for each, width in (("query", 64), ("key", 64), ("value", 0))
    }
    captures = (Operand((1, 8, 2048, 2048), torch.float32),) if given.captures else ()
    assert choose(replace(given, **long, captures=captures, weights=True), Target.parse(target)).pays == pays
