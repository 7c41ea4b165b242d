"""How the kernels cut their work on each device, and what they take."""
