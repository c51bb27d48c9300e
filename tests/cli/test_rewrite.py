"""A rewritten program keeps everything but its attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim, ExportedProgram

from attnfuse.errors import BadInput
from attnfuse.pt2 import check, load, rewrite, save
from tests.cli.models import Bare, Cached, Plain


def operators(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.fixture(params=["training IR", "core ATen IR"])
def source(request: pytest.FixtureRequest, program: ExportedProgram) -> ExportedProgram:
    """The program in both of torch's dialects."""
    return program if request.param == "training IR" else program.run_decompositions()


@pytest.mark.parametrize("custom_op", [False, True])
def test_everything_else_is_kept(source: ExportedProgram, custom_op: bool, tmp_path: Path) -> None:
    result, report = rewrite(source, custom_op=custom_op, profit=False)
    assert [site.what for site in report.fused] == ["scale 0.5, causal"]
    assert not report.refused
    check(source, result)

    save(result, tmp_path / "out.pt2", {})
    back = load(tmp_path / "out.pt2")
    check(source, back)
    assert [spec.kind for spec in back.graph_signature.input_specs] == [
        spec.kind for spec in source.graph_signature.input_specs
    ]
    assert [str(bounds) for bounds in back.range_constraints.values()] == [
        str(bounds) for bounds in source.range_constraints.values()
    ]
    assert back.state_dict.keys() == source.state_dict.keys()
    assert back.verifiers == source.verifiers


def test_lengths_outside_the_range_are_still_refused(program: ExportedProgram, tmp_path: Path) -> None:
    save(rewrite(program, profit=False)[0], tmp_path / "out.pt2", {})
    module = load(tmp_path / "out.pt2").module()
    assert module(torch.randn(2, 64, 16))[0].shape == (2, 64, 16)
    with pytest.raises((AssertionError, RuntimeError)):
        module(torch.randn(2, 65, 16))


def test_the_source_stays_as_it_is(program: ExportedProgram) -> None:
    before = str(program)
    rewrite(program, profit=False)
    assert str(program) == before
    program.validate()


def test_weights_are_shared(program: ExportedProgram) -> None:
    result, _ = rewrite(program, profit=False)
    assert all(result.state_dict[name] is tensor for name, tensor in program.state_dict.items())


def test_buffers_go_on_counting(program: ExportedProgram) -> None:
    module = rewrite(program, profit=False)[0].module()
    hidden = torch.randn(2, 6, 16)
    counts = [module(hidden)[1].item() for _ in range(3)]
    assert counts == [counts[0], counts[0] + 1, counts[0] + 2]


def test_every_new_node_has_a_value(source: ExportedProgram) -> None:
    result, _ = rewrite(source, profit=False)
    assert all("val" in node.meta for node in result.graph.nodes if node.op == "call_function")


def test_guards_between_lengths_are_kept(tmp_path: Path) -> None:
    length = {2: Dim.AUTO}
    inputs = tuple(torch.randn(2, 3, 10, 4) for _ in range(3))
    program = torch.export.export(Bare(), inputs, dynamic_shapes=(length, length, length))
    save(rewrite(program, profit=False)[0], tmp_path / "out.pt2", {})
    module = load(tmp_path / "out.pt2").module()
    assert module(*(torch.randn(2, 3, n, 4) for n in (5, 7, 7))).shape == (2, 3, 5, 4)
    with pytest.raises((AssertionError, RuntimeError)):
        module(*(torch.randn(2, 3, n, 4) for n in (5, 7, 8)))


def test_attention_that_is_the_output(tmp_path: Path) -> None:
    """The signature names outputs by node: it follows when the node is replaced."""
    program = torch.export.export(Bare(), tuple(torch.randn(2, 3, 10, 4) for _ in range(3)))
    for custom_op in (False, True):
        result, report = rewrite(program, custom_op=custom_op, profit=False)
        assert len(report.fused) == 1
        save(result, tmp_path / "out.pt2", {})
        check(program, load(tmp_path / "out.pt2"))


def test_a_program_without_attention_is_returned_as_it_is() -> None:
    program = torch.export.export(Plain(), (torch.randn(3),))
    result, report = rewrite(program)
    assert not report.sites
    assert operators(result) == operators(program)


def test_the_default_needs_no_attnfuse(program: ExportedProgram, tmp_path: Path) -> None:
    result, _ = rewrite(program, profit=False)
    save(result, tmp_path / "out.pt2", {})
    code = (
        "import sys; sys.modules['attnfuse'] = None\n"
        f"import torch; print(torch.export.load({str(tmp_path / 'out.pt2')!r}).module()(torch.ones(2, 8, 16))[0].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "torch.Size([2, 8, 16])"


def test_custom_op_keeps_the_operator(program: ExportedProgram) -> None:
    result, _ = rewrite(program, custom_op=True, profit=False)
    assert "attnfuse.attention.default" in operators(result)
    assert "aten._softmax.default" not in operators(result)
    assert "aten.softmax.int" not in operators(result)


@pytest.mark.parametrize("options", [{"kernel": "nobody"}, {"target": "tpu"}, {"numerics": "wild"}, {"speed": "high"}])
def test_unknown_options(options: dict[str, str], program: ExportedProgram) -> None:
    with pytest.raises(BadInput, match=next(iter(options.values())) + "|" + next(iter(options))):
        rewrite(program, **options)


def test_no_gradient_is_lost() -> None:
    """Training IR keeps its gradients through the fused node."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, 16)
    program = torch.export.export(Cached().train(), (hidden,))
    grads = []
    for each in (program, rewrite(program, profit=False)[0]):
        module = each.module()
        module(hidden)[0].square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
        module.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)
