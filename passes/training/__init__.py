"""What training a program takes."""

from graphwright.passes.training.memory import TrainingMemory, training_memory

__all__ = ["TrainingMemory", "training_memory"]
