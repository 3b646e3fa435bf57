"""GPT-2 as a plain PyTorch module; nothing in this file knows how it will be trained.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))
    logits, loss = model(x, y)  # x, y: (B, T) token ids -> (B, T, V), nats per token

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners": learned positions, layer norm before each branch and once at the end, tanh-approximated
GELU, input and output embeddings tied. Parameters carry the names of GPT-2 as nanoGPT spells them,
so its checkpoints load with strict=True.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 that matrix units like
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False  # True as in GPT-2; without, a little smaller and faster and no worse

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one parameter under two names
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """GPT-2's initialisation: N(0, 0.02), less where 2 * n_layer branches add up."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(0.0, 0.02)
            else:  # biases 0, the gains of layer norms 1
                p.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        """(B, T) ids -> logits (B, T, V), and the mean cross-entropy of y in nats per token.

        Targets of -1 do not count. ValueError if T exceeds block_size.
        """
        T = x.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed block_size={self.config.block_size}: crop them")
        h = self.transformer.wte(x) + self.transformer.wpe.weight[:T]  # (B, T, C) + (T, C)
        for block in self.transformer.h:
            h = block(h)
        logits = self.lm_head(self.transformer.ln_f(h))  # (B, T, V)
        if y is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, x, max_new_tokens: int, temperature=1.0, top_k=None, generator=None):
        """x (B, T) with max_new_tokens more; generator decides the draw, temperature 0 has none."""
        for _ in range(max_new_tokens):
            logits, _ = self(x[:, -self.config.block_size :])
            logits = logits[:, -1].float()  # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < least, -torch.inf)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                chances = F.softmax(logits / temperature, -1)
                token = torch.multinomial(chances, 1, generator=generator)
            x = torch.cat([x, token], dim=1)
        return x

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's two groups: matrices and embeddings decay; biases and gains do not."""
        large = [p for p in self.parameters() if p.dim() >= 2]
        small = [p for p in self.parameters() if p.dim() < 2]
        return [dict(params=large, weight_decay=weight_decay), dict(params=small, weight_decay=0.0)]

    def flops_per_token(self, T: int) -> int:
        """Forward FLOPs of matrix products for one token of a T-token row; a multiply-add is two.

        Attention is counted in full although half of it is masked, as is the custom (PaLM, appendix
        B), so that the figures compare. A plain training step costs three times this.
        """
        c = self.config
        linear = 2 * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd)
        return linear + 4 * c.n_layer * c.n_embd * T  # attention


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        # Fused where the caller allows it; in bfloat16 four times as slow on CPUs (torch 2.13)
        with torch.autocast("cpu", enabled=False):
            if q.dtype == torch.bfloat16 and q.device.type == "cpu":
                q, k, v = q.float(), k.float(), v.float()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C).type_as(qkv))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
