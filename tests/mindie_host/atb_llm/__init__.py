"""A stand-in for MindIE's atb_llm: what the plugin uses of it, and its strictness. See tests/mindie/test_plugin.py.

Written from the host's behaviour, odd parts included, so that a call the host would reject, or silently get wrong,
fails here. It computes in float32 on the CPU, with this package's own decoder where the host has its compiled graph.
"""
