"""Models that take traffic: loaded, proven, exchanged, chosen."""
