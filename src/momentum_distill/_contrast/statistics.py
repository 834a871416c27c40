"""What attention over the keys finds for each row: by tiles, or by the kernel."""

from typing import NamedTuple

from torch import Tensor


class LogSum(NamedTuple):
    r"""$\mathrm{lse} = \log\sum_j e^{s_j}$ of each row in two numbers: large logits take digits from their sum."""

    shift: Tensor  # (N,): the largest logit, or what is near enough
    log: Tensor  # (N,): the logarithm of the sum relative to it

    def value(self) -> Tensor:
        """The lse."""
        return self.shift + self.log

    def off(self, logits: Tensor) -> Tensor:
        r"""$s - \mathrm{lse}$, the logarithm of a softmax, of logits `(N,)` or `(N, B)`."""
        shift, log = (self.shift, self.log) if logits.ndim == 1 else (self.shift[:, None], self.log[:, None])
        return (logits - shift) - log


class Statistics(NamedTuple):
    """Sums over the keys that are present; without one, an lse and a mean are 0. What was not asked for is empty.

    The positive keys of a row are weighed by $P_{ij}$: by their $w_{ij}$, or by the softmax over them times that.
    """

    lse: LogSum
    mean_key: Tensor  # (N, d): sum_j V_ij k_j
    positive_count: Tensor  # (N,): sum_j w_ij; of classes K_i, int64
    positive_mean_key: Tensor  # (N, d): sum_j P_ij k_j
    positive_lse: LogSum  # over the positive keys; where these are weighed by the softmax
    momentum_lse: LogSum
    momentum_mean_key: Tensor  # (N, d): sum_j U_ij k_j
    momentum_mean_logit: Tensor  # (N,): sum_j U_ij s'_ij
    hard_lse: LogSum | None = None  # of the supervised term, where hard negatives weigh more; else that of V
    hard_mean_key: Tensor | None = None

    def supervised(self) -> tuple[LogSum, Tensor]:
        """The lse and the mean key of the supervised term."""
        return self.hard_lse or self.lse, self.mean_key if self.hard_mean_key is None else self.hard_mean_key
