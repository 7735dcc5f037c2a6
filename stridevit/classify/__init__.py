"""The command `stridevit classify`: from files on disk to lines or a table, by a service."""
