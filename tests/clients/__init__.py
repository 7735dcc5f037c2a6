"""Third-party clients against a running service: `make test-clients`.

Not tests for pytest: each script runs in its own environment, which holds the client and none of our packages, from the
repository's root: `python -m tests.clients.triton_client --url http://127.0.0.1:8000 --model cifar100-csra-r2`.
"""
