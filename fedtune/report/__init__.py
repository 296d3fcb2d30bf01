"""What one sees of a run: live progress, tables, figures."""
