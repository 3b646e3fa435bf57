"""Model-agnostic meta-learning for any module whose forward(x, y) returns (logits, loss). This docstring is the lesson.

A task is one batch of one domain, its rows cut into K + 1 equal chunks, K = inner_steps. Two loops learn:

    inner, in trajectory    phi_0 = theta,  phi_k+1 = update(phi_k, g_k),  g_k = grad L_k(phi_k)
                            chunk after chunk, as any LLM is trained; update: SGD or AdamW, with a schedule
    outer, in forward       L_K(phi_K), or the mean of all L_k(phi_k): how well, or how fast, the task was learned
                            theta <- AdamW(theta, d outer / d theta), differentiated through the whole inner loop

Finn et al. 2017 (arXiv 1703.03400) take the first outer loss, objective='final'. objective='every' is the area under
the task's learning curve (the multi-step loss of Antoniou et al. 2019, arXiv 1810.09502, with equal weights):
every token is predicted once, just before it is learned. With K = 0 both are L_0(theta): plain training, bit for bit.

For K = 1 and SGD this is all of it, exact, in torch's own words:

    def loss(phi, x, y): return functional_call(model, phi, (x, y))[1]
    def outer(theta):
        g = grad(loss)(theta, x0, y0)
        phi = {name: theta[name] - inner_lr * g[name] for name in theta}
        return loss(phi, x1, y1)
    meta_gradient = grad(outer)(theta)

- functional_call(model, phi, (x, y)) runs the model with phi in the place of its parameters; tied weights stay tied.
- grad(loss) is a new function: it takes what loss takes and returns d loss / d its first argument, here a dict of
  gradients by name, and writes nothing to .grad; grad_and_value returns (gradients, value). Being a function of phi, it
  can be differentiated again. optimizer.step() could not be: it overwrites theta in place under no_grad, and autograd
  would not see that phi came from theta. Here every phi_k is a new tensor.
- What is wrong with it is memory: it keeps the graphs of the whole episode. `Gradient` therefore has a backward of its
  own. There autograd hands in dloss = d outer / d L_k and dg = d outer / d g_k, and phi_k is due dloss * g_k + H dg, H
  being the Hessian of L_k at phi_k. g_k is known already, and the product H dg is computed afresh from phi_k, so that
  only one step's activations are alive, whatever K is (compiled: forward over reverse, as in MixFlow-MG, Kemaev et al.
  2025, arXiv 2505.00793; eager: reverse over reverse).

What it costs, in forwards F of one chunk (a gradient is 3 F: forward, and a backward of 2 F; differentiating that again
costs as much twice over, so that H dg, computed with its own gradient, is 9 F):

    plain training       3 (K + 1)
    first_order=True     3 (K + 1)    H dg taken as zero (FOMAML: Finn et al. 5.2, Nichol et al. 2018, arXiv 1803.02999)
    second order        12 K + 3      K (3 + 9) + 3, and the activations of one Hessian product

Both keep a copy of the parameters per inner step (with learned rates two, with AdamW six).
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Tensors = dict[str, torch.Tensor]  # by parameter name, as in dict(model.named_parameters())

# ----------------------------------------------------------------------------------------------------------------------
# the learner: a module from a task to a scalar


class MAML(nn.Module):
    """forward maps one task, x and y of (B, ...) with B a multiple of inner_steps + 1, to its outer loss.

    learn_inner_lr: exp(log_inner_lr[k, i]) is the rate of inner step k for parameter tensor i, at first inner_lr (Li et
    al. 2017, Meta-SGD, arXiv 1707.09835; per step as in Antoniou et al. 2019). inner_clip bounds the norm of each inner
    gradient (0: no bound); `clipped` counts how often it did. autocast is the dtype of the products inside the loss.
    AdamW inside starts afresh with every task, unless second_moment is a list of bias-corrected v, one for each name.
    The first step of a fresh AdamW is sign(g), whose derivative is zero: with K = 1 second order then *is* first order.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_steps: int = 1,
        inner_lr: float = 0.02,
        inner_optimizer: str = "sgd",  # 'sgd' | 'adamw'
        inner_schedule: str = "constant",  # 'constant' | 'cosine', after inner_warmup steps of linear warm-up
        inner_warmup: int = 0,
        inner_clip: float = 0.0,
        inner_weight_decay: float = 0.0,
        first_order: bool = False,
        objective: str = "every",  # 'final' | 'every'
        learn_inner_lr: bool = False,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ):
        super().__init__()
        for value, known in ((inner_optimizer, UPDATES), (inner_schedule, SCHEDULES), (objective, OBJECTIVES)):
            if value not in known:
                raise ValueError(f"{value!r} is unknown to MAML: choose {' or '.join(map(repr, known))}")
        if inner_lr <= 0 or min(inner_steps, inner_warmup, inner_clip, inner_weight_decay) < 0:
            raise ValueError("inner_lr must be positive; inner_steps, _warmup, _clip and _weight_decay not negative")
        if inner_steps and not first_order and any(isinstance(m, DROPOUT) and m.p > 0 for m in model.modules()):
            raise ValueError("dropout would draw anew for the Hessian: set dropout=0.0, or first_order=True")
        self.model, self.inner_steps, self.first_order = model, inner_steps, first_order
        self.objective = OBJECTIVES[objective]
        self.update, self.inner_lr, self.inner_weight_decay = UPDATES[inner_optimizer], inner_lr, inner_weight_decay
        self.schedule, self.inner_warmup, self.inner_clip = SCHEDULES[inner_schedule], inner_warmup, inner_clip
        self.autocast, self.second_moment, self.clipped = autocast, None, 0
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]  # frozen ones stay as they are
        self.log_inner_lr = None
        if learn_inner_lr and inner_steps:
            self.log_inner_lr = nn.Parameter(torch.full((inner_steps, len(self.names)), math.log(inner_lr)))
        if compile:  # the functions that contain torch.func.grad, whole: a compiled loss under it would run uncompiled
            for function in ("loss", "gradient", "hessian_product"):
                setattr(self, function, torch.compile(getattr(self, function), fullgraph=True))

    def forward(self, x: torch.Tensor, y: torch.Tensor, unrolled: bool = False) -> torch.Tensor:
        xs, ys = chunks(x, self.inner_steps + 1), chunks(y, self.inner_steps + 1)
        losses, phi = [], self.theta()
        for loss, phi in self.trajectory(xs[:-1], ys[:-1], unrolled):  # noqa: B007
            losses.append(loss)
        losses.append(self.loss(phi, xs[-1], ys[-1]))
        return self.objective(torch.stack(losses))

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> Tensors:
        """phi_K, for functional_call(model, phi, ...), after learning x, y (B, ...) in inner_steps equal chunks."""
        phi = self.theta()
        for _, phi in self.trajectory(chunks(x, self.inner_steps), chunks(y, self.inner_steps)):  # noqa: B007
            pass
        return phi

    def trajectory(self, xs, ys, unrolled: bool = False) -> Iterator[tuple[torch.Tensor, Tensors]]:
        """The inner loop, the only one. For each chunk: its loss before it is learned, and the parameters after."""
        gradient = self.unrolled_gradient if unrolled else partial(Gradient.apply, self)
        phi, nothing = self.theta(), [0.0] * len(self.names)
        # AdamW's m, v and the number of gradients in each; a lent v is corrected already, and beta2**inf = 0
        state = (nothing, nothing, 0, 0) if self.second_moment is None else (nothing, self.second_moment, 0, math.inf)
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            loss, *g = gradient(x, y, *phi.values())  # L_k(phi_k) and g_k
            if self.inner_clip:
                square = torch.stack([t.square().sum() for t in g]).sum()
                self.clipped = self.clipped + (square.detach() > self.inner_clip**2)
                g = [t * (self.inner_clip / square.clamp(min=self.inner_clip**2).sqrt()) for t in g]
            stepped, state = self.update(phi.values(), g, self.rates(k), self.inner_weight_decay, state)
            phi = dict(zip(self.names, stepped, strict=True))  # phi_k+1
            yield loss, phi

    def theta(self) -> Tensors:
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.names}

    def rates(self, k: int):
        """The learning rate of inner step k for each parameter tensor: floats, or the learned scalars."""
        w = self.inner_warmup
        factor = (k + 1) / (w + 1) if k < w else self.schedule((k - w) / max(1, self.inner_steps - w))
        if self.log_inner_lr is None:
            return [self.inner_lr * factor] * len(self.names)
        return (self.log_inner_lr[k].exp() * factor).unbind()

    # what is computed of one chunk, each a pure function of phi, and each compiled whole

    def loss(self, phi: Tensors, x, y) -> torch.Tensor:
        kind = x.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            return functional_call(self.model, phi, (x, y))[1]

    def gradient(self, phi: Tensors, x, y) -> tuple[Tensors, torch.Tensor]:
        return grad_and_value(self.loss)(phi, x, y)

    def hessian_product(self, phi: Tensors, v: Tensors, x, y) -> tuple[Tensors, Tensors]:
        """g and H v. As H is symmetric, forward over reverse and reverse over reverse agree; the first wins compiled,
        having no tape, the second eagerly. The contexts are inside, or compiled code would not see them."""
        with sdpa_kernel(SDPBackend.MATH), CausalInBlocks():
            if torch.compiler.is_compiling():
                return jvp(lambda phi: grad(self.loss)(phi, x, y), (phi,), (v,))
            with torch.enable_grad():
                phi = {n: t.detach().requires_grad_() for n, t in phi.items()}
                g = torch.autograd.grad(self.loss(phi, x, y), phi.values(), create_graph=True, materialize_grads=True)
                # a g that needs no grad does not depend on phi: its rows of H are zero
                curved = {n: t for n, t in zip(phi, g, strict=True) if t.requires_grad}
                v = [v[n] for n in curved]
                hv = torch.autograd.grad(list(curved.values()), phi.values(), v, materialize_grads=True)
            return dict(zip(phi, g, strict=True)), dict(zip(phi, hv, strict=True))

    def unrolled_gradient(self, x, y, *phi):
        """Gradient's forward, for torch.func to differentiate (MATH: fused attention has no second derivative)."""
        with sdpa_kernel(SDPBackend.MATH):
            g, loss = grad_and_value(self.loss)(dict(zip(self.names, phi, strict=True)), x, y)
        return loss, *(t.detach() if self.first_order else t for t in g.values())


