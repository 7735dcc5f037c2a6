"""The whole way in one command, on digits or on your own pictures."""
