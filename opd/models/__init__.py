"""Models and tokenizers: loading, the forward pass, chat formats, fingerprints, sharded weights."""
