"""LLaVE: LLaVA-OneVision as an embedder (arXiv 2503.04812)."""
