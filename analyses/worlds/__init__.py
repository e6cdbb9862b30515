"""Histories whose truth is known, for calibrating the verdict."""
