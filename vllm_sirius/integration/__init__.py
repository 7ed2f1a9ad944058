"""Everything that knows vLLM internals: one small module per upstream module, listed in ``patches/README.md``."""
