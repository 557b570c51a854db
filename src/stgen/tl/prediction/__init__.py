"""Predict expression of locations."""
