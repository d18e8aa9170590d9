"""LLM2CLIP's text encoder (arXiv 2411.04997): a decoder with bidirectional attention."""
