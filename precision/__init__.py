"""Does it still answer like the original? Harnesses and comparisons, each a command.

What they share is in the package: `atb_pllava.manifest` (what a run was made with: `write_manifest`, `settings_of`),
`atb_pllava.answers` (`answer_all` over an `AnswerLog` that survives a kill, `Progress`) and `atb_pllava.json_file`.
"""
