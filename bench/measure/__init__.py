"""What is timed, how, and the file that comes of it."""
