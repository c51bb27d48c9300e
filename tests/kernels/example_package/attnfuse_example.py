"""A kernel for attnfuse, in a package of its own."""

import torch

from attnfuse import Kernel, Operands, kernel
from attnfuse.reference import attention


@kernel
class HeadByHead(Kernel):
    """One query head at a time: the scores of one head are all the memory it takes."""

    name = "head_by_head"
    devices = ("cpu",)

    def refuses(self, problem, target):
        reasons = []
        if not problem.plain or problem.spec.captures or problem.spec.symbols:
            reasons.append("computes a softmax of scaled scores and nothing else")
        if problem.training:
            reasons.append("has no backward")
        return tuple(reasons)

    def cost(self, problem, target):
        # seconds, by a model; `attnfuse tune` corrects it on the machine where it runs
        return problem.flops / 1e12

    def run(self, spec, operands):
        query, key, value = operands.qkv
        groups = query.shape[-3] // key.shape[-3]
        heads = []
        for head in range(query.shape[-3]):
            mine, shared = slice(head, head + 1), slice(head // groups, head // groups + 1)
            one = Operands(query[..., mine, :, :], key[..., shared, :, :], value[..., shared, :, :])
            heads.append(attention(spec, one)[0])
        return torch.cat(heads, dim=-3)
