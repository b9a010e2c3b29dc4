"""What changes a model: the pass contract, the pipeline that enforces it, and the families of passes."""
