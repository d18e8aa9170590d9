"""CLIP, whose two towers are both trained (arXiv 2103.00020): what LLM2CLIP is compared with."""
