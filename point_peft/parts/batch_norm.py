"""BatchNorm inside an adapter, whose forward may be run again by gradient checkpointing."""

from torch import Tensor, nn


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over features (..., c); its running statistics belong to the adapter."""

    def normalise(self, features: Tensor, *, recomputing: bool) -> Tensor:
        """Normalised features; when checkpointing repeats a forward, the statistics are not updated again."""
        x = features.reshape(-1, features.shape[-1])
        if self.training and recomputing:
            # On copies: a recomputation must save for backward just what the forward saved.
            mean, var = (None if stat is None else stat.clone() for stat in (self.running_mean, self.running_var))
            momentum = 0.0 if self.momentum is None else self.momentum
            x = nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)
        else:
            x = self(x)
        return x.reshape(features.shape)
