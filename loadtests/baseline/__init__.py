"""Servers to measure the service against: scripts of their own, which no other module imports."""
