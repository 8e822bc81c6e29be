"""Deciding which codec each weight gets."""
