"""Model-agnostic meta-learning for any module whose forward(x, y) returns (logits, loss).

A task is rows of text, cut into K + 1 equal chunks, K = inner_steps. Two loops learn:

    inner   phi_0 = theta,   phi_j+1 = update(phi_j, g_j, alpha),   g_j = grad L_j(phi_j)
    outer   theta and alpha take a step down the gradient of   sum_j w_j L_j(phi_j)

Each chunk is predicted, then learned, so the outer loss is low where learning one chunk helps with
the next. objective='every' weighs all chunks alike: how fast a text is learned (Antoniou et al.
2019, arXiv 1810.09502). 'final' counts the last one: how well (Finn et al. 2017, arXiv 1703.03400).
K = 0 is plain training. The rates alpha = exp(log_inner_lr) may be learned too, one a tensor or one
an element (Meta-SGD, Li et al. 2017, arXiv 1707.09835). Costs, in forwards F of one chunk:

    plain training   3 (K + 1) F     a gradient is a forward and a backward of twice its cost
    first order      3 (K + 1) F     each g_j is taken for a constant: two running sums, no graph
    second order    (12 K + 3) F     exact: one Hessian-vector product, 9 F, for each inner step
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Tensors = dict[str, torch.Tensor]  # by parameter name


def meta_grad(learner: "MAML", x: torch.Tensor, y: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """(gradients by name, outer loss) of a task x, y (B, T): the definition, in torch's own words.

    learner.loss(phi, x, y) is functional_call(model, phi, (x, y))[1]: the model's forward with phi
    instead of its parameters. grad_and_value(f) is a function like f that returns (d f / d its
    first argument, f). It can be differentiated again: here the outer one goes through the inner
    ones. An optimizer's step() has no derivative, for it overwrites theta in place.
    """

    def gradient(phi, x, y):
        g, loss = grad_and_value(learner.loss)(phi, x, y)  # g: a dict like phi
        return ({n: t.detach() for n, t in g.items()} if learner.first_order else g), loss

    def outer(theta, log_lr):
        return outer_loss(learner, theta, log_lr, x, y, gradient, learner.loss)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        grads, loss = grad_and_value(outer, argnums=(0, 1))(learner.theta(), learner.log_lr())
    names = [n for n, p in learner.named_parameters() if p.requires_grad]
    return dict(zip(names, [t for tree in grads for t in tree.values()], strict=True)), loss


def outer_loss(learner, theta, log_lr, x, y, gradient_of, loss_of) -> torch.Tensor:
    """Predict a chunk, learn it, go on; the last one is only predicted. gradient_of: (g, loss)."""
    phi, rates, state, total = theta, learner.rates(log_lr), learner.start(theta), 0.0
    *support, last = learner.plan(x, y)
    for xj, yj, weight, factor in support:
        g, loss = gradient_of(phi, xj, yj)
        total = total + weight * loss
        phi, state = learner.learn(phi, g, rates, state, factor)
    xj, yj, weight, _ = last
    return total + weight * loss_of(phi, xj, yj)


# What is wrong with meta_grad is memory: it keeps the graph of the whole inner loop. The rest of
# this file computes the same gradients with the activations of one chunk alive.

# --------------------------------------------------------------------------------------------------
# inner updates: new tensors from old ones, so that autograd can follow


def sgd(phi: Tensors, g: Tensors, rates: Tensors, state):
    return {n: p - rates[n] * g[n] for n, p in phi.items()}, state


def adamw(phi: Tensors, g: Tensors, rates: Tensors, state, beta1=0.9, beta2=0.95):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101, algorithm 2) without weight decay."""
    m, v, t = state[0], state[1], state[2] + 1
    m = {n: beta1 * m[n] + (1 - beta1) * g[n] for n in g}
    v = {n: beta2 * v[n] + (1 - beta2) * g[n] * g[n] for n in g}
    ones_m, ones_v = 1 - beta1**t, 1 - beta2**t  # what they are for gradients of 1
    root = {n: (v[n] / ones_v + 1e-16).sqrt() + 1e-8 for n in g}  # 1e-16: a derivative at g = 0
    phi = {n: p - rates[n] * (m[n] / ones_m) / root[n] for n, p in phi.items()}
    return phi, (m, v, t)


def adamw_start(phi: Tensors):
    return zeros_like(phi), zeros_like(phi), new_tensor(phi, 0.0)


