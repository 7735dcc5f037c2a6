"""More requests than a model can answer."""
