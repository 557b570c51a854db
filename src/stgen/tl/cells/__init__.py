"""Cells, cell types and domains."""
