"""PLLaVA inside MindIE: its plugin for the ATB model library, and what installs, configures and examines it.

Nothing outside of this package imports it but the command line, and no other package knows of `atb_llm`.
"""
