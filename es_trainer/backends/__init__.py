"""Where the weights are, how a member gets in, and who answers."""
