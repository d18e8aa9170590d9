"""CLIP with both towers trained (arXiv 2103.00020), the baseline for LLM2CLIP."""
