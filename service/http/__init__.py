"""HTTP: routes, bodies, tensors, keys, errors as answers."""
