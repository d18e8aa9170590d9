"""Demo data: synthetic scenes and texts about them, all from one seed, so that everything runs anywhere."""
