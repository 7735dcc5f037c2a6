"""The whole labelled set over HTTP."""
