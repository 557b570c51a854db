"""Fit models."""
