"""A results file as tables and pictures; `check`, which compares with bench/baseline.json."""
