"""What a run is: frozen dataclasses, and the reader of config files and command lines."""
