"""What tools/docs/fill.py writes: tables of recorded runs and of the code, and figures."""
