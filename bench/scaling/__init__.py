"""`python -m bench scaling`: what a layer should cost, by arithmetic."""
