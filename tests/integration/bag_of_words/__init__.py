"""A model family that is not part of the project: an item's embedding is the sum of its word vectors."""
