"""The last check before a result is written notices what it must, and only that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from attnfuse.errors import BadInput, NotEquivalent
from attnfuse.pt2 import check
from attnfuse.pt2.sample import OTHER_SIZES, samples
from tests.cli.models import Cached, Dropped, Plain


def exported(module: nn.Module, *inputs: Tensor, **options: object) -> ExportedProgram:
    return torch.export.export(module.eval(), inputs, **options)


def changed(program: ExportedProgram, old: object, new: object) -> ExportedProgram:
    """The program with one operator in place of another."""
    other = copy.deepcopy(program)
    nodes = [node for node in other.graph.nodes if node.target is old]
    assert nodes
    for node in nodes:
        node.target = new
    other.graph_module.recompile()
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("decompose", [False, True])
def test_a_program_equals_itself(dtype: torch.dtype, decompose: bool) -> None:
    program = exported(Cached().to(dtype), torch.randn(2, 12, 16, dtype=dtype))
    program = program.run_decompositions() if decompose else program
    certificate = check(program, program)
    assert certificate.inputs == ("saved inputs", "random inputs")
    assert certificate.source_max == certificate.fused_max
    assert (certificate.source_max > 0) == (dtype != torch.float64)


def test_every_size_is_tried(program: ExportedProgram) -> None:
    assert check(program, program).inputs == ("saved inputs", "random inputs", OTHER_SIZES)
    lengths = {sample.arguments[-1].shape[1] for sample in samples(program, resample=True)}
    assert lengths == {24, 25}


def test_a_wrong_operator_is_noticed(program: ExportedProgram) -> None:
    wrong = changed(program, torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor)
    with pytest.raises(NotEquivalent, match=r"output 0 on saved inputs has \w+ error"):
        check(program, wrong)


@pytest.mark.parametrize("factor", [2.0001, float("nan"), float("inf")])
def test_a_wrong_constant_is_noticed(factor: float) -> None:
    hidden = torch.randn(3, 5)
    with pytest.raises(NotEquivalent):
        check(exported(Plain(2.0), hidden), exported(Plain(factor), hidden))


def test_an_infinity_of_the_other_sign_is_noticed() -> None:
    hidden = torch.ones(3)
    with pytest.raises(NotEquivalent):
        check(exported(Plain(float("inf")), hidden), exported(Plain(float("-inf")), hidden))


def test_rounding_differences_are_none() -> None:
    """Twice the source's own kind of error, from another order of the same multiplications."""

    class Reordered(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * 3.0 * 0.1

    hidden = torch.randn(64)
    check(exported(Plain(0.1 * 3.0), hidden), exported(Reordered(), hidden))


def test_nan_where_the_source_has_none_is_noticed() -> None:
    class Root(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.abs().sqrt()

    program = exported(Root(), torch.randn(16))
    with pytest.raises(NotEquivalent, match="NaN at other places"):
        check(program, changed(program, torch.ops.aten.abs.default, torch.ops.aten.neg.default))


def test_a_shape_that_differs_is_noticed() -> None:
    program = exported(Plain(), torch.randn(4, 4))
    with pytest.raises(NotEquivalent, match=r"is torch.float32\[2, 4\], not torch.float32\[4, 4\]"):
        check(program, exported(_Half(), torch.randn(4, 4)))


class _Half(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:2] * 2.0


def test_what_a_program_writes_into_is_compared(program: ExportedProgram) -> None:
    wrong = changed(program, torch.ops.aten.add_.Tensor, torch.ops.aten.sub_.Tensor)
    with pytest.raises(NotEquivalent):
        check(program, wrong)


def test_buffers_stay_what_they_were(program: ExportedProgram) -> None:
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    check(program, program)
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, before[name])


def test_random_programs_are_said_to_be_unverified() -> None:
    program = exported(Dropped(), torch.randn(4))
    assert check(program, program).skipped == "the program draws random numbers (dropout)"


def test_dropout_that_drops_nothing_is_verified() -> None:
    program = exported(nn.Dropout(0.5), torch.randn(4))
    assert not check(program, program).skipped


def test_a_program_without_a_float64_form_is_compared_directly() -> None:
    class Packed(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.view(torch.int32) * torch.ones(4, dtype=torch.int32)

    program = exported(Packed(), torch.randn(4))
    assert check(program, program).source_max == 0.0
    with pytest.raises(NotEquivalent):
        check(program, exported(Plain(), torch.randn(4)))


def test_token_ids_stay_in_the_vocabulary() -> None:
    length = Dim("length", min=2, max=9)
    program = exported(nn.Embedding(7, 3), torch.tensor([1, 6, 5]), dynamic_shapes=({0: length},))
    assert check(program, program).inputs[-1] == OTHER_SIZES
    for sample in samples(program, resample=True):
        assert set(sample.arguments[-1].tolist()) <= {1, 5, 6}


def test_without_resampling_integers_keep_their_order() -> None:
    program = exported(nn.Embedding(7, 3), torch.tensor([1, 6, 5]), dynamic_shapes=({0: Dim("n", min=2, max=9)},))
    drawn = [sample.arguments[-1].tolist() for sample in samples(program, resample=False)]
    assert drawn == [[1, 6, 5], [1, 6, 5], [1, 6, 5, 1]]


def test_a_program_that_fails_is_the_input_fault() -> None:
    class Failing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            torch._assert_async(hidden.sum() > 1e9)
            return hidden

    program = exported(Failing(), torch.randn(4))
    with pytest.raises(BadInput, match="cannot be run here to verify it"):
        check(program, program)


def test_a_result_that_fails_is_noticed(program: ExportedProgram) -> None:
    wrong = changed(program, torch.ops.aten.transpose.int, torch.ops.aten.unflatten.int)
    with pytest.raises(NotEquivalent, match="the rewritten program fails on saved inputs"):
        check(program, wrong)


@pytest.mark.parametrize("hidden", [torch.randn(0, 4), torch.tensor(1.5)])
def test_empty_and_scalar_outputs(hidden: Tensor) -> None:
    program = exported(Plain(), hidden)
    check(program, program)
