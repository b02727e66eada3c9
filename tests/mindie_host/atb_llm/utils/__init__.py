"""What MindIE's example programs take from here."""
