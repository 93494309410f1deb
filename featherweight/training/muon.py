"""Muon: orthogonalised momentum for the hidden matrices of a transformer that is trained from nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.training.sharding import as_part, is_part, part, part_of, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

MATRIX_SHARE = 10 / 3
"""Learning rate of the hidden matrices over that of the rest (0.02 beside 6e-3)."""


class Muon:
    """Muon for the matrices inside the decoder layers, AdamW for embedding, head, norms and biases.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". torch.optim.Muon works in bfloat16, one
    matrix at a time, which CPUs are slow at; here matrices of one shape are orthogonalised together, in float32.
    It has the attributes of a torch optimizer that the training loop uses.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float, momentum: float = 0.95) -> None:
        import torch

        matrices: list[Tensor] = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
        hidden = set(matrices)
        rest = [weight for weight in model.parameters() if weight not in hidden]
        self.adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.param_groups: list[dict[str, Any]] = [
            *self.adamw.param_groups,
            {"params": matrices, "lr": MATRIX_SHARE * learning_rate, "weight_decay": weight_decay},
        ]
        self.momentum = momentum
        shapes = dict.fromkeys(weight.shape for weight in matrices)
        self.stacks = [[weight for weight in matrices if weight.shape == shape] for shape in shapes]
        self.averages = [torch.zeros_like(_parts(stack)) for stack in self.stacks]

    def step(self) -> None:
        """One update of every weight from its gradient."""
        import torch

        self.adamw.step()
        group = self.param_groups[-1]
        with torch.no_grad():
            for stack, average in zip(self.stacks, self.averages, strict=True):
                gradients = _parts([weight.grad for weight in stack if weight.grad is not None])
                average.lerp_(gradients, 1 - self.momentum)
                updates = orthogonal(_wholes(gradients.lerp_(average, self.momentum), stack))
                rows, columns = updates.shape[1:]
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for weight, update in zip(stack, updates, strict=True):
                    own = part_of(update, weight) if is_part(weight) else update
                    part(weight).mul_(1 - group["lr"] * group["weight_decay"]).sub_(own, alpha=rate)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and the averages of the matrices as further entries; laid out as torch's optimizers do."""
        inner = self.adamw.state_dict()
        first = sum(len(group["params"]) for group in inner["param_groups"])
        averages = {first + index: {"average": average} for index, average in enumerate(self.averages)}
        return {"state": {**inner["state"], **averages}, "param_groups": inner["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        entries = state["state"].items()
        own = [values["average"] for _, values in sorted(entries) if "average" in values]
        for average, saved in zip(self.averages, own, strict=True):
            average.copy_(saved)
        inner = {index: values for index, values in entries if "average" not in values}
        self.adamw.load_state_dict({"state": inner, "param_groups": state["param_groups"]})
        self.param_groups[:-1] = self.adamw.param_groups  # torch has made new ones, whose rates it reads

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None


def _parts(tensors: list[Tensor]) -> Tensor:
    """What this process has of matrices of one shape, [n, rows, columns]."""
    import torch

    return torch.stack([part(tensor) for tensor in tensors])


def _wholes(parts: Tensor, stack: list[Tensor]) -> Tensor:
    """The matrices whose `parts` the processes have, divided as the weights of `stack` are: a matrix is orthogonalised whole."""
    import torch

    if not is_part(stack[0]):
        return parts
    return torch.stack([whole(as_part(own, weight)) for own, weight in zip(parts, stack, strict=True)])


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of each matrix U S V^T of [n, rows, columns], singular values in 0.7 .. 1.2, by Newton-Schulz iteration.

    The quintic's coefficients are Jordan's: steepest at zero, so that five iterations are enough.
    """
    import torch

    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
