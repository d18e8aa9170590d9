"""Demo data: synthetic scenes with texts, generated from one seed, so the examples run without downloads."""
