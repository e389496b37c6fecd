"""Weights: their formats, where they come from, and how much of a model they fill."""
