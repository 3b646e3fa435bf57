"""Model-agnostic meta-learning for any module whose forward(x, y) returns (logits, loss).

A task is rows of text, cut into K + 1 equal chunks, K = inner_steps. Two loops learn:

    inner   phi_0 = theta,   g_j = gradient of L_j at phi_j,   d_j, state = direction(g_j, state)
            phi_j+1 = phi_j - factor_j alpha d_j
    outer   theta and alpha take a step down the gradient of   sum_j w_j L_j(phi_j)

Each chunk is predicted, then learned. So the outer loss is low where learning one chunk helps with
the next. A direction is what makes an optimizer: SGD's is g, AdamW's is m / sqrt(v). factor_j is
the learning-rate schedule. alpha = exp(log_inner_lr) is one number, or is learned: one for each
tensor, or for each element (Meta-SGD, Li et al. 2017, arXiv 1707.09835). objective='every' weighs
all chunks alike: how fast a text is learned (Antoniou et al. 2019, arXiv 1810.09502). 'final'
counts the last chunk alone: how well (Finn et al. 2017, arXiv 1703.03400). K = 0 is plain training.

The outer gradient comes in two orders, at these costs (F: a forward pass over one chunk):

    plain training   3 (K + 1) F     a gradient is a forward, and a backward of twice its cost
    first order      3 (K + 1) F     takes each g_j for a constant: two sums beside the inner loop
    second order    (12 K + 3) F     exact: g_j, g_j computed again, and 6 F to go through it

Results of this repository are first order, unless they say otherwise.

The README's example keeps weights in dicts by name. Here theta, phi, g, d and alpha are vectors:
the N elements of all parameters that learn, end to end. An update is one kernel then, not one for
each of a hundred tensors. by_name(phi) gives the model its parameters back, as views.
"""

import math
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# Kernels of fused attention have no second derivative, and no rule for vmap. MATH has both.
unfused = partial(sdpa_kernel, SDPBackend.MATH)
SIDE_BY_SIDE = 50_000_000  # parameters, in all passages that are read at once


def meta_grad(learner: "MAML", x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients by name, outer loss) of a task x, y (B, T): the definition, in torch's own words.

    learner.loss(phi, x, y) runs the model with phi instead of its own parameters, by
    torch.func.functional_call. grad_and_value(f)(a) is (df/da, f(a)): values, nothing lands in
    .grad. It can be differentiated again: here the outer one goes through the inner ones. An
    optimizer's step() cannot be, since it overwrites theta.

    Training computes the same with the activations of one chunk alive: the tests compare them.
    """

    def gradient(phi, x, y):
        g, loss = learner.gradient(phi, x, y)
        return (g.detach() if learner.first_order else g), loss

    def outer(parameters):
        return outer_loss(learner, *learner.vectors(parameters), x, y, gradient)

    # detached, since grad_and_value tracks its argument itself
    parameters = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
    with unfused():
        return grad_and_value(outer)(parameters)


def outer_loss(learner: "MAML", theta: Tensor, log_lr: Tensor | None, x, y, gradient) -> Tensor:
    """Learns all chunks of a task but the last, which is only predicted. A scalar."""
    *support, last = learner.chunks(x, y)
    losses, phi = inner_loop(learner, theta, log_lr, support, partial(learner.step, gradient))
    losses.append(learner.last_loss(phi, *last))
    return learner.constant(learner.loss_weights) @ torch.stack(losses)  # of K + 1 each


def inner_loop(learner: "MAML", theta: Tensor, log_lr: Tensor | None, chunks: list, step):
    """Learns chunks [(x_j, y_j), ...], each (rows, T), one after the other, beginning at theta.

    step is learner.step with a gradient of the caller's choice. Returns the chunks' losses, each
    before it was learned, and phi (N,) after the last.
    """
    alpha = learner.constant(learner.inner_lr)
    if log_lr is not None:
        alpha = learner.by_element(log_lr.exp())  # (N,)
    phi, state, losses = theta, learner.start(theta), []
    for chunk, factor in zip(chunks, learner.factors(len(chunks)), strict=True):
        loss, phi, state = step(phi, factor, alpha, state, *chunk)
        losses.append(loss)
    return losses, phi


# --------------------------------------------------------------------------------------------------
# inner optimizers: direction(g (N,), state, layout) -> d (N,), state, and their first state.
# New tensors are made from old ones, nothing is written in place: autograd and vmap must follow.
# layout has (shape, whether it is a matrix and no embedding) for each tensor, in g's order.


def sgd(g, state, layout):
    return g, state


def adamw(g, state, layout, beta1=0.9, beta2=0.95):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101, algorithm 2) without weight decay."""
    m, v, bias1, bias2 = state
    m, bias1 = beta1 * m + (1 - beta1) * g, beta1 * bias1 + (1 - beta1)
    v, bias2 = beta2 * v + (1 - beta2) * g * g, beta2 * bias2 + (1 - beta2)
    # 1e-24: sqrt has no slope at 0
    return (m / bias1) / ((v / bias2 + 1e-24).sqrt() + 1e-8), (m, v, bias1, bias2)


