"""attnfuse: finds hand-written attention in PyTorch graphs and fuses it."""
