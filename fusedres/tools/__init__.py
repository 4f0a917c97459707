"""What looks at the layers from outside: `python -m fusedres` and its commands, `explain`."""
