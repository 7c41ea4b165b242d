"""Programs compiled ahead of time for devices that are not there, and what they would take."""
