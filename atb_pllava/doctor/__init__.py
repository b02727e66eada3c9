"""Checks of a machine before a model is loaded: one line a check, with what to type about what is missing.

This folder checks what the native engine needs. `mindie.doctor` checks what MindIE needs, and `cli.doctor` puts the
checks of one engine in order.
"""