def clip(g: Tensors, largest: float) -> Tensors:
    """g, scaled down to the norm `largest` where it is longer; 0 is no bound."""
    if not largest:
        return g
    square = sum(t.square().sum() for t in g.values())
    scale = largest / square.clamp(min=largest**2).sqrt()
    return {n: t * scale for n, t in g.items()}


def zeros_like(tree: Tensors) -> Tensors:
    return {n: torch.zeros_like(t) for n, t in tree.items()}


def new_tensor(like: Tensors, value) -> torch.Tensor:
    p = next(iter(like.values()))
    return torch.tensor(value, dtype=p.dtype).to(p.device, non_blocking=True)  # waits for no GPU


UPDATES = {"sgd": (sgd, lambda phi: ()), "adamw": (adamw, adamw_start)}
SCHEDULES = {"constant": lambda t: 1.0, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t))}
OBJECTIVES = {"every": lambda n: [1 / n] * n, "final": lambda n: [0.0] * (n - 1) + [1.0]}
RATE_SHAPES = {"no": None, "tensor": lambda p: (), "element": lambda p: p.shape}


def choose(table: dict, word: str):
    if word not in table:
        raise ValueError(f"{word!r} is unknown to MAML: choose {' or '.join(map(repr, table))}")
    return table[word]


# --------------------------------------------------------------------------------------------------
# the learner: a module from a task to a scalar


