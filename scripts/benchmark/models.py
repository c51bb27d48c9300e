"""Whole models on a GPU, four layers at full width: attnfuse on the eager model beside models rewritten by hand.

By hand is ``attn_implementation="sdpa"`` or ``"flex_attention"`` under Inductor, which transformers brings. Weights and
inputs are the same for all peers; the error is that of the output against float64, ``norm(found - true) / norm(true)``.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from attnfuse.backend import attnfuse
from benchmark.ahead import Prepare
from benchmark.gpu import interleaved
from benchmark.peers import OURS
from benchmark.targets import Target

__all__ = ["MODELS", "ModelCase", "ModelRow", "as_table", "measure_model", "model_cases", "targets", "to_compile"]

_COMMON: dict[str, Any] = {"num_hidden_layers": 4, "use_cache": False, "vocab_size": 32000}
#: By name: architecture, what its configuration says, batch and length.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "llama": (
        "Llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        (2, 4096),
    ),
    "gemma2": (
        "Gemma2",
        {
            "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "sliding_window": 1024, "max_position_embeddings": 8192,
        },
        (2, 4096),
    ),
    "bert": (
        "Bert",
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "max_position_embeddings": 2048,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        (8, 2048),
    ),
}  # fmt: skip
#: By name: how attention is written, the backend, and its mode.
PEERS: dict[str, tuple[str, Any, str | None]] = {
    "inductor": ("eager", "inductor", None),
    "SDPA + inductor": ("sdpa", "inductor", None),
    "flex + inductor": ("flex_attention", "inductor", None),
    OURS: ("eager", attnfuse, None),
    f"{OURS}, reduce-overhead": ("eager", attnfuse, "reduce-overhead"),
}
BY_HAND = ("SDPA + inductor", "flex + inductor")

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class ModelCase:
    """A model, and whether its backward is measured too."""

    name: str
    training: bool

    def __str__(self) -> str:
        return f"{self.name}{' training' if self.training else ''}"

    def make(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model, its weights random, and its inputs; the same on every call."""
        import transformers  # noqa: PLC0415 - it takes seconds, and only models need it

        architecture, settings, shape = MODELS[self.name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**_COMMON, **settings)
        config._attn_implementation = "eager"
        with torch.device("cuda"):
            model = getattr(transformers, f"{architecture}Model")(config).to(torch.bfloat16).eval()
            return model, {"input_ids": torch.randint(1, _COMMON["vocab_size"], shape)}


@dataclass(frozen=True)
class ModelRow:
    """Of each peer milliseconds, gigabytes at the highest and the output's error; why others have none."""

    case: ModelCase
    milliseconds: dict[str, float]
    gigabytes: dict[str, float]
    errors: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)


def model_cases(names: tuple[str, ...], steps: tuple[str, ...]) -> list[ModelCase]:
    """The rows that are asked for; where a tuple is empty, all there are."""
    training = [each for each, step in ((False, "forward"), (True, "training")) if not steps or step in steps]
    return [ModelCase(name, each) for name in names or tuple(MODELS) for each in training]


def to_compile(cases: list[ModelCase]) -> dict[str, Prepare]:
    """What is compiled ahead of these rows."""
    return {f"{case}: {peer}": partial(_prepared, peer, case) for case in cases for peer in PEERS}


def _prepared(peer: str, case: ModelCase) -> Call:
    return _step(peer, case, *case.make())


def measure_model(case: ModelCase) -> ModelRow:
    """The row of a model: speed, memory and error."""
    model, given = case.make()
    with torch.no_grad():
        true = copy.deepcopy(model).double()(**given).last_hidden_state
    row = ModelRow(case, {}, {}, {})
    for peer in PEERS:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            call = _step(peer, case, model, given)
            row.errors[peer] = float((call().detach().double() - true).norm() / true.norm())
            for _ in range(2):
                call()
            row.gigabytes[peer] = _peak(call)
            # one by one: the compiled code of a peer ends with the reset before the next
            row.milliseconds[peer] = interleaved({peer: call})[peer]
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, and is printed as one
            row.absent[peer] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def _step(peer: str, case: ModelCase, model: nn.Module, given: dict[str, Tensor]) -> Call:
    written, backend, mode = PEERS[peer]
    cast("Any", model).set_attn_implementation(written)
    compiled = torch.compile(model, backend=backend, mode=mode, dynamic=False)

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = compiled(**given).last_hidden_state
        return out

    def training() -> Tensor:
        out = forward()
        out.backward(_gradient(out))
        return out

    def cleared() -> Tensor:
        model.zero_grad(set_to_none=True)
        return training()

    return cleared if case.training else torch.no_grad()(forward)


def _gradient(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)


def _peak(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def as_table(rows: list[ModelRow]) -> Table:
    """One line a model and step, one column a peer."""
    table = Table(title=f"milliseconds, peak GB, error against float64; {torch.cuda.get_device_name()}, bf16")
    for heading in ("model", *PEERS):
        table.add_column(heading, no_wrap=True, style="bold" if heading == OURS else None)
    for row in rows:
        table.add_row(str(row.case), *(_cell(row, peer) for peer in PEERS))
    return table


def _cell(row: ModelRow, peer: str) -> str:
    if peer not in row.milliseconds:
        return "-"
    return f"{row.milliseconds[peer]:.1f} {row.gigabytes[peer]:.1f} {row.errors[peer]:.0e}"


def targets(rows: list[ModelRow]) -> list[Target]:
    """As fast as the model rewritten by hand, and no more memory."""
    found = []
    for row in rows:
        for what, figures in (("time", row.milliseconds), ("memory", row.gigabytes)):
            by_hand = [figures[peer] for peer in BY_HAND if peer in figures]
            if by_hand and OURS in figures:
                found.append(Target(f"{what} / by hand", figures[OURS] / min(by_hand), 1.0, where=str(row.case)))
    return found
