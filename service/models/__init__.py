"""Models that take traffic: loaded, verified, replaced, chosen."""
