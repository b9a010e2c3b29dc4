"""Text from decoders: sampling, caches that know their tokens, drafts, streams, conversations."""
