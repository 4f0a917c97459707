"""`python -m bench.gpu`: what is owed on a GPU, in one command."""
