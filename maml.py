"""Model-agnostic meta-learning for any module whose forward(x, y) returns (logits, loss).

A task is rows of text, cut into K + 1 equal chunks, K = inner_steps. Two loops learn:

    inner   phi_0 = theta,   phi_j+1 = update(phi_j, g_j, alpha),   g_j = grad L_j(phi_j)
    outer   theta and alpha take a step down the gradient of   sum_j w_j L_j(phi_j)

Each chunk is predicted, then learned, so the outer loss is low where learning one chunk helps with
the next. objective='every' sets each w_j to 1 / (K + 1): how fast a text is learned (Antoniou et
al. 2019, arXiv 1810.09502). 'final' sets w_K to 1 and the others to 0: how well (Finn et al. 2017,
arXiv 1703.03400). K = 0 is plain training. The rates alpha = exp(log_inner_lr) may be learned too,
one a tensor or one an element (Meta-SGD, Li et al. 2017, arXiv 1707.09835). Costs, in forwards F
of one chunk:

    plain training   3 (K + 1) F     a gradient is a forward and a backward of twice its cost
    first order      3 (K + 1) F     each g_j is treated as a constant: two running sums, no graph
    second order    (12 K + 3) F     exact: one Hessian-vector product, 9 F, for each inner step

With inner_repeats each chunk is learned several times, and K in these costs is that many times K.

theta, phi and g are vectors here: the N elements of all parameters that learn, end to end. alpha
is such a vector too, or a single number.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def meta_grad(learner: "MAML", x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients by name, outer loss) of a task x, y (B, T): the definition, in torch's own words.

    learner.loss(phi, x, y) runs the model with phi instead of its own parameters, by
    torch.func.functional_call, and returns its loss.
    grad_and_value(f) is a function like f that returns (d f / d its first argument, f), and
    learner.gradient is that of learner.loss. It can be differentiated again: here the outer one
    goes through the inner ones. An optimizer's step() has no derivative: it overwrites theta.
    """

    def gradient(phi, x, y):
        g, loss = learner.gradient(phi, x, y)
        return (g.detach() if learner.first_order else g), loss

    def outer(parameters):
        theta, log_lr = learner.vectors(parameters)
        return outer_loss(learner, theta, log_lr, x, y, gradient, learner.loss)

    parameters = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return grad_and_value(outer)(parameters)


def outer_loss(learner, theta, log_lr, x, y, gradient_of, loss_of) -> Tensor:
    """Predict a chunk, learn it, go on; the last one is only predicted. A scalar.

    gradient_of(phi, x, y) returns (g (N,), loss), loss_of(phi, x, y) the loss alone.
    """
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


def sgd(phi, g, rates, state):
    return phi - rates * g, state


