"""What changes a model: the pass contract, the pipeline, and one folder per family of passes."""
