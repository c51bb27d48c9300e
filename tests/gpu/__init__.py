"""What only a GPU can show, beside the kernels' own tests. Run by ``pytest -m gpu``."""
