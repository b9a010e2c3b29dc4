"""How the attention of transformers' causal language models is led over a cache while a step is traced."""
