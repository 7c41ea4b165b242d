"""Which tensor there is which parameter here, and how their layouts differ."""
