"""Every kernel against the specs it does not refuse."""
