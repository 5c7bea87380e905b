"""Round to nearest: scales from each group's extremes, no data."""
