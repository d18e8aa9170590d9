"""Masked next-token prediction (LLM2Vec, arXiv 2404.05961), which adapts a decoder to bidirectional attention."""
