"""A stand-in for the part of MindIE's atb_llm that the plugin uses. See tests/mindie/test_plugin.py.

The stand-in behaves as MindIE does, quirks included. A call that MindIE would reject or compute wrongly fails here. It
computes in float32 on the CPU, with this package's decoder in the place of MindIE's compiled graph.
"""
