"""LLM2CLIP: a vision encoder, and an adapter over a frozen text encoder's vectors (arXiv 2411.04997)."""
