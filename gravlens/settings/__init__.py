"""Histories that gravlens can make itself, one per file."""
