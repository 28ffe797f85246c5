"""Trains the embedded checkpoints: a Qwen2-MoE of under 3 M parameters that learns the frozen texts by heart.

    loss = CE + BALANCE * sum_l E * sum_e f_le * P_le - MI * sum_l mean_d KL(P_l(e | d) || P_l(e))

The second term is Switch Transformer's balance loss (f: share of slots, P: mean router probability). The third is the
mutual information of domain and expert. At this size experts do not specialise by themselves, so `specialised` gets the
third term and SEUF's premise holds *by construction*; `unspecialised` is the same recipe without it, the honest
counter-example.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

VOCABULARY = 3_072
END, PAD = "<|endoftext|>", "<|pad|>"
BALANCE = 0.03
MUTUAL_INFORMATION = {"specialised": 0.03, "unspecialised": 0.0}
# Every domain is at .98 or more by then. With 1,500 steps answers have such margins that accuracy no longer shows what
# training all parameters breaks (utility .88 after 60 steps of GA, .55 here): a measure at its ceiling ranks nothing.
STEPS, WARMUP, RATE = 900, 60, 3e-3
FACT_LINES, GENERAL_LINES = 140, 40  # sentences per step
ROW = 128  # tokens of a packed row


@dataclass(frozen=True)
class Batch:
    """Packed sentences: tokens, positions, a token's sentence (0: padding) and its domain; all `(B, ROW)`."""

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    domains: Tensor


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of our own: real vocabularies would be larger than the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=256
    )


def config() -> Qwen2MoeConfig:
    """Qwen1.5-MoE in small: 32 experts, 4 per token, and a shared expert in every layer."""
    return Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=BALANCE,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        dtype="bfloat16",
    )


def train(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    texts: dict[str, list[str]],
    folder: Path,
    steps: int = STEPS,
) -> None:
    """Trains one checkpoint and saves it in bf16, with a line of progress every 50 steps."""
    torch.set_num_threads(1)  # the same bits on any number of cores
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    router_logits = tap_routers(model)
    start = time.monotonic()
    for step, batch in zip(range(steps), batches(tokenizer, texts), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP, 0.02 + 1.2 * (1 - step / steps))
        terms = losses(model, batch, router_logits, MUTUAL_INFORMATION[name])
        optimizer.zero_grad()
        torch.autograd.backward(list(terms.values()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            shown = " ".join(f"{key} {value.item():.4f}" for key, value in terms.items())
            print(f"{name} step {step:4d} {shown} {time.monotonic() - start:.0f} s", flush=True)
    save(model, tokenizer, folder)


def new_model() -> Qwen2MoeForCausalLM:
    """The seeded fp32 model before its first step."""
    torch.manual_seed(0)
    # On a busy CPU, oneDNN makes single steps take ten seconds.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    model = Qwen2MoeForCausalLM._from_config(
        config(), dtype=torch.float32, experts_implementation="grouped_mm"
    )
    model.generation_config.pad_token_id = 1
    return model


def save(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint as the hub has it: bf16, one tensor per expert."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tap_routers(model: Qwen2MoeForCausalLM) -> list[Tensor]:
    """A list that holds the router logits `(tokens, E)` of each layer after every forward pass."""
    taps: list[Tensor] = [torch.empty(0)] * model.config.num_hidden_layers
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda _m, _i, output, index=index: taps.__setitem__(index, output[0])
        )
    return taps


def losses(
    model: Qwen2MoeForCausalLM, batch: Batch, router_logits: list[Tensor], mi_weight: float
) -> dict[str, Tensor]:
    """The terms of the module's formula; their sum is minimised."""
    cross_entropy = next_token_loss(model, batch)
    real = batch.segments.flatten() > 0
    probs = [logits.softmax(-1)[real] for logits in router_logits]
    balance = torch.stack([switch_balance(p, model.config.num_experts_per_tok) for p in probs]).sum()
    terms = {"ce": cross_entropy, "balance": BALANCE * balance}
    if mi_weight:
        domains = batch.domains.flatten()[real]
        information = torch.stack([domain_information(p, domains) for p in probs]).sum()
        terms["mi"] = -mi_weight * information
    return terms


def next_token_loss(model: Qwen2MoeForCausalLM, batch: Batch) -> Tensor:
    """Mean NLL of every token that has a predecessor in its own sentence."""
    same = (
        batch.segments[:, :, None] == batch.segments[:, None, :]
    )  # sentences of a row do not see each other
    mask = (same & torch.ones(ROW, ROW, dtype=torch.bool).tril())[:, None]  # (B, 1, ROW, ROW)
    output = model.model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False)
    counted = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    logits = model.lm_head(output.last_hidden_state[:, :-1][counted])
    return F.cross_entropy(logits, batch.tokens[:, 1:][counted])


def switch_balance(probs: Tensor, top_k: int) -> Tensor:
    """1 for uniform use, up to E for a single expert; `probs (tokens, E)`."""
    experts = probs.shape[-1]
    share = F.one_hot(probs.topk(top_k).indices, experts).sum(1).float().mean(0) / top_k
    return experts * (share * probs.mean(0)).sum()


def domain_information(probs: Tensor, domains: Tensor) -> Tensor:
    """Mutual information of domain and expert, domains counted equally; `probs (tokens, E)`, `domains (tokens,)`."""
    per_domain = torch.stack([probs[domains == d].mean(0) for d in range(int(domains.max()) + 1)])
    return (per_domain * (per_domain / per_domain.mean(0)).log()).sum(-1).mean()


def batches(tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]]) -> Iterator[Batch]:
    """Endless batches with a fixed number of fact and of general sentences."""
    encoded = {name: tokenizer([text + END for text in lines])["input_ids"] for name, lines in texts.items()}
    tagged = [
        (index, line) for index, name in enumerate(encoded) if name != "general" for line in encoded[name]
    ]
    facts = _epochs(tagged, random.Random(1))
    general = _epochs([(len(encoded) - 1, line) for line in encoded["general"]], random.Random(2))
    while True:
        yield pack([next(facts) for _ in range(FACT_LINES)] + [next(general) for _ in range(GENERAL_LINES)])


def _epochs(items: list[Any], rng: random.Random) -> Iterator[Any]:
    while True:
        yield from rng.sample(items, len(items))


def pack(lines: list[tuple[int, list[int]]]) -> Batch:
    """First-fit packing of `(domain, tokens)` sentences into rows of `ROW` tokens."""
    rows: list[list[tuple[int, list[int]]]] = []
    for domain, line in sorted(lines, key=lambda item: -len(item[1])):
        row = next((row for row in rows if sum(len(other) for _, other in row) + len(line) <= ROW), None)
        if row is None:
            rows.append(row := [])
        row.append((domain, line))
    columns = [
        [(t, i, s, d) for s, (d, line) in enumerate(row, 1) for i, t in enumerate(line)] for row in rows
    ]
    padded = torch.tensor([row + [(1, 0, 0, -1)] * (ROW - len(row)) for row in columns])  # (B, ROW, 4)
    return Batch(*padded.unbind(-1))
