"""How a weight is stored: one file for each format."""
