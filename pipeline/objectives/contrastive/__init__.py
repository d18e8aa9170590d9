"""LLaVE's hardness-weighted contrastive loss (arXiv 2503.04812) with the global batch as negatives."""
