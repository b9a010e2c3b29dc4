"""The way in for Hugging Face models: a local folder or a live model, with example inputs made for it."""

from graphwright.frontends.huggingface.decoders import load_decoder
from graphwright.frontends.huggingface.examples import make_examples
from graphwright.frontends.huggingface.loading import load_huggingface, load_model, load_with_examples

__all__ = ["load_decoder", "load_huggingface", "load_model", "load_with_examples", "make_examples"]
