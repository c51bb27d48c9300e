"""Which kernel is chosen, what each says when it cannot, and how others are added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from attnfuse.errors import BadInput, NoKernel
from attnfuse.kernels import UNFUSED, Kernel, Operand, Problem, choose, digest, kernel, kernels, lookup, registry
from attnfuse.operands import Operands
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import SPECS

CPU = Target("cpu")


def problem(name: str = "scaled", *, rows: int = 2048, keys: int = 2048, dtype: torch.dtype = torch.float32) -> Problem:
    query, key = (Operand((1, 8, length, 64), dtype) for length in (rows, keys))
    spec = SPECS[name]
    sizes = dict(zip(spec.axes, (1, 8, rows, keys), strict=True))
    shapes = [tuple(sizes[a] if a in c.axes else 1 for a in spec.axes) for c in spec.captures]
    captures = tuple(Operand(shape, getattr(torch, c.dtype)) for shape, c in zip(shapes, spec.captures, strict=True))
    return Problem(spec, query, key, key, captures)


@pytest.fixture
def extra() -> Iterator[type[Kernel]]:
    """A kernel of somebody else's, gone after the test."""

    class Extra(Kernel):
        name = "extra"
        devices = ("cpu",)

        def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
            return ("it is only an example",) if problem.spec.dropout else ()

        def cost(self, problem: Problem, target: Target) -> float:
            return 1e-12

        def run(self, spec: AttentionSpec, operands: Operands) -> torch.Tensor:
            return operands.query

    yield Extra
    registry._KERNELS.pop("extra", None)
    registry._load_entry_points.cache_clear()


def test_every_kernel_and_the_unfused_graph_are_candidates() -> None:
    choice = choose(problem(), CPU)
    assert [c.name for c in choice.candidates] == [*kernels(), UNFUSED]
    assert all((c.seconds is None) == bool(c.reasons) for c in choice.candidates)
    assert choice.seconds[choice.kernel] == min(s for name, s in choice.seconds.items() if name != UNFUSED)


def test_a_forced_kernel_is_the_only_candidate() -> None:
    assert choose(problem(), CPU, "blocked").kernel == "blocked"
    assert [c.name for c in choose(problem(), CPU, "blocked").candidates] == ["blocked", UNFUSED]


def test_a_forced_kernel_that_cannot_says_why() -> None:
    with pytest.raises(NoKernel, match=r"sdpa: SDPA has no softcap"):
        choose(problem("softcap"), CPU, "sdpa")


def test_no_kernel_for_a_device_names_each_ones_devices() -> None:
    with pytest.raises(NoKernel, match=r"on xpu .*blocked: runs on cpu, not on xpu"):
        choose(problem(), Target("xpu"), "blocked")


def test_an_unknown_kernel_is_bad_input() -> None:
    with pytest.raises(BadInput, match="no kernel 'none'"):
        choose(problem(), CPU, "none")


def test_refusals_are_sentences_about_the_problem() -> None:
    expected = {
        "softcap": "no softcap",
        "scale of each head": "not a tensor",
        "negative scale": "positive number",
        "sink": "no sinks",
        "weights squared": "no weight program",
        "dropout": "no dropout",
        "padding": "lets NaN and infinite keys through",
        "reads the score twice": "no score program such as",
    }
    for name, words in expected.items():
        reasons = lookup("sdpa").refuses(problem(name), CPU)
        assert any(words in reason for reason in reasons), (name, reasons)


@pytest.mark.parametrize(
    ("name", "words"), [("linear", "computes a softmax"), ("empty rows zero", "leaves a row that keeps no key NaN")]
)
def test_a_kernel_that_has_not_heard_of_a_fact_refuses_it(name: str, words: str, extra: type[Kernel]) -> None:
    kernel(extra)
    with pytest.raises(NoKernel, match=words):
        choose(problem(name), CPU, "extra")
    knowing = {"normalisers": ("softmax", "none"), "zeroes_empty_rows": True}
    kernel(type("Extra", (extra,), {**knowing, "__qualname__": extra.__qualname__}))
    assert choose(problem(name), CPU, "extra").kernel == "extra"


def test_what_empty_rows_are_does_not_matter_where_there_are_none(extra: type[Kernel]) -> None:
    kernel(extra)
    kept = replace(problem("empty rows zero, none empty"), rows_kept=True)
    assert choose(kept, CPU, "extra").kernel == "extra"


def test_fast_numerics_let_sdpa_add_its_masks() -> None:
    padded = problem("padding")
    assert lookup("sdpa").refuses(padded, CPU)
    assert not lookup("sdpa").refuses(replace(padded, numerics="fast"), CPU)


def test_a_dtype_without_matrix_products_is_refused_everywhere() -> None:
    with pytest.raises(NoKernel, match="blocked: query is complex64"):
        choose(problem(dtype=torch.complex64), CPU)


def test_a_third_party_adds_a_kernel(extra: type[Kernel]) -> None:
    before = digest()
    kernel(extra)
    assert choose(problem(), CPU).kernel == "extra"
    assert choose(problem("dropout"), CPU).kernel != "extra"
    assert digest() != before


def test_a_third_party_adds_a_kernel_by_entry_point(extra: type[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "extra"

        def load(self) -> type[Kernel]:
            return extra

    def found(group: str) -> list[Entry | EntryPoint]:
        return [Entry()] if group == "attnfuse.kernels" else []

    monkeypatch.setattr(registry, "entry_points", found)
    registry._load_entry_points.cache_clear()
    assert "extra" in kernels()


def test_two_kernels_cannot_share_a_name(extra: type[Kernel]) -> None:
    with pytest.raises(BadInput, match="already is a kernel called 'blocked'"):
        kernel(type("Other", (extra,), {"name": "blocked"}))
    with pytest.raises(BadInput, match="already is a kernel called 'unfused'"):
        kernel(type("Other", (extra,), {"name": UNFUSED}))


class TestTheGate:
    """What was measured, as decisions."""

    def test_bfloat16_decoding_is_never_left_to_sdpa(self) -> None:
        choice = choose(problem(rows=1, keys=4096, dtype=torch.bfloat16), CPU)
        assert choice.kernel != "sdpa"
        assert choice.seconds["sdpa"] > 3 * choice.seconds[choice.kernel]

    def test_grouped_decoding_pays_without_repeated_heads(self) -> None:
        grouped = replace(problem(rows=1, keys=4096), key=Operand((1, 2, 4096, 64), torch.float32))
        grouped = replace(grouped, value=grouped.key)
        choice = choose(grouped, CPU)
        assert choice.pays
        assert choice.seconds[UNFUSED] > 1.5 * choice.seconds[choice.kernel]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["causal", "window", "softcap, causal", "alibi", "sink", "bias"])
    def test_long_sequences_pay(self, name: str, dtype: torch.dtype) -> None:
        choice = choose(problem(name, dtype=dtype), CPU)
        assert choice.pays
        assert choice.seconds[UNFUSED] > 1.3 * choice.seconds[choice.kernel]

    def test_a_short_bias_in_bfloat16_is_not_given_to_a_kernel_with_blocks(self) -> None:
        seconds = choose(problem("bias", rows=512, keys=512, dtype=torch.bfloat16), CPU).seconds
        assert seconds["blocked"] > seconds[UNFUSED]

    def test_skipped_keys_are_not_paid_for(self) -> None:
        window, causal, full = (choose(problem(n), CPU).seconds["blocked"] for n in ("window", "causal", "scaled"))
        assert window < causal < full
