"""Servers to measure the service against: standalone scripts, which no other module imports."""
