"""What GPUs of all vendors share: what attention costs there, and the kernels that their libraries bring."""
