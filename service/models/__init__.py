"""Models that take traffic: loaded, verified, exchanged, chosen."""
