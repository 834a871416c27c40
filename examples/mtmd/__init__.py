"""The multimodal sentiment example: data, model, objective, training loop and metrics."""
