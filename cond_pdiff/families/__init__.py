"""Families of base models: what adapters for each of them are made on, how they are trained, judged and used."""
