"""manthanquant: LLM serving on a KV cache that is really 3-bit."""

__version__ = "0.1.0"
