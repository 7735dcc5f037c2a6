"""The service against its engine's limit and a plain server."""
