"""Sharpen maps."""
