"""The whole workflow in one command, on digits or on your own pictures."""
