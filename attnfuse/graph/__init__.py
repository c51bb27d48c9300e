"""Graphs: captured, known, written, printed, checked. The only part that touches torch.fx's untyped metadata."""
