"""PLLaVA inside MindIE: the plugin for MindIE's model library atb_llm, its installation, configuration and checks.

Only the command line imports this package, and only this package imports `atb_llm`.
"""
