"""Whole runs on real data: what the README shows."""
