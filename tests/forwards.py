"""Forwards made of random numbers, for tests that compare losses with their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.passes import Forward, Targets, token_logps

VOCAB, EXPERTS, TOP_K = 7, 6, 2
LAYERS = (1, 3, 4)
FORGET = [Row((3, 1, 4, 1, 5)), Row((2, 6, 5), num_context=2), Row((0, 3, 5, 0, 2, 6, 4), num_context=3)]
RETAIN = [Row((1, 2, 3)), Row((6, 5, 4, 3, 2, 1))]
TARGETS = Targets(
    experts=((1, 0), (1, 4), (4, 2)), routers=(1, 4), moe_layers=(0, *LAYERS), scoring="softmax"
)


def naive_ce(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Mean NLL of the counted tokens: every one has the same weight, whatever row it is in."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, row in enumerate(rows):
        for t in range(row.num_context, len(row.ids)):
            denominator = sum(logits[b, t - 1, v].exp() for v in range(VOCAB))
            total = total - (logits[b, t - 1, row.ids[t]].exp() / denominator).log()
            count += 1
    return total / count


def normal(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    """A float64 leaf that gradients reach."""
    generator = torch.Generator().manual_seed(seed)
    values = spread * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def token_logits(rows: Sequence[Row], seed: int) -> Tensor:
    return normal(len(rows), max(len(row.ids) for row in rows), VOCAB, seed=seed)


def router_logits(rows: Sequence[Row], seed: int) -> dict[int, Tensor]:
    num_tokens = sum(len(row.ids) for row in rows)
    return {layer: normal(num_tokens, EXPERTS, seed=100 * seed + layer) for layer in LAYERS}


def forward(
    rows: Sequence[Row],
    logits: Tensor,
    router: dict[int, Tensor] | None = None,
    hidden: dict[int, Tensor] | None = None,
    **counts: float,
) -> Forward:
    """What a pass of one process over `rows` leaves behind; `counts` where the batch lies on several."""
    batch = collate(rows, pad_id=0)
    own: dict[str, float] = {
        "num_tokens": float(batch.counted.sum()),
        "num_sequences": float(len(rows)),
        "num_routed": float(batch.attention.sum()),
    }
    return Forward(
        token_logps(logits, batch.ids),
        batch.counted[:, 1:],
        router_logits=router or {},
        router_choices={at: z.topk(TOP_K, dim=-1).indices for at, z in (router or {}).items()},
        hidden=hidden or {},
        real=batch.routed,
        logits=logits[:, :-1],
        tokens=batch.ids[:, 1:],
        **(own | counts),
    )


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True, retain_graph=True))


def assert_same(ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor]) -> None:
    """Value and every gradient agree to float32."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
    for mine, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def one_token(*rows: tuple[float, int]) -> Forward:
    """Rows whose every counted token has probability `p` of two tokens: (p, number of counted tokens)."""
    made = [Row((0,) * (n + 1)) for _, n in rows]
    longest = max(n for _, n in rows) + 1
    logits = torch.tensor([[[math.log(p), math.log(1 - p)]] * longest for p, _ in rows])
    return forward(made, logits)


def sum_of(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
