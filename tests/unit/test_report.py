"""Reports: what a reader and a program are told about each site."""

from __future__ import annotations

import json
from dataclasses import replace

from attnfuse.errors import Refused
from attnfuse.report import Certificate, Fused, Report, grouped
from attnfuse.spec import AttentionSpec


def fused(node: str, what: str = "scale 0.125, causal") -> Fused:
    certificate = Certificate(seed=3, inputs=("normal", "large logits"), source_max=2e-7, fused_max=1e-7)
    return Fused(
        node=node,
        source="model.py:12, out = weights @ v",
        spec=AttentionSpec().to_text(),
        what=what,
        shape="[2, 4, 128, 64]",
        kernel="sdpa",
        seconds={"kernel": 0.001, "unfused": 0.004},
        certificate=certificate,
    )


ESCAPES = Refused("the weights are returned", "softmax", "model.py:9, softmax(s)", "return the output alone")


def test_sites_are_told_apart_and_counted() -> None:
    report = Report((fused("a"), ESCAPES, fused("b")))
    assert [site.node for site in report.fused] == ["a", "b"]
    assert report.refused == (ESCAPES,)
    assert str(report).splitlines()[0] == "attention sites: 3, fused: 2, refused: 1"


def test_equal_sites_share_a_line_in_order_of_first_appearance() -> None:
    report = Report((fused("a"), fused("b", "plain"), ESCAPES, fused("c"), fused("d")))
    assert str(report).splitlines()[1:] == [
        "    3 x fused    scale 0.125, causal [2, 4, 128, 64] -> sdpa  (a ... d)",
        "    1 x fused    plain [2, 4, 128, 64] -> sdpa  (b)",
        "    1 x refused  the weights are returned at model.py:9, softmax(s); return the output alone  (softmax)",
    ]


def test_a_refusal_without_source_or_remedy_is_its_reason() -> None:
    assert str(Report((Refused("a dimension is empty", "mm"),))).splitlines()[1] == (
        "    1 x refused  a dimension is empty  (mm)"
    )


def test_layers_share_a_line_though_their_nodes_are_numbered() -> None:
    layers = [replace(ESCAPES, reason=f"the scores are also used by add_{n}", node=f"softmax_{n}") for n in range(24)]
    (line,) = str(Report(tuple(layers))).splitlines()[1:]
    assert line.startswith("   24 x refused  the scores are also used by add_0 at model.py:9")
    assert line.endswith("(softmax_0 ... softmax_23)")
    assert grouped([*layers, fused("a"), fused("b")])[1] == [fused("a"), fused("b")]


def test_an_empty_report_says_so() -> None:
    assert str(Report()) == "attention sites: 0, fused: 0, refused: 0"
    assert json.loads(Report().to_json()) == {"target": "cpu", "stages": {}, "sites": [], "regions": []}


def test_json_carries_everything() -> None:
    raw = json.loads(Report((fused("a"), ESCAPES), "cuda:sm90", {"lift": 0.25}).to_json())
    assert raw["target"] == "cuda:sm90"
    assert raw["stages"] == {"lift": 0.25}
    first, second = raw["sites"]
    assert first["fused"] is True
    assert AttentionSpec.from_text(first["spec"]) == AttentionSpec()
    assert first["certificate"]["inputs"] == ["normal", "large logits"]
    assert first["seconds"] == {"kernel": 0.001, "unfused": 0.004}
    assert second == {
        "fused": False,
        "reason": "the weights are returned",
        "node": "softmax",
        "source": "model.py:9, softmax(s)",
        "remedy": "return the output alone",
    }


def test_reports_of_one_program_add_up() -> None:
    first = Report((fused("a"),), "cpu", {"lift": 1.0, "tidy": 0.5})
    second = Report((ESCAPES,), "cpu", {"lift": 2.0, "lower": 4.0})
    total = first + second
    assert total.sites == (fused("a"), ESCAPES)
    assert total.stages == {"lift": 3.0, "tidy": 0.5, "lower": 4.0}
