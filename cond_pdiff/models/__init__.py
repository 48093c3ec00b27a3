"""The networks and saved components of a generator."""
