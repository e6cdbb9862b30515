"""Blockers: each file has one way of taking part in a fine-tuning step."""
