"""Benchmarks: accuracy first, then time against eager PyTorch, ``torch.compile`` and peers."""
