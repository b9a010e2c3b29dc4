"""The ways out: plain PyTorch, CPU kernels, ONNX."""
