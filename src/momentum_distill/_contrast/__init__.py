"""The engine of the contrastive loss, from its mathematics to its door; `momentum_distill.functional` stands above it.

- `statistics`: what attention over the keys finds for each row.
- `formulas`: a row's terms and the weights of its gradient, and how rows become one loss: for every way below.
- `problem`: what one loss is computed from.
- `matrices`: the way of few scores, N×Q matrices. Also by plain autograd, for what asks for that.
- `tiles`: the way of many scores, which never makes a matrix. `kernel` does the same as a Triton kernel.
- `fused`: whether a problem goes to Triton, and its calls.
- `engine`: chooses between these, and makes a loss and its gradient at once.
- `targets`: problems with other momentum targets than the plain softmax, as problems that the engine knows.
- `arguments`: what a caller gives, checked and made a problem.
- `operator`: the engine as an operator of PyTorch, which `torch.compile` takes whole.
- `autograd`: the door; connects it all to autograd.
- `sigmoid`: the pairwise sigmoid loss, whose pairs need no sum over the keys: its tiles, its door, its operator.
"""
