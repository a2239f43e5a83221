"""Other engines that generate with the same weights, where installed."""
