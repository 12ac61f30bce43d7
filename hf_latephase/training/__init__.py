"""Late-phase training through transformers' Trainer."""