def adamw_start(theta):
    return (torch.zeros_like(theta),) * 2 + (theta.new_zeros(()),) * 2


def normed(g, state, layout):
    """Each tensor of g with a root mean square of 1, so that no step is longer than its rates say.

    Matrices are divided by the root mean square of each row, then of each column, both with a
    tenth of the mean for rows and columns that have next to nothing (as Adafactor factors second
    moments, Shazeer & Stern 2018, arXiv 1804.04235, but of this one gradient).
    """
    parts = []
    for part, (shape, matrix) in zip(g.split([s.numel() for s, _ in layout]), layout, strict=True):
        part = part.view(shape)
        for dim in (1, 0) if matrix else (tuple(range(part.dim())),):
            square = part.square().mean(dim, keepdim=True)
            part = part * (square + 0.1 * square.mean() * matrix + 1e-30).rsqrt()
        parts.append(part.flatten())
    return torch.cat(parts), state


def nothing(theta):
    return ()  # an optimizer without a state


DIRECTIONS = {"sgd": (sgd, nothing), "adamw": (adamw, adamw_start), "normed": (normed, nothing)}
SCHEDULES = {"constant": lambda t: 1.0, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t))}
OBJECTIVES = {"every": lambda n: [1 / n] * n, "final": lambda n: [0.0] * (n - 1) + [1.0]}


def choose(table: dict, word: str):
    if word not in table:
        raise ValueError(f"there is no {word!r}: choose {' or '.join(map(repr, table))}")
    return table[word]


# --------------------------------------------------------------------------------------------------
# the learner: a module from a task to a scalar


