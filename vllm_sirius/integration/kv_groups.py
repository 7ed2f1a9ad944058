"""What kinds of KV cache the draft can write. Reads ``vllm.v1.kv_cache_interface``."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs

from vllm_sirius.errors import SiriusUnsupportedError


def require_attention(kv_cache_config: Any) -> None:
    """Refuses a model that caches anything but the K/V of attention layers.

    A group whose layers differ in their heads holds one spec for each layer; they share a block table as the layers of any
    other group do.

    Args:
        kv_cache_config: Upstream's `KVCacheConfig`.

    Raises:
        SiriusUnsupportedError: Naming the layer and its kind of cache.
    """
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        several = isinstance(spec, UniformTypeKVCacheSpecs)
        specs = spec.kv_cache_specs if several else dict.fromkeys(group.layer_names, spec)
        for layer, one in specs.items():
            if not isinstance(one, AttentionSpec):
                raise SiriusUnsupportedError(
                    f"layer {layer!r} keeps a {type(one).__name__}: the draft writes the K/V of attention layers alone; drop "
                    "the speculative config for this model."
                )
