"""Modules that torch.onnx exports: complete detectors and segmentors, and their parts."""
