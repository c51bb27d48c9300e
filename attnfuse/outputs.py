"""What a rewrite leaves behind: a program and its report, whole or not at all, and what is known of them."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch.export import ExportedProgram

from attnfuse import pt2
from attnfuse.atomic import replacing
from attnfuse.errors import BadInput
from attnfuse.report import Certificate, Report
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = ["check_places", "why_unverifiable", "write"]


def check_places(source: Path, *outputs: Path | None) -> None:
    """Find out before the work, not after it, that a result has nowhere to go. Raises :class:`BadInput`."""
    taken = {source.resolve(): "the input"}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in taken:
            raise BadInput(f"{path} is {taken[path.resolve()]}; choose another place for the result")
        if path.exists() and not path.is_file():
            raise BadInput(f"cannot write {path}: it is not an ordinary file")
        if not os.access(path.parent, os.W_OK):
            raise BadInput(f"cannot write {path}: {path.parent} is not a directory that can be written to")
        taken[path.resolve()] = "another output"


def why_unverifiable(report: Report, target: Target | None, *, custom_op: bool, fp8_attention: bool) -> str:
    """Why a rewritten program is not run against its source; empty where it can be."""
    # a program that quantises by itself is held to what it makes of that
    if fp8_attention and any("float8 weights" in site.what for site in report.fused):
        return "--fp8-attention rounded operands; the report says how exact each site is"
    if custom_op and target is not None and target.kind not in ("cpu", Target.current().kind):
        return f"kernels for {target} cannot run on this machine"
    return ""


def write(
    result: ExportedProgram, output: Path, report: Report, certificate: Certificate, report_path: Path | None
) -> None:
    """The program to ``output``, with its report inside and at ``report_path`` too, both or neither."""
    document = _document(report, certificate)
    with ExitStack() as stack:
        # the report is in place when the result is
        if report_path is not None:
            stack.enter_context(replacing(report_path)).write(document.encode())
        pt2.save(result, output, {"attnfuse.json": document})


def _document(report: Report, certificate: Certificate) -> str:
    """The report as JSON, with how the result was verified and by which version it was made."""
    known = {"attnfuse": __version__, **json.loads(report.to_json()), "verification": asdict(certificate)}
    return json.dumps(known, indent=1)
