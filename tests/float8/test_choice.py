"""Whether products are of float8 tensors or of what the graph makes of them: as measured on one H200."""

from __future__ import annotations

import pytest
import torch

from attnfuse.kernels.triton import kernel as triton_kernel
from attnfuse.spec import AttentionSpec
from tests.float8.programs import quantised_weights
from tests.support.doors import as_module, rewritten

#: Keys and head sizes, 8192 tokens of 32 heads, and whether products of float8 are the faster.
CHOICES = {
    **{(keys, 64): keys < 4096 for keys in (512, 1024, 4096)},
    **{(keys, 128): True for keys in (512, 1024, 4096)},
    **{(keys, 256): False for keys in (512, 1024, 4096)},
}


@pytest.mark.parametrize(("keys", "width"), CHOICES)
def test_what_is_faster(keys: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To widen operands is a pass over each. At heads of 256, and of 64 with many keys, half types save more."""
    monkeypatch.setattr(triton_kernel, "_installed", tuple)
    lying = torch.empty(8192 // keys, keys, 32, width, dtype=torch.float8_e4m3fn)
    scales = (torch.ones(1, 32, 1, 1, dtype=torch.bfloat16) for _ in range(3))
    given = (*(lying.clone().transpose(1, 2) for _ in range(3)), *scales)
    report = rewritten("training IR", as_module(quantised_weights), given, target="cuda:sm90", certify="off").report
    (site,) = report.fused
    # of what the graph makes of query and key, their scales are a part
    assert len(AttentionSpec.from_text(site.spec).captures) == (3 if CHOICES[keys, width] else 1)
