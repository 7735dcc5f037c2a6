"""What a shadow or a canary of a running service shows: read from its counters, while others send the traffic."""