class MAML(nn.Module):
    """forward maps a task, x and y (B, T) with B a multiple of inner_steps + 1, to its outer loss.

    learn_inner_lr: 'no', or a learned rate for each parameter 'tensor' or 'element', the same in
    all inner steps and at first inner_lr. inner_clip bounds the norm of each inner gradient, in
    training and reading alike (0: no bound). inner_schedule: 'constant' or 'cosine', after
    inner_warmup steps. autocast: the dtype of the products inside the loss. Parameters of the
    model that require no gradient stay as they are. ValueError for an unknown word.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_steps: int = 1,
        inner_lr: float = 0.02,
        inner_optimizer: str = "sgd",
        first_order: bool = False,
        objective: str = "every",
        learn_inner_lr: str = "no",
        inner_clip: float = 0.0,
        compile: bool = False,
        autocast: torch.dtype | None = None,
        inner_schedule: str = "constant",
        inner_warmup: int = 0,
    ):
        super().__init__()
        if inner_lr <= 0 or min(inner_steps, inner_warmup, inner_clip) < 0:
            raise ValueError("inner_lr must be positive; inner_steps, _warmup, _clip not negative")
        self.model, self.inner_steps, self.inner_lr = model, inner_steps, inner_lr
        self.update, self.start = choose(UPDATES, inner_optimizer)
        self.schedule, self.inner_warmup = choose(SCHEDULES, inner_schedule), inner_warmup
        self.first_order, self.inner_clip, self.autocast = first_order, inner_clip, autocast
        self.weights = choose(OBJECTIVES, objective)(inner_steps + 1)
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.log_inner_lr = nn.ParameterList()
        if (shape_of := choose(RATE_SHAPES, learn_inner_lr)) and inner_steps:
            theta = self.theta().values()
            self.log_inner_lr.extend(p.new_full(shape_of(p), math.log(inner_lr)) for p in theta)
        # Whole functions are compiled: a compiled loss under an eager grad would run uncompiled.
        whole = partial(torch.compile, fullgraph=True, dynamic=False) if compile else lambda f: f
        self.compiled_loss = whole(self.loss)
        self.compiled_gradient = whole(self.gradient)
        self.compiled_step = whole(self.summed_step)
        self.compiled_product = whole(self.hessian_product)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        theta, log_lr = self.theta(), self.log_lr()
        if self.inner_steps == 0:
            return self.compiled_loss(theta, x, y)
        if self.first_order:
            return self.first_order_loss(theta, log_lr, x, y)
        gradient = self.differentiable_gradient
        return outer_loss(self, theta, log_lr, x, y, gradient, self.compiled_loss)

    def theta(self) -> Tensors:
        named = dict(self.model.named_parameters())
        return {n: named[n] for n in self.names}

    def log_lr(self) -> Tensors:
        return dict(zip(self.names, self.log_inner_lr, strict=False))  # {} where none is learned

    def rates(self, log_lr: Tensors) -> Tensors:
        if log_lr:
            return {n: t.exp() for n, t in log_lr.items()}
        return dict.fromkeys(self.names, new_tensor(self.theta(), self.inner_lr))

    @torch.no_grad()
    def bound_rates(self):
        """To be called after each outer step: rates stay within a factor of 150 of inner_lr.

        An element whose gradient is seldom other than zero may be pushed one way for ever. Then
        comes a text where it is not zero, and phi is thrown far off.
        """
        for rate in self.log_inner_lr:
            rate.clamp_(math.log(self.inner_lr / 150), math.log(self.inner_lr * 150))

    def plan(self, x, y) -> list[tuple]:
        """(x_j, y_j, weight in the outer loss, factor of the rates) for each chunk of a task."""
        n = self.inner_steps + 1
        if x.size(0) % n:
            raise ValueError(f"{x.size(0)} rows are no {n} equal chunks: use a multiple of {n}")
        weights = new_tensor(self.theta(), self.weights)
        return list(zip(x.chunk(n), y.chunk(n), weights, self.factors(n), strict=True))

    def factors(self, n: int) -> torch.Tensor:
        """What the schedule multiplies the rates with, at each of the n chunks of a text."""
        w = min(self.inner_warmup, n)
        warmup = [(j + 1) / (w + 1) for j in range(w)]
        return new_tensor(self.theta(), warmup + [self.schedule(j / (n - w)) for j in range(n - w)])

    def learn(self, phi, g, rates, state, factor):
        """The step of the inner loop, the only one."""
        now = {n: factor * rate for n, rate in rates.items()}
        return self.update(phi, clip(g, self.inner_clip), now, state)

    @torch.no_grad()
    def read(self, x: torch.Tensor, y: torch.Tensor, rows: int = 1, repeat: int = 1):
        """Reads P passages side by side, x and y (P, R, T): each chunk is predicted, then learned.

        Returns the loss of each row's chunk before it was learned, (P, R), and every passage's phi
        at the end, (P, ...) by name. A chunk has `rows` rows and is learned `repeat` times.
        vmap(step) is step for all passages at once, each with a phi of its own.
        """

        def step(phi, state, x, y, factor):
            g, loss = self.gradient(phi, x, y)
            return loss, *self.learn(phi, g, rates, state, factor)

        phi = {n: p.detach().expand(len(x), *p.shape) for n, p in self.theta().items()}
        rates, state, losses = self.rates(self.log_lr()), vmap(self.start)(phi), []
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap
            chunks = list(zip(x.split(rows, 1), y.split(rows, 1), strict=True))  # (P, rows, T)
            for chunk, factor in zip(chunks, self.factors(len(chunks)), strict=True):
                for again in range(repeat):
                    loss, phi, state = vmap(step, (0, 0, 0, 0, None))(phi, state, *chunk, factor)
                    losses += [] if again else [loss] * chunk[0].size(1)
        return torch.stack(losses, 1), phi

    def loss(self, phi: Tensors, x, y) -> torch.Tensor:
        kind = x.device.type
        with torch.autocast(kind, self.autocast, self.autocast is not None, cache_enabled=False):
            return functional_call(self.model, phi, (x, y))[1]  # tied weights stay tied

    def gradient(self, phi: Tensors, x, y) -> tuple[Tensors, torch.Tensor]:
        return grad_and_value(self.loss)(phi, x, y)

    # ----------------------------------------------------------------------------------------------
    # First order. With every g_j a constant, d phi_j / d theta = 1. Each update is phi less alpha
    # times something that depends on gradients alone, so d phi_j / d log alpha = phi_j - theta.
    # Hence, whatever the optimizer, the schedule and the clipping:
    #
    #     d outer / d theta     = sum_j w_j g_j
    #     d outer / d log alpha = sum_j w_j g_j * (phi_j - theta)
    #
    # For SGD phi_j - theta = -alpha (g_0 + ... + g_j-1): a rate grows where a gradient agrees with
    # the ones before it, and shrinks where they contradict each other.

    def first_order_loss(self, theta: Tensors, log_lr: Tensors, x, y) -> torch.Tensor:
        with torch.no_grad():
            sums = new_tensor(theta, 0.0), zeros_like(theta), zeros_like(log_lr)
            phi = {n: p.clone() for n, p in theta.items()}  # theta itself would be compiled apart
            rates, state = self.rates(log_lr), self.start(theta)
            for chunk in self.plan(x, y):
                sums, phi, state = self.compiled_step(sums, theta, phi, rates, state, *chunk)
        total, *gradients = sums
        # A term that adds nothing to the value, and to each parameter's gradient its sum
        pairs = [(p[n], d[n]) for p, d in zip((theta, log_lr), gradients, strict=True) for n in d]
        linear = sum((p * d).sum() for p, d in pairs)
        return total + (linear - linear.detach())

    def summed_step(self, sums, theta, phi, rates, state, x, y, weight, factor):
        """One inner step, and what it adds to the outer loss and to its two gradients.

        The last chunk is learned in vain, so that all chunks are one graph to compile.
        """
        total, d_theta, d_log_lr = sums
        g, loss = self.gradient(phi, x, y)
        weighted = {n: weight * t for n, t in g.items()}
        for n, d in d_theta.items():
            d += weighted[n]  # d_log_lr not so: compiled, scalars stayed zero (torch 2.13)
        d_log_lr = {
            n: d + (weighted[n] * (phi[n] - theta[n])).sum_to_size(d.shape)  # () for a tensor's
            for n, d in d_log_lr.items()
        }
        phi, state = self.learn(phi, g, rates, state, factor)
        return (total + weight * loss, d_theta, d_log_lr), phi, state

    # ----------------------------------------------------------------------------------------------
    # Second order: the definition, with a gradient whose derivative is computed when asked for.

    def differentiable_gradient(self, phi: Tensors, x, y) -> tuple[Tensors, torch.Tensor]:
        *g, loss = SecondOrder.apply(self, x, y, *phi.values())
        return dict(zip(phi, g, strict=True)), loss

    def hessian_product(self, phi: Tensors, v: Tensors, x, y) -> tuple[Tensors, Tensors]:
        """g and H v, in one of two ways, since H is symmetric: jvp pushes v forward through the
        gradient, keeps no tape and wins compiled; vjp pulls v back and wins eagerly."""
        gradient = partial(grad(self.loss), x=x, y=y)
        with sdpa_kernel(SDPBackend.MATH), CausalInBlocks():  # outside, it would not be compiled
            if torch.compiler.is_compiling():
                return jvp(gradient, (phi,), (v,))
            with torch.enable_grad():
                g, pull = vjp(gradient, phi)
                return g, pull(v)[0]


class SecondOrder(torch.autograd.Function):
    """(learner, x, y, *phi) -> (*g, loss), which keeps phi and no graph.

    phi is due d_loss * g + H d_g. The Hessian product is computed afresh from phi, so the
    activations of one step are alive (as in MixFlow-MG, Kemaev et al. 2025, arXiv 2505.00793).
    """

    @staticmethod
    def forward(ctx, learner, x, y, *phi):
        phi = dict(zip(learner.names, (p.detach() for p in phi), strict=True))
        g, loss = learner.compiled_gradient(phi, x, y)
        ctx.learner, ctx.batch = learner, (x, y)
        ctx.save_for_backward(*phi.values())
        return *g.values(), loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_outputs):
        *d_g, d_loss = d_outputs
        phi = dict(zip(ctx.learner.names, ctx.saved_tensors, strict=True))
        # Cloned, since compiled with a v that shares memory with phi it is wrong and says nothing.
        v = {n: t.clone() for n, t in zip(phi, d_g, strict=True)}
        g, hv = ctx.learner.compiled_product(phi, v, *ctx.batch)
        return None, None, None, *(d_loss * g[n] + hv[n] for n in phi)


class CausalInBlocks(TorchFunctionMode):
    """Causal attention that can be differentiated twice, as no fused kernel can.

    Four blocks of queries, each against the keys up to it, in plain operations: 10 of the 16 blocks
    of scores that SDPBackend.MATH computes and masks. Any other call of attention goes to MATH.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        causal = kwargs == {"is_causal": True} and len(args) == 3
        if func is not F.scaled_dot_product_attention or not causal:
            return func(*args, **(kwargs or {}))
        q, k, v = args  # (..., T, head size)
        out, size = [], -(-q.size(-2) // 4)
        for i in range(0, q.size(-2), size):
            scores = q[..., i : i + size, :] @ k[..., : i + size, :].mT / q.size(-1) ** 0.5
            future = scores.new_full(scores.shape[-2:], -torch.inf).triu(i + 1)
            out.append((scores + future).softmax(-1) @ v[..., : i + size, :])
        return torch.cat(out, -2)
