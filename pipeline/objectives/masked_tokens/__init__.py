"""Masked next-token prediction (LLM2Vec, arXiv 2404.05961): a decoder learns to attend both ways."""
