"""Held-out evaluation: exact match beside baselines that see nothing."""
