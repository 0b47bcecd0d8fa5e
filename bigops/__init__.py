"""bigops: fused, quantised and sparse linear layers for PyTorch that really are faster."""

__version__ = "0.1.0"
