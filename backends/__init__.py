"""The ways out: plain PyTorch, CPU kernels, Triton kernels and ONNX files."""
