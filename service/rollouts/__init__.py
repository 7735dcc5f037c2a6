"""From one model to the next: a share of the traffic is also (shadow) or instead (canary) answered by a candidate."""
