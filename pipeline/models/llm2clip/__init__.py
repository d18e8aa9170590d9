"""LLM2CLIP: a vision encoder, and an adapter on a frozen text encoder's vectors (arXiv 2411.04997)."""
