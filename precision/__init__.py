"""Does it still answer like the original? Harnesses and comparisons, each a command.

What they share is in the package: `atb_pllava.batch.run_metadata` (what a run was made with: `write_manifest`,
`settings_of`), `atb_pllava.batch.result_log` (`answer_all` over an `ResultLog` that survives a kill) and
`atb_pllava.files`.
"""
