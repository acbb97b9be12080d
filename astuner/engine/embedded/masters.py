"""The fp32 master copies of the trained parameters, their gradients, and AdamW.

All masters lie in one flat buffer, so that clipping, the optimizer's step, saving
and loading are each one operation. Gradients of the compute dtype are added up in
fp32 after every micro-batch; after a step the masters are rounded back into the
parameters. Knows no loss and no file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from astuner.engine.protocol import AdamParams
from astuner.errors import EngineError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Masters:
    """Owns the optimizer's side of `parameters`, in the order of the mapping."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        sizes = [p.numel() for p in parameters.values()]
        device = next(iter(parameters.values())).device
        self._flat = nn.Parameter(torch.empty(sum(sizes), dtype=torch.float32, device=device))
        self._gradient = torch.zeros_like(self._flat)
        self._flat.grad = self._gradient
        self._values = self._views(self._flat.detach(), sizes)
        self._gradients = self._views(self._gradient, sizes)
        fused = device.type in {"cpu", "cuda"}
        self._optimizer = torch.optim.AdamW([self._flat], lr=0.0, fused=fused or None)
        self.pending = False
        """Whether there is a gradient that no step has used yet."""
        self.reset()

    @property
    def nbytes(self) -> int:
        state = self.moments().values()
        return self._flat.nbytes + self._gradient.nbytes + sum(t.nbytes for t in state)

    @torch.inference_mode(mode=False)
    def move(self, device: torch.device) -> None:
        """Keep everything on `device` from now on. Steps are taken on the first one only."""
        self._flat.grad = None
        self._flat.data = self._flat.detach().to(device)
        self._gradient = self._gradient.to(device)
        self._flat.grad = self._gradient
        state = self._optimizer.state.get(self._flat, {})
        state.update({name: tensor.to(device) for name, tensor in state.items()})
        sizes = [p.numel() for p in self._parameters.values()]
        self._values = self._views(self._flat.detach(), sizes)
        self._gradients = self._views(self._gradient, sizes)

    def _views(self, flat: Tensor, sizes: list[int]) -> dict[str, Tensor]:
        parts = zip(self._parameters.items(), flat.split(sizes), strict=True)
        return {name: part.view(parameter.shape) for (name, parameter), part in parts}

    @torch.no_grad()
    def reset(self) -> None:
        """Masters from the parameters as they are; moments and gradients forgotten."""
        for name, parameter in self._parameters.items():
            self._values[name].copy_(parameter)
        self._optimizer.state.clear()
        self.discard()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the parameters' gradients to the masters', and clear them."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._gradients[name].add_(parameter.grad)
        self.drop_partial()
        self.pending = True

    def drop_partial(self) -> None:
        """Clear the parameters' gradients, e.g. those of a backward pass that broke off."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def discard(self) -> None:
        """Forget all gradients."""
        self.drop_partial()
        self._gradient.zero_()
        self.pending = False

    @torch.no_grad()
    def step(self, params: AdamParams) -> float:
        """One AdamW step (Loshchilov and Hutter 2019, arXiv 1711.05101) on the gathered
        gradient, clipped to `max_grad_norm`; returns the norm before clipping.

        Raises EngineError when the norm is not finite; then nothing but the gradient
        has changed: it is gone.
        """
        norm = float(self._gradient.norm())
        if not torch.isfinite(torch.tensor(norm)):
            self.discard()
            raise EngineError(
                f"The gradient's norm is {norm}: the step was not taken and the gradient was "
                "dropped. Lower the learning rate, or look at the last batch's rewards."
            )
        if 0 < params.max_grad_norm < norm:
            self._gradient.mul_(params.max_grad_norm / norm)
        self._optimizer.param_groups[0].update(
            lr=params.lr, betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
        )
        self._optimizer.step()
        self._write_back()
        self.discard()
        return norm

    def _write_back(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._values[name])

    def values(self) -> dict[str, Tensor]:
        """Name -> fp32 master (a view, not a copy)."""
        return self._values

    def gradients(self) -> dict[str, Tensor]:
        """Name -> fp32 gradient gathered so far (a view, not a copy)."""
        return self._gradients

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Replace all masters (shapes must agree), and the parameters with them."""
        for name, master in self._values.items():
            master.copy_(values[name])
        self._write_back()
        self._optimizer.state.clear()
        self.discard()

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state: flat moments and the step count; empty before the first step."""
        return dict(self._optimizer.state.get(self._flat, {}))

    def set_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Put back what `moments` returned."""
        device = self._flat.device
        state = {name: moments[name].to(device, copy=True) for name in MOMENTS if name in moments}
        if state:
            # Where the step count lives is the optimizer's choice; its own loading knows.
            groups = self._optimizer.state_dict()["param_groups"]
            state["step"] = moments["step"].clone()
            self._optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
