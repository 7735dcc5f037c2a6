"""More than a model can answer."""
