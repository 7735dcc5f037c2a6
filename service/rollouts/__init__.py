"""Moving from one model to the next: a candidate answers a share of the traffic too (shadow) or instead (canary)."""
