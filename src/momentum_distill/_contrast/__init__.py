"""Ways to the contrastive loss."""
