"""What a model is: the Program, its operators, types, rewriting and tools to look at it."""
