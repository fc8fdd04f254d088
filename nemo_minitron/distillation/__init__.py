"""Losses between teacher and student and the teacher's forward pass."""