class MAML(nn.Module):
    """forward maps a task, x and y (B, T) with B a multiple of inner_steps + 1, to its outer loss.

    inner_optimizer is a key of DIRECTIONS, objective of OBJECTIVES. inner_schedule, of SCHEDULES,
    begins after inner_warmup steps of linear warm-up. learn_inner_lr: 'no', or a learned rate for
    each 'tensor' or 'element', from inner_lr on. autocast: the dtype of matrix products.
    Parameters that require no gradient when the learner is made are frozen: the inner loop skips
    them too. In second order use backward(): torch.autograd.grad raises on reentrant checkpoints.
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
        compile: bool = False,
        autocast: torch.dtype | None = None,
        inner_schedule: str = "constant",
        inner_warmup: int = 0,
    ):
        super().__init__()
        if min(inner_steps, inner_warmup) < 0 or (inner_steps and not 0 < inner_lr < math.inf):
            raise ValueError("inner_lr must be positive, inner_steps and inner_warmup at least 0")
        self.model, self.inner_steps, self.inner_lr = model, inner_steps, inner_lr
        self.direction, self.start = choose(DIRECTIONS, inner_optimizer)
        self.schedule, self.inner_warmup = choose(SCHEDULES, inner_schedule), inner_warmup
        self.first_order, self.autocast = first_order, autocast
        self.loss_weights = choose(OBJECTIVES, objective)(inner_steps + 1)
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if inner_steps and len({(p.dtype, p.device) for p in learning.values()}) != 1:
            raise ValueError("the inner loop needs parameters to learn, of one dtype and device")
        tables = [id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)]
        self.layout = [(p.shape, p.dim() == 2 and id(p) not in tables) for p in learning.values()]
        self.names, self.sizes = [*learning], [p.numel() for p in learning.values()]
        counts = {"no": 0, "tensor": len(self.sizes), "element": sum(self.sizes)}
        self.log_inner_lr = None
        if (count := choose(counts, learn_inner_lr)) and inner_steps:
            self.log_inner_lr = nn.Parameter(self.constant(math.log(inner_lr)).repeat(count))
        self.last_loss = self.loss
        if compile:  # outer functions: a compiled loss in an eager grad would run uncompiled
            whole = partial(torch.compile, fullgraph=True, dynamic=False)
            self.plain_loss, self.last_loss = whole(self.plain_loss), whole(self.loss)
            self.first_order_step = whole(self.first_order_step)
            self.unfused_gradient = whole(self.unfused_gradient)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.inner_steps == 0:
            return self.plain_loss(x, y)
        theta, log_lr = self.vectors()
        if self.first_order:
            return self.first_order_loss(theta, log_lr, x, y)
        # checkpoint stores only phi for each inner step. The gradient is computed again, with its
        # graph, when autograd comes back. torch's other kind of checkpoint (use_reentrant=False)
        # works by hooks, which torch.func forbids.
        gradient = partial(checkpoint, self.unfused_gradient, use_reentrant=True)
        return outer_loss(self, theta, log_lr, x, y, gradient)

    # ----------------------------------------------------------------------------------------------
    # the inner loop's parts

    def vectors(self, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """theta (N,), and log_inner_lr or None. parameters: to be used instead of the learner's."""
        named = dict(self.named_parameters()) | (parameters or {})
        theta = torch.cat([named[f"model.{n}"].flatten() for n in self.names])
        return theta, named.get("log_inner_lr")

    def by_name(self, phi: Tensor) -> dict[str, Tensor]:
        """The model's parameters, views of phi (N,)."""
        parts = zip(self.names, self.layout, phi.split(self.sizes), strict=True)
        return {name: part.view(shape) for name, (shape, _), part in parts}

    def chunks(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        n = self.inner_steps + 1
        if x.size(0) % n:
            raise ValueError(f"{x.size(0)} rows are no {n} equal chunks: use a multiple of {n}")
        return list(zip(x.chunk(n), y.chunk(n), strict=True))  # of (B / n, T)

    def by_element(self, rates: Tensor) -> Tensor:
        """(N,), of rates that are one a tensor, or one an element already."""
        if len(rates) == sum(self.sizes):
            return rates
        return torch.cat([r.expand(n) for r, n in zip(rates, self.sizes, strict=True)])

    def factors(self, n: int) -> Tensor:
        """What the schedule multiplies the rates with, at each of n chunks.

        A schedule spans the K steps of a task. A text of more chunks begins it again and again.
        """
        K, w = max(1, self.inner_steps), min(self.inner_warmup, self.inner_steps)
        warmup = [(j + 1) / (w + 1) for j in range(w)]
        span = warmup + [self.schedule(j / (K - w)) for j in range(K - w)]
        return self.constant([span[j % K] for j in range(n)])

    def step(self, gradient, phi, factor, alpha, state, x, y):
        """The inner step: the loss before it, and phi and the optimizer's state after it.

        gradient(phi, x, y) returns (g (N,), loss).
        """
        g, loss = gradient(phi, x, y)
        d, state = self.direction(g, state, self.layout)
        return loss, torch.addcmul(phi, factor * alpha, d, value=-1), state  # phi - factor alpha d

    def loss(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.model_loss(self.by_name(phi), x, y)

    def gradient(self, phi: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(g (N,), loss).

        vjp returns the loss and a function that computes its gradient. Unlike grad_and_value it
        builds no graph of that computation where gradients are off, as in first order.
        """
        loss, backward = vjp(lambda phi: self.loss(phi, x, y), phi)
        return backward(torch.ones_like(loss))[0], loss

    def model_loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The model's loss. Parameters that are not given are its own."""
        kind = x.device.type
        with torch.autocast(kind, self.autocast, self.autocast is not None, cache_enabled=False):
            return functional_call(self.model, parameters, (x, y))[1]  # tied weights stay tied

    def plain_loss(self, x, y):
        return self.model_loss(dict(self.model.named_parameters()), x, y)

    def unfused_gradient(self, phi, x, y):
        with unfused():  # inside, since contexts outside a compiled function are not compiled
            return self.gradient(phi, x, y)

    def constant(self, value) -> Tensor:
        p = self.model.get_parameter(self.names[0])
        made = torch.tensor(value, dtype=p.dtype)
        return made.to(p.device, non_blocking=True)  # waits for no GPU

    # ----------------------------------------------------------------------------------------------
    # First order. With every g_j a constant, d_j is constant too, so d phi_j / d theta = 1. And
    # phi_j is theta less alpha times what depends on gradients alone, so d phi_j / d log alpha =
    # phi_j - theta. Hence, whatever the optimizer and the schedule (a tensor's rate gets the sum
    # over its elements):
    #
    #     d outer / d theta     = sum_j w_j g_j
    #     d outer / d log alpha = sum_j w_j g_j * (phi_j - theta)
    #
    # For SGD phi_j - theta = -alpha (g_0 + ... + g_j-1): a rate grows where a gradient agrees with
    # the ones before it, and shrinks where they contradict each other.

    def first_order_loss(self, theta: Tensor, log_lr: Tensor | None, x, y) -> Tensor:
        with torch.no_grad():
            d_theta = torch.zeros_like(theta)
            d_log_lr = None if log_lr is None else torch.zeros_like(theta)
            weights = self.constant(self.loss_weights)
            chunks = [(*xy, w) for xy, w in zip(self.chunks(x, y), weights, strict=True)]
            step = partial(self.first_order_step, theta, d_theta, d_log_lr)
            # The last chunk is learned too, though that phi is not used: it shares a graph.
            losses, _ = inner_loop(self, theta.detach(), log_lr, chunks, step)
            total = weights @ torch.stack(losses)
        # Backward must leave d_theta in the gradient of theta, as DDP awaits: theta @ d_theta has
        # that gradient. Less its own value, it adds nothing to the loss.
        linear = theta @ d_theta
        if log_lr is not None:
            linear = linear + self.by_element(log_lr) @ d_log_lr
        return total + (linear - linear.detach())

    def first_order_step(self, theta, d_theta, d_log_lr, phi, factor, alpha, state, x, y, weight):
        """The inner step, whose gradient adds to both sums, in place: none differentiates them."""

        def gradient(phi, x, y):
            g, loss = self.gradient(phi, x, y)
            d_theta.addcmul_(g, weight)
            if d_log_lr is not None:
                d_log_lr.addcmul_((phi - theta).mul_(g), weight)
            return g, loss

        return self.step(gradient, phi, factor, alpha, state, x, y)

    @torch.no_grad()
    def bound_rates(self):
        """To be called after each outer step: rates stay within a factor of 150 of inner_lr.

        An element whose gradient is seldom other than zero may be pushed one way for ever. Then
        comes a text where it is not zero, and phi is thrown far off.
        """
        if self.log_inner_lr is not None:
            self.log_inner_lr.clamp_(math.log(self.inner_lr / 150), math.log(self.inner_lr * 150))

    # ----------------------------------------------------------------------------------------------
    # reading: test-time training, the same inner loop over a passage of any length

    @torch.no_grad()
    def read(self, x: Tensor, y: Tensor, rows: int = 1) -> tuple[Tensor, Tensor]:
        """Test-time training on passages x and y (P, R, T), each of them from theta on.

        Each chunk of `rows` rows is predicted, then learned. Returns the loss of each row's chunk
        before it was learned, (P, R), and phi (n, N) after the last n passages: of those that were
        read side by side, since each needs a copy of the parameters.
        """
        theta, log_lr = self.vectors()

        def one(x, y):  # (R, T)
            chunks = list(zip(x.split(rows), y.split(rows), strict=True))
            losses, phi = inner_loop(self, theta, log_lr, chunks, partial(self.step, self.gradient))
            return torch.stack(losses), phi

        # autocast does not reach into what vmap takes apart: attention, and layers with biases
        n, losses = 1 if self.autocast else max(1, SIDE_BY_SIDE // len(theta)), []
        for xs, ys in zip(x.split(n), y.split(n), strict=True):
            if len(xs) == 1:
                loss, phi = (t[None] for t in one(xs[0], ys[0]))
            else:
                with unfused():  # vmap runs one function on all passages at once
                    loss, phi = vmap(one, randomness="different")(xs, ys)
            losses.append(loss)
        counts = torch.tensor([len(part) for part in x[0].split(rows)], device=x.device)
        return torch.cat(losses).repeat_interleave(counts, 1), phi
