"""What the processes of a run share, and what a run leaves."""
