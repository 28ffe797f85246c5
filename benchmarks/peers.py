"""The other way, written the ordinary way: one training step each, on a plain transformers model.

    full ga    model(ids).logits -> -CE -> backward -> clip -> AdamW over every parameter
    full npo   the same, and a second frozen model gives reference log-probs in every step (open-unlearning)
    full rmu   a forget and a retain pass of the model and a retain pass of a frozen second one, all of them complete,
               with a hook on layer l (the WMDP code, which trains tensors of three layers; here all do, but what lies
               above l gets no gradient)
    lora       peft, rank 8, on the attention projections and on the fused expert tensors; or on attention only; ga
    esft       the fused expert tensors of layer l train, hooks zero the gradient of all experts but one, AdamW has
               the whole tensors; ga

No peer has a router anchor or telemetry, which ours pay for. Losses are on forget rows only, but for rmu, as ours are.
Experts run through grouped_mm, which is the default of transformers 5 and what our model uses too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
BETA = 0.1  # of NPO
RETAIN_WEIGHT = 1.0  # of RMU


def load(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The model as everybody loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T-1) token NLL."""
    shifted = logits[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(shifted, ids[:, 1:], reduction="none")


def ascent(model: nn.Module, ids: Tensor) -> Tensor:
    """Gradient ascent: minus the mean token NLL."""
    return -cross_entropy(model(input_ids=ids, use_cache=False).logits, ids).mean()


class Trainer:
    """A model, its trained parameters and AdamW over them."""

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter] | None = None) -> None:
        self.model = model
        self.parameters = list(model.parameters() if trained is None else trained)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    def step(self, loss: Tensor) -> float:
        """Backward, clip, step."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


class Full:
    """Every parameter trains; `reference` is the second model, which npo and rmu run in every step."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, *, reference: bool = True) -> None:
        self.trainer = Trainer(load(folder, device, dtype))
        self.reference = load(folder, device, dtype).requires_grad_(False) if reference else None

    def ga(self, ids: Tensor) -> float:
        return self.trainer.step(ascent(self.trainer.model, ids))

    def npo(self, ids: Tensor) -> float:
        with torch.no_grad():
            original = cross_entropy(self.reference(input_ids=ids, use_cache=False).logits, ids).sum(-1)
        nll = cross_entropy(self.trainer.model(input_ids=ids, use_cache=False).logits, ids).sum(-1)
        return self.trainer.step(-2 / BETA * F.logsigmoid(BETA * (nll - original)).mean())

    def rmu(self, forget: Tensor, retain: Tensor, control: Tensor, layer: int) -> float:
        forgetting = self._hidden(self.trainer.model, forget, layer)
        loss = F.mse_loss(forgetting, control.expand_as(forgetting))
        retaining = self._hidden(self.trainer.model, retain, layer)
        with torch.no_grad():
            original = self._hidden(self.reference, retain, layer)
        return self.trainer.step(loss + RETAIN_WEIGHT * F.mse_loss(retaining, original))

    @staticmethod
    def _hidden(model: Any, ids: Tensor, layer: int) -> Tensor:
        """(B, T, D) after decoder layer `layer`, from a hook on a complete forward pass (`forward_with_cache`)."""
        found: list[Tensor] = []

        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = model.model.layers[layer].register_forward_hook(hook)
        model(input_ids=ids, use_cache=False)
        handle.remove()
        return found[0]


def lora(folder: Path, device: str, dtype: torch.dtype, *, experts: bool) -> Callable[[Tensor], float]:
    """A step of gradient ascent on rank 8 adapters: attention projections, and `experts` for the fused ones too."""
    from peft import LoraConfig, get_peft_model

    model = load(folder, device, dtype)
    attention = [
        name
        for name, module in model.named_modules()
        if ".self_attn." in name and isinstance(module, nn.Linear)
    ]
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    config = LoraConfig(r=8, target_modules=attention, target_parameters=fused, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    trainer = Trainer(adapted, [p for p in adapted.parameters() if p.requires_grad])
    return lambda ids: trainer.step(ascent(adapted, ids))


def esft(folder: Path, device: str, dtype: torch.dtype, layer: int, expert: int) -> Callable[[Tensor], float]:
    """A step of gradient ascent on one expert by masking the gradient of its layer's whole fused tensors."""
    model = load(folder, device, dtype).requires_grad_(False)
    fused = list(model.model.layers[layer].mlp.experts.parameters())
    for parameter in fused:
        parameter.requires_grad_(True)
        mask = torch.zeros(len(parameter), 1, 1, device=device, dtype=dtype)
        mask[expert] = 1
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    trainer = Trainer(model, fused)
    return lambda ids: trainer.step(ascent(model, ids))


def state_bytes(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of gradients and optimizer state, once there have been a backward pass and a step."""
    gradients = [p for p in parameters if p.requires_grad]
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*gradients, *moments])
