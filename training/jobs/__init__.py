"""Jobs: what a command does as a list of independent parts, done on this machine or on a cluster."""
