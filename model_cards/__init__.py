"""Card templates for generators, adapters and the Space."""
