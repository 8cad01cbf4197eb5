"""What is wrong with this machine, this environment, or the command that somebody is about to start."""
