"""Benchmarks of backbones in detectors and segmentors."""
