"""A family of models that the project does not know: an item is the sum of its words' vectors."""
