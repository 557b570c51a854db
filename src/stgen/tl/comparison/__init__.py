"""Compare models on one split."""
