"""Dashboard and alerts as code: `panels` and `alerts` are the source, `python -m deploy.monitoring` writes the rest."""
