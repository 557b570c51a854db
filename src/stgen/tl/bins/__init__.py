"""Bins of maps as tables, for what reads AnnData, and back."""
