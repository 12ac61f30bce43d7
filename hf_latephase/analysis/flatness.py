"""
How flat the loss is around a stock model's weights: along random directions, and by the Hessian's largest eigenvalues.

Both are of the mean loss over given batches, in evaluation mode (BatchNorm's running statistics are fixed), with
respect to the parameters that require a gradient. The weights are replaced for a call (`torch.func.functional_call`),
never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers.utils import requires_backends

from ..core.ensemble import evaluation_mode


# (what is called like the model, a batch) -> mean loss of the batch (0-d)
LossFunction = Callable[[Callable[..., Any], Any], Tensor]


def loss_along_directions(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Sequence[Any],
    distances: Sequence[float],
    *,
    num_directions: int = 5,
    seed: int = 0,
    disable_tqdm: bool = True,
) -> Tensor:
    """
    Returns the loss at several distances from the weights along random filter-normalised directions.

    A direction is Gaussian; each of its filters is then scaled to the norm of the filter of the weights that it is
    added to (Li et al., 2018, "Visualizing the Loss Landscape of Neural Nets"). So distance 1 is a step as large as
    the filter itself, and models whose layers differ in scale can be compared. A filter is what makes one output:
    `weight[i]` of a Linear or convolution. Parameters of one dimension, biases and the scale and shift of
    normalisation layers, are not moved, as in that paper: they are few, and their scale means something else.

    Args:
        model (`torch.nn.Module`):
            A stock model; of a late-phase run, `late_phase.averaged_model()` or what was saved. It stays unchanged.
        loss_function (`Callable`):
            `loss_function(call, batch)` returns the mean loss of a batch (0-d), where `call` is called like the
            model: `lambda call, batch: call(**batch).loss` for models of transformers.
        batches (`Sequence`):
            Anything that `loss_function` takes, with tensors on the model's device. A batch weighs by the rows of its
            first tensor.
        distances (`Sequence[float]`):
            Where the loss is computed; 0 is the model, negative is the opposite direction.
        num_directions (`int`, defaults to 5):
            Number of directions.
        seed (`int`, defaults to 0):
            Seeds the directions: equal for models of the same architecture.
        disable_tqdm (`bool`, defaults to `True`):
            Whether to hide the progress bar.

    Returns:
        `torch.Tensor`: `[num_directions, len(distances)]`, float64, on the CPU.

    Raises:
        `ValueError`: If there are no batches, distances or directions, or no parameter that would be moved, or if the
            model is parametrized (late-phase weights attached).

    Example:

    ```python
    >>> import torch
    >>> from hf_latephase.analysis import loss_along_directions

    >>> model = torch.nn.Linear(3, 2)
    >>> batches = [torch.randn(8, 3), torch.randn(4, 3)]
    >>> def loss_function(call, rows):
    ...     return call(rows).square().mean()
    >>> loss_along_directions(model, loss_function, batches, [-0.5, 0.0, 0.5], num_directions=4).shape
    torch.Size([4, 3])

    ```
    """
    parameters = _checked_parameters(model, batches)
    if not len(distances) or num_directions < 1:
        raise ValueError(
            f"At least one distance and one direction are needed, got {len(distances)} and {num_directions}."
        )
    if all(weight.ndim < 2 for weight in parameters.values()):
        raise ValueError("No parameter that requires a gradient has filters (2 dimensions or more): nothing to move.")
    generator = torch.Generator().manual_seed(seed)
    losses = torch.empty(num_directions, len(distances), dtype=torch.float64)
    with (
        _fixed(model) as buffers,
        torch.no_grad(),
        tqdm(total=losses.numel(), desc="Loss along directions", disable=disable_tqdm) as progress,
    ):
        for row in losses:
            direction = {name: _filter_normalised(weight, generator) for name, weight in parameters.items()}
            for index, distance in enumerate(distances):
                moved = {name: weight + distance * direction[name] for name, weight in parameters.items()}
                call = _with_weights(model, buffers | moved)
                row[index] = sum(share * loss_function(call, batch).double() for batch, share in _weighted(batches))
                progress.update()
    return losses


def hessian_eigenvalues(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Sequence[Any],
    *,
    num_eigenvalues: int = 1,
    tolerance: float = 1e-3,
    seed: int = 0,
    disable_tqdm: bool = True,
) -> Tensor:
    """
    Returns the largest (most positive) eigenvalues of the loss's Hessian, largest first.

    Without the matrix: by Lanczos iterations (`scipy.sparse.linalg.eigsh`) on Hessian-vector products, each a forward
    and two backward passes over all batches. Keeps some 20 vectors as long as the parameters, in float64.

    Args:
        model, loss_function, batches:
            As in [`loss_along_directions`]. The loss is differentiated twice: a `torch.nn.ReLU` network is piecewise,
            which is what is meant.
        num_eigenvalues (`int`, defaults to 1):
            How many, below the number of parameters.
        tolerance (`float`, defaults to 1e-3):
            Relative accuracy at which the iterations stop; 0 is float64's own, for float64 models only.
        seed (`int`, defaults to 0):
            Seeds the first vector.
        disable_tqdm (`bool`, defaults to `True`):
            Whether to hide the count of products.

    Returns:
        `torch.Tensor`: `[num_eigenvalues]`, float64, on the CPU.

    Raises:
        `ImportError`: If scipy is missing.
        `ValueError`: If there are no batches or not enough parameters, the curvature is not finite, or the model is
            parametrized (late-phase weights attached).

    Example:

    ```python
    >>> import torch
    >>> from hf_latephase.analysis import hessian_eigenvalues

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    >>> def loss_function(call, rows):
    ...     return call(rows).square().mean()
    >>> hessian_eigenvalues(model, loss_function, [rows])  # of (9 w₁² + w₂²) / 2
    tensor([9.], dtype=torch.float64)

    ```
    """
    requires_backends(hessian_eigenvalues, "scipy")
    from scipy.sparse.linalg import LinearOperator, eigsh

    parameters = _checked_parameters(model, batches)
    size = sum(weight.numel() for weight in parameters.values())
    if not 1 <= num_eigenvalues < size:
        raise ValueError(
            f"num_eigenvalues must be between 1 and {size - 1}, below the model's {size} parameters that require a "
            f"gradient, got {num_eigenvalues}."
        )
    with _fixed(model) as buffers, tqdm(desc="Hessian-vector products", disable=disable_tqdm) as progress:

        def product(vector: np.ndarray) -> np.ndarray:
            progress.update()
            return _hessian_vector_product(model, loss_function, batches, parameters, buffers, vector)

        start = np.random.default_rng(seed).standard_normal(size)
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        values = eigsh(operator, num_eigenvalues, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return torch.from_numpy(np.sort(values)[::-1].copy())


def _hessian_vector_product(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Sequence[Any],
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    vector: np.ndarray,
) -> np.ndarray:
    """H v of the mean loss, float64."""
    weights = {name: weight.clone().requires_grad_() for name, weight in parameters.items()}
    leaves = list(weights.values())
    pieces = torch.from_numpy(vector.reshape(-1)).split([leaf.numel() for leaf in leaves])
    directions = [piece.view(leaf.shape).to(leaf) for piece, leaf in zip(pieces, leaves, strict=True)]
    call = _with_weights(model, buffers | weights)
    total = np.zeros(vector.size)
    for batch, share in _weighted(batches):
        # Fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = loss_function(call, batch)
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
            products = torch.autograd.grad(slope, leaves, materialize_grads=True)
        # torch 2.6 makes the zeros of weights that the loss does not use part of the graph.
        total += share * torch.cat([p.detach().double().flatten().cpu() for p in products]).numpy()
    if not np.isfinite(total).all():
        raise ValueError("The loss has no finite curvature here. Check the model and the batches for NaN.")
    return total


def _filter_normalised(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction whose filters have the norms of the weight's; zero for parameters of one dimension."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    # Drawn on the CPU so that every device draws the same.
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (weight, drawn)]
    return drawn * (norms[0] / norms[1]).view(-1, *[1] * (weight.ndim - 1))


def _checked_parameters(model: nn.Module, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The parameters that require a gradient, detached."""
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise ValueError(
            "The model is parametrized, so its parameters are not the weights that it computes with. With late-phase "
            "weights attached, pass late_phase.averaged_model()."
        )
    if not len(batches):
        raise ValueError("There are no batches to compute the loss on. Give at least one.")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("No parameter of the model requires a gradient. Unfreeze those that count.")
    return parameters


@contextmanager
def _fixed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Evaluation mode; yields copies of the buffers, should a layer write to them in spite of it."""
    with evaluation_mode(model):
        yield {name: buffer.clone() for name, buffer in model.named_buffers()}


def _with_weights(model: nn.Module, tensors: dict[str, Tensor]) -> Callable[..., Any]:
    """What calls the model with other tensors of the same names."""
    return lambda *args, **kwargs: functional_call(model, tensors, args, kwargs)


def _weighted(batches: Sequence[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch with its share of all rows."""
    rows = [next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)).shape[0] for batch in batches]
    for batch, count in zip(batches, rows, strict=True):
        yield batch, count / sum(rows)
