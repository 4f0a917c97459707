"""How fast a fused layer is, how short its host path, how little it saves: `python -m bench`."""
