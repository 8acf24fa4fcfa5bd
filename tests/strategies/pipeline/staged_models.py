"""Small models of the kinds that pipeline stages must cope with. None of them knows of stages."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LENGTH, LAYERS = 31, 16, 2, 8, 4


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x, mask=None):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.dropout = Attention(dropout), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """After nanoGPT. Subclasses change :meth:`body`."""

    block = Block

    def __init__(self, tied=True, dropout=0.0, layers=LAYERS):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(LENGTH, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList([self.block(dropout) if dropout else self.block() for _ in range(layers)]),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens, labels):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))
        logits = self.lm_head(self.transformer.ln_f(self.body(x, tokens)))
        return self.loss(logits, labels)

    def body(self, x, tokens):
        for block in self.transformer.h:
            x = block(x)
        return x

    def loss(self, logits, labels):
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)


class CheckpointedGPT(GPT):
    """Activation checkpointing in user code, with an operation in front of every block."""

    def body(self, x, tokens):
        scale = torch.linspace(0.9, 1.1, tokens.shape[1], dtype=x.dtype)[:, None]
        for block in self.transformer.h:
            x = checkpoint(block, x * scale, use_reentrant=False)
        return x


class TransposingBlock(Block):
    """Like many layers of torch, gives what lies in memory with the second dimension first."""

    def forward(self, x, mask=None):
        return super().forward(x, mask).transpose(0, 1).contiguous().transpose(0, 1)


class TransposingGPT(GPT):
    block = TransposingBlock

    def loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.view(-1), ignore_index=-100)


class TupleBlock(Block):
    """Gives more than it gets, as a tuple with a dictionary; takes a mask and a rotary table."""

    def forward(self, x, *, mask, rotary, first):
        cosine, sine = rotary
        x = x * cosine + x.roll(1, -1) * sine + 0.1 * first
        x = super().forward(x, mask)
        return x, None, {"mean": x.mean(), "first": first}


class MaskedGPT(GPT):
    """Computes a mask and a rotary table from the batch; its blocks return tuples; all of them get the first input."""

    block = TupleBlock

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("frequencies", 1 / 100 ** (torch.arange(WIDTH) / WIDTH), persistent=False)

    def body(self, x, tokens):
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        # Data-dependent: real on every stage, since the batch is.
        if (tokens == 0).any():
            mask = mask & ((tokens != 0)[:, None, None, :] | torch.eye(length, dtype=torch.bool))
        angles = torch.arange(length, device=x.device)[:, None] * self.frequencies
        rotary = angles.cos(), angles.sin()
        first = x
        for block in self.transformer.h:
            x, _, extra = block(x, mask=mask, rotary=rotary, first=first)
            first = extra["first"]
        return x


class SequentialNet(nn.Module):
    """Takes the mean of squares over all tokens of the batch."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layers = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, 1)

    def forward(self, tokens, labels):
        return F.mse_loss(self.head(self.body(self.embedding(tokens))).squeeze(-1), labels.to(torch.float64))


class VisionTransformer(nn.Module):
    """Patches by convolution, a class token, and a batch of pictures made of the tokens."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        layers = [
            nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True, norm_first=True) for _ in range(LAYERS)
        ]
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, tokens, labels):
        pictures = torch.sin(tokens[:, :, None, None] * torch.linspace(0, 3, 24).view(3, 8))[:, :, :, :8].transpose(
            1, 2
        )
        x = self.patches(pictures.to(self.head.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return F.cross_entropy(self.head(self.norm(self.encoder.layers(x))[:, 0]), labels[:, 0] % 5)


class CrossBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.cross = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory):
        return x + torch.tanh(self.own(x) + self.cross(memory).mean(1, keepdim=True))


class CrossAttending(nn.Module):
    """An encoder in front of the blocks, whose output all of them get."""

    def __init__(self):
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.ModuleList([CrossBlock() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        memory = torch.relu(self.encoder(x.flip(1)))
        for block in self.decoder:
            x = block(x, memory=memory)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class BiasBlock(nn.Module):
    """The first one makes a bias for all (T5)."""

    def __init__(self, first):
        super().__init__()
        self.linear, self.bias = nn.Linear(WIDTH, WIDTH), nn.Embedding(LENGTH, 1) if first else None

    def forward(self, x, bias=None):
        if self.bias is not None:
            bias = self.bias(torch.arange(x.shape[1]))[None]
        x.mul_(0.9)  # in place, in what it was given
        return x + torch.tanh(self.linear(x)) * bias, bias


class BiasFromFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([BiasBlock(index == 0) for index in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, labels):
        x, bias = self.embedding(tokens), None
        for block in self.layers:
            x, bias = block(x, bias=bias)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class BetweenGPT(GPT):
    """Something of its own after each block, and an in-place operation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.between = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(LAYERS)])
        self.dropout = nn.Dropout(options.get("dropout", 0.0))

    def body(self, x, tokens):
        for block, between in zip(self.transformer.h, self.between, strict=True):
            x = block(x)
            change = self.dropout(between(x))
            change *= 0.1
            x = x + change
        return x


class Experts(nn.Module):
    """Each token goes to the expert with the highest score: which ones run depends on values."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x):
        score, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero(as_tuple=True)
            if len(rows[0]):
                y[rows] = expert(x[rows]) * score[rows].unsqueeze(-1)
        return x + y


class MixtureGPT(GPT):
    block = Experts


class ReadingTailGPT(GPT):
    """Reads values after the last block, keeps some, and updates state."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.history = torch.zeros(()), []

    def loss(self, logits, labels):
        self.largest = logits.detach().max().item()
        loss = super().loss(logits, labels)
        self.last = f"{loss.detach():.3f}"
        self.seen += (labels != -100).sum()
        self.history.append(logits.detach().numpy().mean())
        return loss


class TwoLossesGPT(GPT):
    """Cross-entropies that divide by different things, smoothed and with weights of classes, and a plain mean."""

    def loss(self, logits, labels):
        weight = torch.linspace(0.5, 1.5, VOCABULARY, dtype=logits.dtype)
        flat, labels = logits.flatten(0, 1), labels.flatten()
        weighted = F.cross_entropy(flat, labels, weight=weight, label_smoothing=0.1)
        chosen = labels != -100
        rows = F.mse_loss(flat[chosen].mean(-1), labels[chosen].to(logits.dtype))
        return super().loss(logits, labels) + 0.3 * weighted + logits.pow(2).mean() + 0.01 * rows
