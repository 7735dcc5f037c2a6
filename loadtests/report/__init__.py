"""What was found: verdicts, tables, plots, pages."""
