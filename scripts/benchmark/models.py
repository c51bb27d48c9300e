"""Whole models on a GPU, four layers at full width: attnfuse on the eager model beside models rewritten by hand.

By hand is ``attn_implementation="sdpa"`` or ``"flex_attention"`` under Inductor, which transformers brings. Each peer
of each model has a process of its own, all of which compile at the same time; when they are ready, those of one model
are timed in turn. Weights and inputs are the same for all peers; the error is that of the output of the first batch
against float64, ``norm(found - true) / norm(true)``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from attnfuse.backend import attnfuse
from benchmark.clock import in_turn, seconds
from benchmark.peers import OURS
from benchmark.targets import Target
from benchmark.workers import Absent, Answers, Worker, ready

__all__ = ["MODELS", "ModelCase", "ModelRow", "as_line", "as_table", "measure_models", "model_cases", "targets"]

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
#: By name: how attention is written, and the backend.
PEERS: dict[str, tuple[str, Any]] = {
    "SDPA + inductor": ("sdpa", "inductor"),
    "flex + inductor": ("flex_attention", "inductor"),
    OURS: ("eager", attnfuse),
}
#: Seconds of a peer's turn, and processor seconds to wait for all that compile.
TURN, PATIENCE = 0.1, 1600.0

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


def measure_models(cases: Sequence[ModelCase]) -> Iterator[ModelRow]:
    """The rows of models, each as it comes: speed, memory and error."""
    with TemporaryDirectory() as folder:
        truths = {name: Path(folder) / name for name in dict.fromkeys(case.name for case in cases)}
        exact = {name: Worker(partial(_exact, name, path)) for name, path in truths.items()}
        peers = {key: Worker(partial(_prepared, *key)) for key in product(cases, PEERS)}
        try:
            ready({**exact, **peers}, PATIENCE / (os.cpu_count() or 1))
            for worker in exact.values():
                worker.end()
            for case in cases:
                yield _row(case, {peer: peers[case, peer] for peer in PEERS}, truths[case.name])
        finally:
            for worker in (*exact.values(), *peers.values()):
                worker.end()


def _row(case: ModelCase, workers: dict[str, Worker], truth: Path) -> ModelRow:
    row = ModelRow(case, {}, {}, {})
    for peer, worker in workers.items():
        _look(row, peer, worker, truth)
    clocks = {peer: partial(workers[peer].ask, "seconds") for peer in row.gigabytes}
    row.milliseconds.update(in_turn(clocks, TURN))
    for worker in workers.values():
        worker.end()
    return row


def _look(row: ModelRow, peer: str, worker: Worker, truth: Path) -> None:
    try:
        row.errors[peer], row.gigabytes[peer] = worker.ask("error", truth), worker.ask("peak")
    except Absent as reason:
        row.absent[peer] = str(reason)


def _exact(name: str, path: Path) -> Answers:
    """Writes the output of the first batch in float64."""
    model, given = ModelCase(name, training=False).make()
    with torch.no_grad():
        out = model.double()(**{key: x[:1] for key, x in given.items()}).last_hidden_state
    torch.save(out.cpu(), path)
    return {}


def _prepared(case: ModelCase, peer: str) -> Answers:
    """Compiled and called; what is not held is given back, since all processes share the GPU."""
    # the processes are the parallelism
    torch._inductor.config.compile_threads = 1
    call = _step(peer, case, *case.make())
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return {"seconds": partial(seconds, call), "peak": partial(_peak, call), "error": partial(_error, call)}


def _error(call: Call, truth: Path) -> float:
    true = torch.load(truth)
    return float((call()[:1].detach().double().cpu() - true).norm() / true.norm())


def _step(peer: str, case: ModelCase, model: nn.Module, given: dict[str, Tensor]) -> Call:
    written, backend = PEERS[peer]
    cast("Any", model).set_attn_implementation(written)
    compiled = torch.compile(model, backend=backend, dynamic=False)

    def forward() -> Tensor:
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


def as_line(row: ModelRow) -> str:
    """One row, as soon as it is known."""
    figures = (f"{peer} {_cell(row, peer)}" for peer in PEERS)
    return f"{row.case}: {'; '.join(figures)} (milliseconds, GB, error)"


def _cell(row: ModelRow, peer: str) -> str:
    if peer not in row.milliseconds:
        return "-"
    return f"{row.milliseconds[peer]:.1f} {row.gigabytes[peer]:.1f} {row.errors[peer]:.0e}"


def targets(rows: list[ModelRow]) -> list[Target]:
    """As fast as the model rewritten by hand, and no more memory."""
    found = []
    for row in rows:
        for what, figures in (("time", row.milliseconds), ("memory", row.gigabytes)):
            by_hand = [figures[peer] for peer in PEERS if peer != OURS and peer in figures]
            if by_hand and OURS in figures:
                found.append(Target(f"{what} / by hand", figures[OURS] / min(by_hand), 1.0, where=str(row.case)))
    return found
