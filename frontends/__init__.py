"""The ways in: torch, Hugging Face and ONNX models, and the doors a person uses (Python, command line)."""
