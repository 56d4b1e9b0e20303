"""Tokens and maps: how tokens lie on the patch grid, how the grid reaches a layer, and locality between them."""

from localvit.tokens.layouts import map_to_tokens, tokens_to_map

__all__ = ["map_to_tokens", "tokens_to_map"]
