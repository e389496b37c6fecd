"""Trained models from an ONNX file, without torch: NumPy, Pillow, pycocotools and onnxruntime."""
