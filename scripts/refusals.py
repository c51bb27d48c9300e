"""The refusals in the reports of many models that are known to be just, as a page.

``attnfuse explain --json``, ``attnfuse rewrite --report`` and ``Report.to_json`` write reports; name each file
after its model::

    python scripts/refusals.py reports/*.json > tests/models/REFUSALS.md

Names every other refusal on the standard error and exits with 1: it is a spelling to be read, or a bug.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

_RECURRENCE = "a recurrence over chunks (gated delta rule, xLSTM): its states are products too, and no attention"

#: Why a refusal is just, by how its reason begins.
JUST: dict[str, str] = {
    "the attention weights are returned": "scores of pairs, which are the result: there is no softmax and no value",
    "the attention weights are also used by zeros_like": _RECURRENCE,
    "the attention weights are also used by matmul": _RECURRENCE,
    "the attention weights are also used by sum": _RECURRENCE,
    "the attention scores are also used by transpose": "the scores are wanted, by a second softmax over the other side",
    "the attention scores are also used by masked_fill_": "they are wanted by a second softmax over the other side",
    "what is done with the scores needs all of them": "the logits hold a reduction of the scores other than a shift",
    "there is a single key": "a softmax over one key is 1 whatever the scores: there is nothing to compute",
    "the softmax runs over another axis": "each key is shared out among the queries: no attention over keys",
    "a softmax of which an inner part is used": "two products share one softmax, side by side, and part after it",
    "the weights go through pad": (
        "windows that overlap are computed chunk by chunk and skewed into one another (Longformer)"
    ),
    "the product with the values cannot be read": "the weights of a learned vector multiply no product of keys",
    "the graph cannot be traced: DataDependentOutput": "a size depends on data; no attention is in these graphs",
}

Reports = Annotated[list[Path], typer.Argument(help="reports as JSON, named after their models")]
About = Annotated[str, typer.Option(help="what the models are, in a sentence for the page")]

_NUMBER = re.compile(r"_\d+\b")


@dataclass
class Refused:
    """One reason, how often it was given, and for which models."""

    sites: int = 0
    models: set[str] = field(default_factory=set)


def refusals(reports: Reports, about: About = "") -> None:
    """Print the just refusals of REPORTS by reason, as Markdown; exit with 1 when there is another."""
    found, fused = collected(reports)
    sys.stdout.writelines(f"{line}\n" for line in document(found, fused, len(reports), about))
    strange = [reason for reason in found if why(reason) is None]
    for reason in strange:
        sys.stderr.write(f"not known to be just: {reason} ({', '.join(sorted(found[reason].models))})\n")
    raise typer.Exit(1 if strange else 0)


def collected(reports: list[Path]) -> tuple[dict[str, Refused], int]:
    """The refusals by reason, and how many sites were fused."""
    found: dict[str, Refused] = defaultdict(Refused)
    fused = 0
    for file in reports:
        for site in json.loads(file.read_text())["sites"]:
            if site["fused"]:
                fused += 1
                continue
            refused = found[_NUMBER.sub("", site["reason"])]
            refused.sites += 1
            refused.models.add(file.stem)
    return found, fused


def why(reason: str) -> str | None:
    """Why a refusal is just; None where that is not known."""
    return next((text for start, text in JUST.items() if reason.startswith(start)), None)


def document(found: dict[str, Refused], fused: int, models: int, about: str) -> Iterator[str]:
    """The page, the commonest reason first."""
    just = {reason: one for reason, one in found.items() if why(reason)}
    yield "# Attention that is left as it is\n"
    yield f"Written by `scripts/refusals.py` from one report a model. {about}".strip()
    refused = sum(one.sites for one in just.values())
    yield f"In {models} models {fused} sites are fused and {refused} refused, as follows.\n"
    yield "| sites | the refusal | why it is just | models |"
    yield "|---|---|---|---|"
    for reason, one in sorted(just.items(), key=lambda item: (-item[1].sites, item[0])):
        yield f"| {one.sites} | {reason} | {why(reason)} | {', '.join(sorted(one.models))} |"


if __name__ == "__main__":
    typer.run(refusals)
