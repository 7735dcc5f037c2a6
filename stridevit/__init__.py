"""The command `stridevit`. It imports the other packages only when one of their commands is called."""
