"""The modules that MindIE's example programs import from here."""
