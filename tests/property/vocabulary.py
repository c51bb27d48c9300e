"""The words of which hand-written attention is made: for each axis of variation, a table of spellings.

Names in the templates: ``B H M N D E`` are batch, query heads, rows, keys, depth and value depth, ``K`` key heads
(``A`` a second batch dimension). ``{x}`` is the tensor at hand, ``{c}`` a constant and ``{r}`` its inverse. To add a
spelling, add a line here; when it does not fit everywhere, say so in :mod:`menu`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "ADD",
    "APPLY",
    "ARRIVE",
    "CALLED_MASK",
    "DROPOUT",
    "HEADS",
    "KEY_T",
    "LEAVE",
    "OTHER_WEIGHTS",
    "PRODUCT",
    "SCALE",
    "SINK",
    "SOFTCAP",
    "SOFTMAX",
    "TERMS",
    "UNREAD",
    "WEIGHTED",
    "Arrive",
    "Term",
    "Weighted",
]


@dataclass(frozen=True)
class Arrive:
    """How query, key and value are passed: ``outside`` makes the argument, ``inside`` undoes it, ``axes`` result."""

    axes: tuple[str, str, str] = ("bhmd", "bknd", "bkne")
    outside: tuple[str, str, str] = ("{x}", "{x}", "{x}")
    inside: str = ""


def _all(outside: str) -> tuple[str, str, str]:
    return outside, outside, outside


_SWAPPED = _all("{x}.transpose(1, 2).contiguous()")
_PACKED = _all("{x}.transpose(1, 2).flatten(2)")

ARRIVE = {
    "bhmd": Arrive(),
    "abhmd": Arrive(("abhmd", "abknd", "abkne")),
    "bmhd transposed": Arrive(outside=_SWAPPED, inside="{x}.transpose(1, 2)"),
    "bmhd permuted": Arrive(outside=_SWAPPED, inside="{x}.permute(0, 2, 1, 3)"),
    "bmhd raw": Arrive(("bmhd", "bnkd", "bnke"), outside=_SWAPPED),
    "packed unflattened": Arrive(outside=_PACKED, inside="{x}.unflatten(-1, ({heads}, -1)).transpose(1, 2)"),
    "packed viewed": Arrive(outside=_PACKED, inside="{x}.view(B, -1, {heads}, {depth}).transpose(1, 2)"),
    "key transposed": Arrive(("bhmd", "bkdn", "bkne"), outside=("{x}", "{x}.mT.contiguous()", "{x}")),
    "flat": Arrive(("xmd", "xnd", "xne"), outside=_all("{x}.flatten(0, 1)")),
    "flat sequence first": Arrive(
        ("xmd", "xnd", "xne"), _all("{x}.flatten(0, 1).transpose(0, 1).contiguous()"), inside="{x}.transpose(0, 1)"
    ),
}

#: Key and value heads repeated up to the query's; ``{i}`` is the position of the head dimension.
HEADS = {
    "same": "",
    "repeat_interleave": "{x}.repeat_interleave(H // K, dim={i})",
    "expand, flatten": "{x}.unsqueeze({i} + 1).expand({sizes}).flatten({i}, {i} + 1)",
    "expand, reshape": "{x}[:, :, None].expand(B, K, H // K, N, {depth}).reshape(B, H, N, {depth})",
    "grouped": "",
    "enable_gqa": "",
}

#: The mask that a call of scaled_dot_product_attention is given: ``{keep}`` is what is kept, ``{bias}`` what is added.
CALLED_MASK = {
    "none": "",
    "is_causal": "is_causal=True",
    "bool": "attn_mask={keep}",
    "where": "attn_mask=torch.where({keep}, 0.0, float('-inf')).to(q.dtype)",
    "zeros": "attn_mask=torch.zeros_like({keep}, dtype=q.dtype).masked_fill(~({keep}), float('-inf'))",
    "bias": "attn_mask={bias}",
    "bias, filled": "attn_mask=torch.where({keep}, {bias}, float('-inf'))",
    "bias, added": "attn_mask={bias} + torch.where({keep}, 0.0, float('-inf')).to(q.dtype)",
}

KEY_T = {
    "transpose": "{x}.transpose(-2, -1)",
    "transpose reversed": "{x}.transpose(-1, -2)",
    "mT": "{x}.mT",
    "swapaxes": "{x}.swapaxes(-1, -2)",
    "movedim": "{x}.movedim(-1, -2)",
    "permute": "{x}.permute(0, 1, 3, 2)",
    "transpose positive": "{x}.transpose(2, 3)",
    "contiguous": "{x}.transpose(-2, -1).contiguous()",
}

#: The first contraction and the layout its scores are in: four, flat, grouped or turned (keys before rows).
PRODUCT = {
    "matmul": ("torch.matmul(q, {kt})", "four"),
    "@": ("q @ {kt}", "four"),
    "einsum": ("torch.einsum('{q},{k}->{s}', q, k)", "four"),
    "einsum renamed": ("torch.einsum('{q_renamed},{k_renamed}->{s_renamed}', q, k)", "four"),
    "einsum swapped": ("torch.einsum('{k},{q}->{s}', k, q)", "four"),
    "sum of product": ("(q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)", "four"),
    "bmm viewed": ("torch.bmm({q3}, {k3t}).view(B, H, M, N)", "four"),
    "bmm": ("torch.bmm({q3}, {k3t})", "flat"),
    "baddbmm": ("torch.baddbmm({add}, {q3}, {k3t}, beta={beta}, alpha={alpha})", "flat"),
    "baddbmm viewed": ("torch.baddbmm({add}, {q3}, {k3t}, beta={beta}, alpha={alpha}).view(B, H, M, N)", "four"),
    "grouped": ("q.unflatten(1, (K, H // K)) @ k.unsqueeze(2).mT", "grouped"),
    "grouped viewed": ("(q.view(B, K, H // K, M, D) @ k.unsqueeze(2).mT).view(B, H, M, N)", "four"),
    "grouped einsum": ("torch.einsum('bkgmd,bknd->bkgmn', q.unflatten(1, (K, H // K)), k)", "grouped"),
    "turned": ("k @ q.mT", "turned"),
    "turned einsum": ("torch.einsum('{q},{k}->{s_turned}', q, k)", "turned"),
}

SCALE = {
    "none": "",
    "after": "scores = scores * {c}",
    "before scores": "scores = {c} * scores",
    "torch.mul": "scores = torch.mul(scores, {c})",
    "divided": "scores = scores / {r}",
    "torch.div": "scores = torch.div(scores, {r})",
    "in place": "scores *= {c}",
    "mul_": "scores = scores.mul_({c})",
    "div_": "scores.div_({r})",
    "full": "scores = scores * torch.full((), {c}, dtype=scores.dtype)",
    "on q": "q = q * {c}",
    "on k": "k = k * {c}",
    "q divided": "q = q / {r}",
    "on both": "q, k = q * {root}, k * {root}",
    "alpha": "",
}

SOFTCAP = {
    "none": "",
    "tanh": "scores = {c} * torch.tanh(scores / {c})",
    "method": "scores = (scores / {c}).tanh() * {c}",
    "multiplied": "scores = torch.tanh(scores * {r}) * {c}",
    "stepwise": "scores = scores / {c}\nscores = torch.tanh(scores)\nscores = scores * {c}",
    "in place": "scores.div_({c}).tanh_().mul_({c})",
}

#: How a bias term is added to the scores.
ADD = {
    "after": "scores = scores + {x}",
    "before": "scores = {x} + scores",
    "torch.add": "scores = torch.add(scores, {x})",
    "alpha": "scores = torch.add(scores, {x} / 2, alpha=2)",
    "minus": "scores = scores - (-{x})",
    "in place": "scores += {x}",
    "add_": "scores.add_({x})",
    "beta": "",
}

#: How a mask reaches the scores; ``{x}`` is the name of what is true where a key is kept.
APPLY = {
    "masked_fill": "scores = scores.masked_fill(~{x}, {fill})",
    "masked_fill equals 0": "scores = scores.masked_fill({x} == 0, {fill})",
    "logical_not": "scores = torch.masked_fill(scores, torch.logical_not({x}), {fill})",
    "masked_fill_": "scores.masked_fill_(~{x}, {fill})",
    "where": "scores = torch.where({x}, scores, {fill})",
    "where dropped": "scores = torch.where(~{x}, {fill}, scores)",
    "where method": "scores = scores.where({x}, {fill})",
    "where full": "scores = torch.where({x}, scores, torch.full((), {fill}, dtype=scores.dtype))",
    "where tensor": "scores = torch.where({x}, scores, torch.full_like(scores, {fill}))",
    "added where": "scores = scores + torch.where({x}, 0.0, {fill}).to(scores.dtype)",
    "added zeros": "scores = scores + torch.zeros_like({x}, dtype=scores.dtype).masked_fill(~{x}, {fill})",
    "added zeros in place": "scores += torch.zeros_like({x}, dtype=scores.dtype).masked_fill_(~{x}, {fill})",
    "added 1 - mask": "scores = scores + (1.0 - {x}.to(scores.dtype)) * {fill}",
    "added inverted": "scores = scores + (~{x}).to(scores.dtype) * {fill}",
}

#: ``{wide}`` is the dtype that half-precision scores are widened to.
SOFTMAX = {
    "functional": "weights = F.softmax(scores, dim={dim})",
    "torch": "weights = torch.softmax(scores, dim={dim})",
    "method": "weights = scores.softmax({dim})",
    "positive dim": "weights = F.softmax(scores, dim=scores.dim() + {dim})",
    "module": "weights = nn.Softmax(dim={dim})(scores)",
    "wide dtype": "weights = F.softmax(scores, dim={dim}, dtype={wide}).to(v.dtype)",
    "wide scores": "weights = torch.softmax(scores.to({wide}), dim={dim}).type_as(v)",
    "by hand": (
        "weights = torch.exp(scores - scores.amax({dim}, keepdim=True))\n"
        "weights = weights / weights.sum({dim}, keepdim=True)"
    ),
    "by hand, max": (
        "peak, _ = scores.max(dim={dim}, keepdim=True)\n"
        "weights = (scores - peak).exp()\n"
        "weights = weights / weights.sum(dim={dim}, keepdim=True)"
    ),
    "exp of log_softmax": "weights = F.log_softmax(scores, dim={dim}).exp()",
    "shifted": "weights = F.softmax(scores - scores.amax({dim}, keepdim=True), dim={dim})",
    "late division": (
        "weights = torch.exp(scores - scores.amax({dim}, keepdim=True))\ntotal = weights.sum({dim}, keepdim=True)"
    ),
}

#: What makes weights otherwise, by the name that :mod:`recipe` has for it.
OTHER_WEIGHTS = {
    "safe softmax": {"safe": "weights = torch.ops.aten._safe_softmax(scores, {dim})"},
    "sigmoid": {
        "sigmoid": "weights = torch.sigmoid(scores)",
        "sigmoid method": "weights = scores.sigmoid()",
        "sigmoid in place": "weights = scores.sigmoid_()",
        "sigmoid module": "weights = nn.Sigmoid()(scores)",
    },
    "squared relu": {
        "relu ** 2": "weights = F.relu(scores) ** 2",
        "relu, square": "weights = scores.relu().square()",
        "relu * relu": "weights = F.relu(scores)\nweights = weights * weights",
        "relu, pow": "weights = torch.pow(torch.relu(scores), 2)",
    },
}

#: A column of the sinks joined to the scores, and cut off after the softmax; ``{x}`` is the column.
SINK = {
    "none": ("", ""),
    "last": ("scores = torch.cat([scores, {x}], dim=-1)", "weights = weights[..., :-1]"),
    "last, less the maximum": (
        "scores = torch.cat([scores, {x}], dim=-1)\nscores = scores - scores.max(dim=-1, keepdim=True).values",
        "weights = weights[..., :-1]",
    ),
    "first": ("scores = torch.cat([{x}, scores], dim=-1)", "weights = weights[..., 1:]"),
    "narrowed": ("scores = torch.cat([scores, {x}], dim=-1)", "weights = weights.narrow(-1, 0, N)"),
}

DROPOUT = {
    "none": "",
    "p = 0": "weights = F.dropout(weights, p=0.0, training=True)",
    "evaluating": "weights = F.dropout(weights, 0.1, training=False)",
    "module": "weights = nn.Dropout(0.1).eval()(weights)",
}


@dataclass(frozen=True)
class Weighted:
    """The second contraction of scores in ``layout``, then back to ``axes``."""

    contract: str
    layout: str
    restore: str = "out"
    axes: str = "bhme"


WEIGHTED = {
    "matmul": Weighted("torch.matmul(weights, v)", "four"),
    "@": Weighted("weights @ v", "four"),
    "einsum": Weighted("torch.einsum('{s},{v}->{o}', weights, v)", "four"),
    "einsum swapped": Weighted("torch.einsum('{v},{s}->{o}', v, weights)", "four"),
    "einsum to bmhe": Weighted("torch.einsum('bhmn,{v}->bmhe', weights, v)", "four", axes="bmhe"),
    "bmm": Weighted("torch.bmm(weights.flatten(0, 1), {v3})", "four", "out.view(B, H, M, E)"),
    "turned product": Weighted("(v.mT @ weights.mT).mT", "four"),
    "sum of product": Weighted("(weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)", "four"),
    "flat bmm": Weighted("torch.bmm(weights, {v3})", "flat", "out.view(B, H, M, E)"),
    "flat @": Weighted("weights @ {v3}", "flat", "out.unflatten(0, (B, H))"),
    "grouped": Weighted("weights @ v.unsqueeze(2)", "grouped", "out.flatten(1, 2)"),
    "grouped from four": Weighted("weights.unflatten(1, (K, H // K)) @ v.unsqueeze(2)", "four", "out.flatten(1, 2)"),
    "grouped einsum": Weighted("torch.einsum('bkgmn,bkne->bkgme', weights, v)", "grouped", "out.flatten(1, 2)"),
    "turned": Weighted("weights.mT @ v", "turned"),
    "turned transposed": Weighted("(v.mT @ weights).mT", "turned"),
    "turned einsum": Weighted("torch.einsum('{s_turned},{v}->{o}', weights, v)", "turned"),
}

#: What is done with the result, an expression of ``out [B, H, M, E]``.
LEAVE = {
    "as is": "out",
    "contiguous": "out.contiguous()",
    "transposed": "out.transpose(-3, -2)",
    "merged": "out.transpose(1, 2).reshape(B, M, H * E)",
    "merged contiguous": "out.transpose(1, 2).contiguous().view(B, M, H * E)",
    "permuted": "out.permute(2, 0, 1, 3)",
    "flattened": "out.flatten(-2)",
}


@dataclass(frozen=True)
class Term:
    """A bias or a mask as an expression; ``outside`` makes an argument from the full-rank capture ``{x}``."""

    inside: str
    outside: dict[str, str] = field(default_factory=dict)
    any_batch: bool = False


_ALONG_HEADS = {"slopes": "{x}.flatten()"}
_PADDING = {"padding": "{x}[:, 0, 0]"}
_IDS = {"row_ids": "{x}[:, 0, :, 0]", "key_ids": "{x}[:, 0, 0]"}
_ONES = "torch.ones(M, N, dtype=torch.bool)"


def _captured(name: str, **others: Term) -> dict[str, Term]:
    return {"whole": Term(name, any_batch=True), **others}


#: Each part's spellings. ``{v}`` is the part's constant.
TERMS: dict[str, dict[str, Term]] = {
    "bias_bhmn": _captured("bias"),
    "bias_hmn": _captured(
        "bias",
        rank3=Term("bias", {"bias": "{x}[0]"}),
        unsqueezed=Term("bias.unsqueeze(0)", {"bias": "{x}[0]"}),
        expanded=Term("bias.unsqueeze(0).expand(B, -1, -1, -1)", {"bias": "{x}[0]"}),
        heads_last=Term("bias.permute(2, 0, 1)", {"bias": "{x}[0].permute(1, 2, 0).contiguous()"}),
    ),
    "bias_mn": _captured(
        "bias",
        rank2=Term("bias", {"bias": "{x}[0, 0]"}),
        viewed=Term("bias.view(1, 1, M, N)", {"bias": "{x}[0, 0]"}),
        indexed=Term("bias[None, None]", {"bias": "{x}[0, 0]"}),
    ),
    "bias_bn": _captured(
        "bias",
        viewed=Term("bias[:, None, None, :]", {"bias": "{x}[:, 0, 0]"}),
        expanded=Term("bias[:, None, None, :].expand(B, 1, M, N)", {"bias": "{x}[:, 0, 0]"}),
    ),
    "alibi_keys": {
        "arange": Term("slopes[:, None, None] * torch.arange(N)", _ALONG_HEADS, any_batch=True),
        "viewed": Term("slopes.view(1, H, 1, 1) * torch.arange(N).view(1, 1, 1, N)", _ALONG_HEADS),
        "float": Term("torch.arange(N, dtype=slopes.dtype) * slopes[:, None, None]", _ALONG_HEADS, any_batch=True),
        "outer": Term("torch.outer(slopes, torch.arange(N, dtype=slopes.dtype)).view(1, H, 1, N)", _ALONG_HEADS),
    },
    "alibi_distance": {
        "difference": Term(
            "slopes[:, None, None] * (torch.arange(N)[None, :] - torch.arange(M)[:, None])", _ALONG_HEADS, True
        ),
        "negated": Term(
            "-slopes.view(-1, 1, 1) * (torch.arange(M).unsqueeze(1) - torch.arange(N).unsqueeze(0))",
            _ALONG_HEADS,
            any_batch=True,
        ),
    },
    "causal": {
        "tril": Term(f"torch.tril({_ONES}, diagonal={{v}})", any_batch=True),
        "tril method": Term(f"{_ONES}.tril({{v}})", any_batch=True),
        "tril of floats": Term("torch.tril(torch.ones(M, N), {v}) == 1", any_batch=True),
        "tril viewed": Term(f"{_ONES}.tril({{v}}).view(1, 1, M, N)"),
        "tril sliced": Term("torch.ones(N, N, dtype=torch.bool).tril()[N - M : N, :N]", any_batch=True),
        "not triu": Term(f"~torch.triu({_ONES}, diagonal={{v}} + 1)", any_batch=True),
        "triu is 0": Term("torch.ones(M, N).triu(diagonal={v} + 1) == 0", any_batch=True),
        "<=": Term("torch.arange(N)[None, :] <= torch.arange(M)[:, None] + {v}", any_batch=True),
        ">=": Term("torch.arange(M)[:, None] + {v} >= torch.arange(N)[None, :]", any_batch=True),
        "<": Term("torch.arange(N) < torch.arange(M).unsqueeze(-1) + ({v} + 1)", any_batch=True),
        "not >": Term("~(torch.arange(N)[None, :] > torch.arange(M)[:, None] + {v})", any_batch=True),
        "difference": Term("torch.arange(M)[:, None] - torch.arange(N)[None, :] >= -({v})", any_batch=True),
        "positions": Term("torch.arange({v}, M + {v}).view(-1, 1) >= torch.arange(N)", any_batch=True),
        "gathered": Term(f"{_ONES}.tril({{v}})[torch.arange(M)]", any_batch=True),
    },
    "window": {
        "triu": Term(f"torch.triu({_ONES}, diagonal={{v}})", any_batch=True),
        "not tril": Term(f"~{_ONES}.tril({{v}} - 1)", any_batch=True),
        ">=": Term("torch.arange(N)[None, :] >= torch.arange(M)[:, None] + {v}", any_batch=True),
        ">": Term("torch.arange(N)[None, :] > torch.arange(M)[:, None] + ({v} - 1)", any_batch=True),
        "distance": Term("torch.arange(M)[:, None] - torch.arange(N)[None, :] <= -({v})", any_batch=True),
    },
    "padding_bool": _captured(
        "padding",
        indexed=Term("padding[:, None, None, :]", _PADDING),
        viewed=Term("padding.view(B, 1, 1, N)", _PADDING),
        unsqueezed=Term("padding.unsqueeze(1).unsqueeze(2)", _PADDING),
        expanded=Term("padding[:, None, None, :].expand(B, 1, M, N)", _PADDING),
    ),
    "padding_int64": {
        "!=": Term("padding[:, None, None, :] != 0", _PADDING),
        "bool": Term("padding.bool()[:, None, None, :]", _PADDING),
        "to": Term("padding[:, None, None, :].to(torch.bool)", _PADDING),
        "not ==": Term("~(padding[:, None, None, :] == 0)", _PADDING),
    },
    "allowed_mn": _captured("allowed", rank2=Term("allowed", {"allowed": "{x}[0, 0]"})),
    "allowed_bmn": _captured("allowed", unsqueezed=Term("allowed.unsqueeze(1)", {"allowed": "{x}[:, 0]"})),
    "allowed_bhmn": _captured("allowed"),
    "document": {
        "indexed": Term("row_ids[:, None, :, None] == key_ids[:, None, None, :]", _IDS),
        "unsqueezed": Term("(row_ids.unsqueeze(-1) == key_ids.unsqueeze(-2)).unsqueeze(1)", _IDS),
        "difference": Term("(row_ids[:, None, :, None] - key_ids[:, None, None, :]) == 0", _IDS),
    },
}


#: Right programs that attnfuse does not read yet: it must leave them exactly as they are. Take a word out when it does.
UNREAD = {"sink": ("first",)}
