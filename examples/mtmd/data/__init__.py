"""What a model is trained on: reading, checking, scaling, batching, and a made-up set."""
