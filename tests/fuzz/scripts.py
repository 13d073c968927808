"""Random scripts: short training programs around the losses, as lines of Python.

Leaves are called x, results y, those of vmap z and forward derivatives t, each with a number.

A script names the package `kl`, so that the same lines run with kl_ext, with plain torch and with an oracle. `leaf`, `compiled`
and `checkpoint` are named in the same way (judge.py). Its first line has the sizes that all shapes are made of. Whatever is
neither a loss nor a view is exact in binary arithmetic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DTYPES = ("float32", "float32", "float64", "float16", "bfloat16")
INPUTS = {
    "kl_div_single_loss": ("mu", "log_var"),
    "kl_div_pair_loss": ("mu_p", "log_var_p", "mu_q", "log_var_q"),
    "gaussian_kl_div": ("mu_p", "log_var_p", "mu_q", "log_var_q"),
    "normal_kl_div": ("loc_p", "scale_p", "loc_q", "scale_q"),
}
PREAMBLE = """\
import functools

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import kl_ext as kl

checkpoint = functools.partial(torch_checkpoint, use_reentrant=False)
compiled = functools.partial(torch.compile, backend="aot_eager")
leaf = torch.Tensor.detach


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

"""


@dataclass(frozen=True)
class Script:
    """Lines of Python. A mild script has moderate numbers, and every kind of derivative; others have every kind of number."""

    lines: tuple[str, ...]
    mild: bool

    @property
    def code(self) -> str:
        return "\n".join(self.lines) + "\n"

    def __str__(self) -> str:
        """A program that runs by itself."""
        return PREAMBLE + "\n" + self.code


class _Draft:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.mild = self.chance(0.4)
        self.lines: list[str] = []
        self.leaves: list[str] = []
        self.losses: list[str] = []
        self.count = 0
        self.dtype = self.random.choice(DTYPES[:3] if self.mild else DTYPES)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def choose(self, *options: str) -> str:
        return self.random.choice(options)

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def add(self, line: str) -> None:
        self.lines.append(line)

    # Sizes and shapes. A shape is a list of expressions of A, B and C.

    def sizes(self) -> None:
        sizes = [self.random.choice([1, 2, 3, 5, 8, 17] if self.mild else [0, 1, 2, 3, 4, 7, 16, 33, 65, 130]) for _ in "ABC"]
        if not self.mild and self.chance(0.05):
            sizes[2] = self.random.choice([1024, 1025, 2500])
            sizes[0] = min(sizes[0], 7)
        self.add(f"A, B, C = {sizes[0]}, {sizes[1]}, {sizes[2]}")
        self.shape = self.random.choice([["A"], ["A", "B"], ["B", "C"], ["A", "B", "C"], ["A", "1", "C"], []])

    def part_of_shape(self) -> list[str]:
        """Of a tensor that broadcasts to the shape; of one that does not, now and then."""
        own = [size if self.chance(0.7) else "1" for size in self.shape]
        own = own[self.random.randrange(len(own) + 1) :] if own and self.chance(0.3) else own
        return [*own, "7 + A"] if self.chance(0.01) else own

    # Tensors

    def numbers(self, shape: list[str], deviation: bool) -> str:
        """An expression of a float64 tensor."""
        arguments = ", ".join([*shape, f"seed={self.random.randrange(1000)}"])
        if self.mild:
            return f"uniform({arguments}) + 0.5" if deviation else f"uniform({arguments}) * 2 - 1"
        scale = self.choose("", "", " * 0.001", " * 8", " * 30", " * 1e-6")
        if deviation:
            return f"(normal({arguments}){scale}).exp()" if self.chance(0.8) else f"normal({arguments}){scale}"
        return f"normal({arguments}){scale}"

    def make_leaf(self, shape: list[str], deviation: bool = False) -> str:
        name = self.name("x")
        dtype = self.dtype if self.chance(0.9) else self.random.choice(DTYPES[:3] if self.mild else DTYPES)
        numbers = f"({self.numbers(shape, deviation)}).to(torch.{dtype})"
        if len(shape) > 1 and self.chance(0.2):
            numbers = f"{numbers}.transpose(0, -1).contiguous().transpose(0, -1)"
        self.add(f"{name} = leaf({numbers})")
        if not self.mild and self.chance(0.25):
            value = self.choose(
                "float('nan')", "float('inf')", "-float('inf')", "0.0", "-0.0", "1.0", "2.0**-23", "-30.0", "20.0"
            )
            self.add(f"{name}.view_as({name}).flatten()[:1] = {value}" if not shape else f"{name}[..., :1] = {value}")
        if self.chance(0.85):
            self.add(f"{name}.requires_grad_()")
            self.leaves.append(name)
            if self.chance(0.1):
                self.add(f"{name}.register_hook(lambda g: g * 2)")
        return name

    def halves(self) -> list[str]:
        """Two or four tensors of one shape out of one, in one of the ways that people write it."""
        a, b = self.name("h"), self.name("h")
        if not self.shape:
            return [self.make_leaf([]), self.make_leaf([])]
        place = self.random.randrange(len(self.shape))
        size = self.shape[place]
        whole = self.make_leaf([*self.shape[:place], f"2 * {size}", *self.shape[place + 1 :]])
        before = ":, " * place
        self.add(
            self.choose(
                f"{a}, {b} = {whole}.chunk(2, {place})" if size == "1" else f"{a}, {b} = {whole}.split({size} or 1, {place})",
                f"{a}, {b} = {whole}[{before}:{size}], {whole}[{before}{size}:]",
                f"{b}, {a} = {whole}[{before}:{size}], {whole}[{before}{size}:]",
                f"{a}, {b} = {whole}.narrow({place}, 0, {size}), {whole}.narrow({place}, {size}, {size})",
                f"{a}, {b} = {whole}[{before}::2], {whole}[{before}1::2]",
                f"{a}, {b} = {whole}.unflatten({place}, (2, {size})).unbind({place})",
                f"{a}, {b} = ({whole} * 1.0).split({size} or 1, {place})",
            )
        )
        return [a, b]

    def viewed(self, x: str, shape: list[str]) -> str:
        """x, or something that is made of it."""
        y = self.name("v")
        shape_now = f"{x}.shape"
        options = [f"-(-{x})", f"{x}.clone()", f"{x}.detach()", f"{x}[None].expand(2, *{shape_now})[1]", f"{x} * 1.0"]
        if shape:
            options += [
                f"torch.cat([{x}, {x}])[: {x}.shape[0]]",
                f"{x}.flip(0)",
                f"{x}[..., :]",
                f"{x}.movedim(0, -1).movedim(-1, 0)",
            ]
        if shape == self.shape and shape:
            options.append(f"{x}[:1].expand_as({x})")
        self.add(f"{y} = {self.random.choice(options)}")
        if self.chance(0.1):
            self.add(f"{y}.register_hook(lambda g: g * 0.5)")
        return y

    def argument(self, deviation: bool) -> str:
        if self.leaves and not deviation and self.chance(0.1):
            return self.random.choice(self.leaves)
        shape = list(self.shape) if self.chance(0.6) else self.part_of_shape()
        x = self.make_leaf(shape, deviation)
        return self.viewed(x, shape) if self.chance(0.3) else x

    # Losses

    def options(self, function: str) -> str:
        options = ""
        if function != "normal_kl_div" and self.chance(0.3):
            low, high = self.random.choice(
                [("-2.0", "1.5"), ("None", "None"), ("0.25", "0.25"), ("-8.0", "None"), ("None", "4.0")]
            )
            options += f", clamp_min={low}, clamp_max={high}"
        if function not in ("gaussian_kl_div", "normal_kl_div"):
            return options
        if self.chance(0.3):
            w = self.name("w")
            shape = ", ".join([*self.part_of_shape(), f"seed={self.random.randrange(1000)}"])
            self.add(
                f"{w} = " + self.choose(f"uniform({shape}) > 0.5", f"leaf((uniform({shape}) > 0.4).to(torch.{self.dtype}) * 2)")
            )
            options += f", weight={w}"
        reduction = self.choose("none", "none", "sum", "sum", "mean", "batchmean")
        options += f", reduction={reduction!r}"
        if reduction in ("sum", "mean") and self.shape and self.chance(0.6):
            last = len(self.shape) - 1
            dim = self.choose(
                "0", "-1", f"{last}", f"({last},)", "(0, -1)" if last else "[0]", "7" if self.chance(0.1) else "0"
            )
            options += f", dim={dim}"
        if self.chance(0.2):
            options += ", keepdim=True"
        if self.chance(0.1):
            options += f", dtype=torch.{self.choose('float32', 'float64')}"
        return options

    def loss(self) -> None:
        function = self.random.choice(list(INPUTS))
        deviations = function == "normal_kl_div"
        count = 4 if function == "kl_div_pair_loss" else 2 if function == "kl_div_single_loss" else self.random.choice([2, 4])
        given: list[str] = []
        while len(given) < count:
            if not deviations and self.chance(0.35):
                given += self.halves()
            elif len(given) == 2 and function in ("gaussian_kl_div", "normal_kl_div") and self.chance(0.2):
                given += ["0.5", self.choose("0.25", "1.0", "2")]
            else:
                given += [self.argument(False), self.argument(deviations)]
        options = self.options(function)
        y = self.name("y")
        tensors = [x for x in given if x.isidentifier()]
        names = ", ".join(tensors)
        call = f"kl.{function}({', '.join(given)}{options})"
        guise = self.random.random()
        if guise < 0.06:
            self.add(
                f"{y} = checkpoint(lambda {names}: {call}, {names})" if len(set(tensors)) == len(tensors) else f"{y} = {call}"
            )
        elif guise < 0.063 and len(set(tensors)) == len(tensors):
            self.add(f"{y} = compiled(lambda {names}: {call})({names})")
        elif guise < 0.12:
            self.add("with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):")
            self.lines[-1] += f" {y} = {call}"
        elif guise < 0.15:
            self.add(f"with torch.no_grad(): {y} = {call}")
        else:
            self.add(f"{y} = {call}")
        self.losses.append(y)
        self.batched(function, given, options)
        if self.chance(0.05):
            self.add(f"{y}.register_hook(lambda g: g * 2)")

    def batched(self, function: str, given: list[str], options: str) -> None:
        """The same call under vmap and its forward derivative, of mild numbers."""
        tensors = [x for x in given if x.isidentifier()]
        if not self.mild or len(set(tensors)) != len(tensors):
            return
        names = ", ".join(tensors)
        call = f"kl.{function}({', '.join(given)}{options})"
        if self.chance(0.2):
            z, dims = self.name("z"), [self.choose("0", "None", "-1") for _ in tensors]
            dims[0] = self.choose("0", "-1")
            batches = ", ".join(
                x if dim == "None" else f"torch.stack([{x}, {x} * 0.5, {x}], {dim})" for x, dim in zip(tensors, dims)
            )
            function_of = f"lambda {names}: {call}"
            if self.chance(0.3):
                function_of = f"torch.vmap({function_of}, in_dims=({', '.join(dims)},), out_dims=-1)"
                batches = ", ".join(
                    x if dim == "None" else f"torch.stack([torch.stack([{x}, {x} * 0.5], {dim})] * 2)"
                    for x, dim in zip(tensors, dims)
                )
                dims = ["None" if dim == "None" else "0" for dim in dims]
            self.add(f"{z} = torch.vmap({function_of}, in_dims=({', '.join(dims)},))({batches})")
            self.losses.append(z)
        if self.chance(0.2):
            y, t = self.name("y"), self.name("t")
            primals = ", ".join(f"{x}.detach()" for x in tensors)
            tangents = ", ".join(f"torch.full_like({x}, {self.choose('0.5', '1.0', '-2.0')}).detach()" for x in tensors)
            self.add(f"{y}, {t} = torch.func.jvp(lambda {names}: {call}, ({primals},), ({tangents},))")
        if self.chance(0.1):
            g, place = self.name("y"), self.random.randrange(len(tensors))
            self.add(f"{g} = torch.func.grad(lambda {names}: ({call}).sum(), argnums={place})({names})")
            self.losses.append(g)

    # After the losses

    def changes(self) -> None:
        """In place, of what a loss may have saved."""
        for x in self.leaves:
            if self.chance(0.03):
                self.add(f"with torch.no_grad(): {x}.mul_(2)")

    def backward(self) -> None:
        if not self.losses or not self.leaves:
            return
        scale = {y: self.choose("1.0", "0.5", "4.0") for y in self.losses}
        if (
            self.mild and self.chance(0.4) and not any("compiled" in line for line in self.lines)
        ):  # which has no second derivative
            y = self.random.choice(self.losses)
            g, some = self.name("g"), ", ".join(self.leaves)
            options = "create_graph=True, allow_unused=True"
            self.add(f"{g} = torch.autograd.grad({y}.sum(), [{some}], {options})")
            self.add(f"{g} = [(g * 2).sum() for g in {g} if g is not None and g.requires_grad]")
            self.add(f"if {g}: sum({g}).backward(retain_graph=True)")
        if self.chance(0.3):
            total = " + ".join(f"({y} * {scale[y]}).sum()" for y in self.losses)
            self.add(f"({total}).backward()")
            return
        for y in self.losses:
            retain = self.choose("", "retain_graph=True", "retain_graph=True")
            self.add(f"if {y}.requires_grad: {y}.backward(torch.ones_like({y}) * {scale[y]}{', ' + retain if retain else ''})")
            if self.chance(0.1):
                self.add(f"{y}.backward(torch.ones_like({y}))")


def draw(seed: int) -> Script:
    """The script of a seed."""
    draft = _Draft(seed)
    draft.sizes()
    for _ in range(draft.random.choice([1, 1, 1, 2, 3])):
        draft.loss()
    draft.changes()
    draft.backward()
    return Script(tuple(draft.lines), draft.mild)
