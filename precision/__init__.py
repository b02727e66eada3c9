"""Accuracy tests: commands that compare answers with the original's, with another device's, or with right answers.

The commands stand on the package. `atb_pllava.batch.result_log` keeps answers across kills, and
`atb_pllava.batch.run_metadata` writes the manifest of a run. `command_line.py` has all they use of `atb_pllava.cli`.
"""
