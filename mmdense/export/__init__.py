"""Modules that torch.onnx exports: complete models, and their parts."""
