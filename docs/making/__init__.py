"""What docs/fill.py writes: tables from recorded runs and from the code's own tables, pictures."""
