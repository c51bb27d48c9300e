"""attnfuse as a peer for tools that count the attention in models: ``--peer attnfuse=peer:fuse``, scripts on the path.

Models for such counts are tiny, and no kernel pays on them: what is counted here is what can be fused, not what pays.
"""

from __future__ import annotations

from functools import partial

from attnfuse import fuse_graph

fuse = partial(fuse_graph, profit=False)
