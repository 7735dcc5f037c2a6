"""Compare models under load, over HTTP only; `python -m loadtests --help` is the manual."""
