"""Pairs are told apart from all others of the global batch: LLaVE's hardness-weighted loss (arXiv 2503.04812)."""
