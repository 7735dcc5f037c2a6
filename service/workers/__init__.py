"""Several processes of the service behind one port: `stridevit serve --workers`."""
