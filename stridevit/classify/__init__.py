"""The command `stridevit classify`: files on disk, classified by a service, to lines or a table."""