def adamw(phi, g, rates, state, beta1=0.9, beta2=0.95):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101, algorithm 2) without weight decay."""
    m, v, t = state[0], state[1], state[2] + 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    ones_m, ones_v = 1 - beta1**t, 1 - beta2**t  # what m and v are if every g is 1
    root = (v / ones_v + 1e-16).sqrt() + 1e-8  # 1e-16: sqrt has no slope at 0
    return phi - rates * (m / ones_m) / root, (m, v, t)


def adamw_start(phi):
    return torch.zeros_like(phi), torch.zeros_like(phi), phi.new_zeros(())


UPDATES = {"sgd": (sgd, lambda phi: ()), "adamw": (adamw, adamw_start)}
SCHEDULES = {"constant": lambda t: 1.0, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t))}
OBJECTIVES = {"every": lambda n: [1 / n] * n, "final": lambda n: [0.0] * (n - 1) + [1.0]}


def choose(table: dict, word: str):
    if word not in table:
        raise ValueError(f"{word!r} is unknown to MAML: choose {' or '.join(map(repr, table))}")
    return table[word]


# --------------------------------------------------------------------------------------------------
# the learner: a module from a task to a scalar


class MAML(nn.Module):
    """forward maps a task, x and y (B, T) with B a multiple of inner_steps + 1, to its outer loss.

    Of the K + 1 chunks inner_steps = K are learned. inner_optimizer is a key of UPDATES, objective
    of OBJECTIVES, inner_schedule of SCHEDULES, which begin after inner_warmup steps of warm-up.
    learn_inner_lr: 'no', or a learned rate for each parameter 'tensor' or 'element'. They start at
    inner_lr, and all inner steps share them. inner_clip bounds the norm of each inner gradient, in
    reading too (0: no bound). inner_repeats: steps on each chunk. autocast: the dtype of the
    products inside the loss. What requires no gradient when the learner is made stays as it is.
    ValueError for an unknown word, and for parameters of several dtypes or devices.
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
        inner_repeats: int = 1,
    ):
        super().__init__()
        if min(inner_lr, inner_repeats) <= 0 or min(inner_steps, inner_warmup, inner_clip) < 0:
            positive = "inner_lr and inner_repeats must be positive"
            raise ValueError(f"{positive}; inner_steps, inner_warmup and inner_clip not negative")
        self.model, self.inner_steps, self.inner_lr = model, inner_steps, inner_lr
        self.update, self.start = choose(UPDATES, inner_optimizer)
        self.schedule, self.inner_warmup = choose(SCHEDULES, inner_schedule), inner_warmup
        self.first_order, self.inner_clip, self.autocast = first_order, inner_clip, autocast
        self.inner_repeats = inner_repeats
        self.weights = choose(OBJECTIVES, objective)(inner_steps + 1)
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if inner_steps and len({(p.dtype, p.device) for p in learning.values()}) != 1:
            raise ValueError("the inner loop needs parameters to learn, of one dtype and device")
        self.shapes = {n: p.shape for n, p in learning.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        counts = {"no": 0, "tensor": len(self.sizes), "element": sum(self.sizes)}
        self.log_inner_lr = None
        if (count := choose(counts, learn_inner_lr)) and inner_steps:
            self.log_inner_lr = nn.Parameter(self.constant(math.log(inner_lr)).repeat(count))
        # Whole functions are compiled: a compiled loss under an eager grad would run uncompiled.
        whole = partial(torch.compile, fullgraph=True, dynamic=False) if compile else lambda f: f
        self.compiled_model_loss = whole(self.model_loss)
        self.compiled_loss = whole(self.loss)
        self.compiled_gradient = whole(self.gradient)
        self.compiled_summed_step = whole(self.summed_step)
        self.compiled_hessian_product = whole(self.hessian_product)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.inner_steps == 0:
            return self.compiled_model_loss(dict(self.model.named_parameters()), x, y)
        theta, log_lr = self.vectors()
        if self.first_order:
            return self.first_order_loss(theta, log_lr, x, y)
        gradient = partial(SecondOrder.apply, self)
        return outer_loss(self, theta, log_lr, x, y, gradient, self.compiled_loss)

    def vectors(self, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """theta (N,), and log_inner_lr or None. parameters: to be used instead of the learner's."""
        named = dict(self.named_parameters()) | (parameters or {})
        theta = torch.cat([named[f"model.{n}"].flatten() for n in self.shapes])
        return theta, named.get("log_inner_lr")

    def by_name(self, phi: Tensor) -> dict[str, Tensor]:
        """The model's parameters, views of phi (N,)."""
        parts = zip(self.shapes.items(), phi.split(self.sizes), strict=True)
        return {n: part.view(shape) for (n, shape), part in parts}

    def by_element(self, rates: Tensor) -> Tensor:
        """(N,) of rates that are one an element already, or one a tensor."""
        if len(rates) == sum(self.sizes):
            return rates
        return torch.cat([r.expand(n) for r, n in zip(rates, self.sizes, strict=True)])

    def rates(self, log_lr: Tensor | None) -> Tensor:
        return self.constant(self.inner_lr) if log_lr is None else self.by_element(log_lr.exp())

    def constant(self, value) -> Tensor:
        p = self.model.get_parameter(next(iter(self.shapes)))
        made = torch.tensor(value, dtype=p.dtype)
        return made.to(p.device, non_blocking=True)  # waits for no GPU

    @torch.no_grad()
    def bound_rates(self):
        """To be called after each outer step: rates stay within a factor of 150 of inner_lr.

        An element whose gradient is seldom other than zero may be pushed one way for ever. Then
        comes a text where it is not zero, and phi is thrown far off.
        """
        if self.log_inner_lr is not None:
            self.log_inner_lr.clamp_(math.log(self.inner_lr / 150), math.log(self.inner_lr * 150))

    def plan(self, x, y) -> list[tuple]:
        """(x_j, y_j, weight in the outer loss, factor of the rates) for each step over a task.

        Of a chunk's repeats the first alone has a weight. The last chunk is predicted once.
        """
        n = self.inner_steps + 1
        if x.size(0) % n:
            raise ValueError(f"{x.size(0)} rows are no {n} equal chunks: use a multiple of {n}")
        weights, steps = self.constant(self.weights), []
        for xj, yj, w, f in zip(x.chunk(n), y.chunk(n), weights, self.factors(n), strict=True):
            steps += [(xj, yj, w, f)] + [(xj, yj, 0 * w, f)] * (self.inner_repeats - 1)
        return steps[: (n - 1) * self.inner_repeats + 1]

    def factors(self, n: int) -> Tensor:
        """What the schedule multiplies the rates with, at each of the n chunks of a text."""
        w = min(self.inner_warmup, n)
        warmup = [(j + 1) / (w + 1) for j in range(w)]
        return self.constant(warmup + [self.schedule(j / (n - w)) for j in range(n - w)])

    def learn(self, phi, g, rates, state, factor):
        """The step of the inner loop, the only one. Returns phi and the optimizer's state."""
        if self.inner_clip:
            norm = g.square().sum().clamp(min=self.inner_clip**2).sqrt()
            g = g * (self.inner_clip / norm)
        return self.update(phi, g, factor * rates, state)

    @torch.no_grad()
    def read(self, x: Tensor, y: Tensor, rows: int = 1) -> tuple[Tensor, Tensor]:
        """Reads P passages side by side, x and y (P, R, T): each chunk is predicted, then learned.

        Returns the loss of each row's chunk before it was learned, (P, R), and every passage's phi
        at the end, (P, N). A chunk has `rows` rows. vmap(step) is step for all passages at once,
        each with a phi of its own.
        """

        def step(phi, state, x, y, factor):
            g, loss = self.gradient(phi, x, y)
            return loss, *self.learn(phi, g, rates, state, factor)

        theta, log_lr = self.vectors()
        phi, rates, losses = theta.expand(len(x), -1), self.rates(log_lr), []
        state = vmap(self.start)(phi)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap
            chunks = list(zip(x.split(rows, 1), y.split(rows, 1), strict=True))  # (P, rows, T)
            for chunk, factor in zip(chunks, self.factors(len(chunks)), strict=True):
                for again in range(self.inner_repeats):
                    loss, phi, state = vmap(step, (0, 0, 0, 0, None))(phi, state, *chunk, factor)
                    if not again:
                        losses += [loss] * chunk[0].size(1)  # a row's loss is its chunk's
        return torch.stack(losses, 1), phi

    def model_loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The model's loss. Parameters that are not given are its own."""
        kind = x.device.type
        with torch.autocast(kind, self.autocast, self.autocast is not None, cache_enabled=False):
            return functional_call(self.model, parameters, (x, y))[1]  # tied weights stay tied

    def loss(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.model_loss(self.by_name(phi), x, y)

    def gradient(self, phi: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
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

    def first_order_loss(self, theta: Tensor, log_lr: Tensor | None, x, y) -> Tensor:
        with torch.no_grad():
            rates, state, total = self.rates(log_lr), self.start(theta), 0.0
            d_theta = torch.zeros_like(theta)
            d_log_lr = None if log_lr is None else torch.zeros_like(theta)
            fixed = (d_theta, d_log_lr, theta.detach())
            phi = theta.detach()  # one object twice would be compiled as a second graph
            for chunk in self.plan(x, y):
                loss, phi, state = self.compiled_summed_step(*fixed, phi, rates, state, *chunk)
                total = total + loss
        # This adds 0 to the value, d_theta to theta's gradient, d_log_lr to that of log_lr.
        linear = theta @ d_theta
        if log_lr is not None:
            linear = linear + self.by_element(log_lr) @ d_log_lr
        return total + (linear - linear.detach())

    def summed_step(self, d_theta, d_log_lr, theta, phi, rates, state, x, y, weight, factor):
        """One inner step: adds to the two sums; returns its part of the outer loss, phi and state.

        The phi after the last chunk is not used. All chunks share one compiled graph that way.
        """
        g, loss = self.gradient(phi, x, y)
        weighted = weight * g
        d_theta += weighted
        if d_log_lr is not None:
            d_log_lr += weighted * (phi - theta)
        return weight * loss, *self.learn(phi, g, rates, state, factor)

    # ----------------------------------------------------------------------------------------------
    # Second order: the definition, with a gradient whose derivative is computed when asked for.

    def hessian_product(self, phi: Tensor, v: Tensor, x, y) -> tuple[Tensor, Tensor]:
        """g and H v, in one of two ways, since H is symmetric: jvp pushes v forward through the
        gradient, without a tape: faster compiled. vjp pulls v back: faster eagerly."""
        gradient = partial(grad(self.loss), x=x, y=y)
        with sdpa_kernel(SDPBackend.MATH), CausalInBlocks():  # here: modes outside are not compiled
            if torch.compiler.is_compiling():
                return jvp(gradient, (phi,), (v,))
            with torch.enable_grad():
                g, pull = vjp(gradient, phi)
                return g, pull(v)[0]


class SecondOrder(torch.autograd.Function):
    """(learner, phi, x, y) -> (g, loss), which keeps phi and no graph.

    The gradient for phi is d_loss * g + H d_g. The Hessian product is computed afresh from phi, so
    the activations of one step are alive (MixFlow-MG, Kemaev et al. 2025, arXiv 2505.00793).
    """

    @staticmethod
    def forward(ctx, learner, phi, x, y):
        ctx.learner = learner
        ctx.save_for_backward(phi, x, y)
        return learner.compiled_gradient(phi.detach(), x, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_g, d_loss):
        phi, x, y = ctx.saved_tensors
        # Cloned: compiled, the product is silently wrong if v shares memory with phi.
        g, hv = ctx.learner.compiled_hessian_product(phi.detach(), d_g.clone(), x, y)
        return None, d_loss * g + hv, None, None


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
