"""Late-phase weights, their cycle and their averages: for any training loop; nothing in here knows Trainer."""
