"""`make deploy-check`: what is in deploy/, checked as far as it can be without a cluster."""
