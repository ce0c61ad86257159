"""From finished blocks to folders that other programs read."""