class Gradient(torch.autograd.Function):
    """(learner, x, y, *phi) -> (loss, *g), with the lesson's backward, dloss * g + H dg."""

    @staticmethod
    def forward(ctx, learner, x, y, *phi):
        phi = [p.detach() for p in phi]  # constants to what is compiled, which would else prepare a backward of its own
        g, loss = learner.gradient(dict(zip(learner.names, phi, strict=True)), x, y)
        ctx.learner, ctx.first_order, ctx.batch = learner, learner.first_order, (x, y)
        ctx.save_for_backward(*(g.values() if ctx.first_order else phi))  # the Hessian's product brings g along
        if ctx.first_order:  # nobody need compute dg, nor fill it with zeros
            ctx.mark_non_differentiable(*g.values())
            ctx.set_materialize_grads(False)
        return loss, *g.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *dg):
        if ctx.first_order:
            return None, None, None, *(0.0 * g if dloss is None else dloss * g for g in ctx.saved_tensors)
        phi, v = (dict(zip(ctx.learner.names, ts, strict=True)) for ts in (ctx.saved_tensors, dg))
        g, hv = ctx.learner.hessian_product(phi, v, *ctx.batch)
        return None, None, None, *(dloss * g[n] + hv[n] for n in phi)


class CausalInBlocks(TorchFunctionMode):
    """Causal attention that can be differentiated twice, as no fused kernel can: four blocks of queries, each against
    the keys up to it alone, in plain operations. That is 10 of the 16 blocks of scores that MATH computes and masks;
    to MATH goes any other call of attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        causal = kwargs.get("is_causal") and not kwargs.get("dropout_p") and kwargs.keys() <= {"is_causal", "dropout_p"}
        if func is not F.scaled_dot_product_attention or not causal or len(args) > 3:
            return func(*args, **kwargs)
        q, k, v = args  # (..., T, head size)
        out, size = [], -(-q.size(-2) // 4)
        for i in range(0, q.size(-2), size):
            scores = q[..., i : i + size, :] @ k[..., : i + size, :].mT / q.size(-1) ** 0.5
            future = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=q.device).triu(i + 1)
            out.append((scores + future).softmax(-1) @ v[..., : i + size, :])
        return torch.cat(out, -2)


def meta_grad(learner: MAML, x: torch.Tensor, y: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """(grads, loss) of the outer loss by learner.named_parameters(): MAML by torch.func alone, exact and unrolled.

    The definition that learner(x, y).backward() is tested against; its memory grows by a whole graph per inner step.
    """
    theta = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
    return grad_and_value(lambda theta: functional_call(learner, theta, (x, y), {"unrolled": True}))(theta)


# ----------------------------------------------------------------------------------------------------------------------
# inner updates: new tensors from old ones, so that autograd can follow


def sgd(phi, g, lr, weight_decay, state):
    if weight_decay:  # decoupled: it does not pass through AdamW's second moment
        phi = [p * (1 - a * weight_decay) for p, a in zip(phi, lr, strict=True)]
    return [p + -a * g_i for p, g_i, a in zip(phi, g, lr, strict=True)], state


def adamw(phi, g, lr, weight_decay, state):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101, algorithm 2); eps_root keeps the derivative finite at g = 0."""
    beta1, beta2, eps, eps_root = 0.9, 0.95, 1e-8, 1e-16
    m, v, n_m, n_v = *state[:2], state[2] + 1, state[3] + 1
    m = [beta1 * m_i + (1 - beta1) * g_i for m_i, g_i in zip(m, g, strict=True)]
    v = [beta2 * v_i + (1 - beta2) * g_i * g_i for v_i, g_i in zip(v, g, strict=True)]
    c_m, c_v = 1 - beta1**n_m, 1 - beta2**n_v
    steps = [(m_i / c_m) / ((v_i / c_v + eps_root).sqrt() + eps) for m_i, v_i in zip(m, v, strict=True)]
    return sgd(phi, steps, lr, weight_decay, None)[0], (m, v, n_m, n_v)


def chunks(x, n):
    if n and x.size(0) % n:
        raise ValueError(f"{x.size(0)} rows do not split into {n} equal chunks: make batch_size a multiple of {n}")
    return x.chunk(n) if n else ()


UPDATES = {"sgd": sgd, "adamw": adamw}
SCHEDULES = {"constant": lambda t: 1.0, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t))}
OBJECTIVES = {"final": lambda losses: losses[-1], "every": torch.mean}
DROPOUT = nn.modules.dropout._DropoutNd
